"""Selective amplification: VS2 that amplifies a latent more, the more the latent differs between classes.

The zero-shot probabilities of the gallery's images stand in for their classes, so that no labels are needed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vs2_plugin.arrays import spread
from vs2_plugin.devices import add_at
from vs2_plugin.gallery.gallery import CLIP
from vs2_plugin.sae.topk import Latents, TopKSAE, by_latent, sum_by_latent
from vs2_plugin.steering.batch import Batch
from vs2_plugin.steering.move import Code, Move
from vs2_plugin.steering.neighbours import Activations
from vs2_plugin.steering.retriever import Retriever

__all__ = ["SelectiveSteering", "Selectivity", "class_selectivity", "latent_weights"]

#: Images that the statistics are taken over, at most, and images per batch.
_IMAGES, _BATCH = 50_000, 2048


def class_selectivity(batches: Iterator[tuple[Latents, Tensor]], num_latents: int) -> Tensor:
    """Return ``r_j`` of each latent, the share of its standard deviation between classes: float32 ``[latents]``.

    ``r_j² = (S_B - (K - 1) M_W) / (S_T + M_W)``, ω² of the analysis of variance, with the sum of squares between
    class means ``S_B``, in total ``S_T``, the mean square within ``M_W = (S_T - S_B) / (n - K)`` and K classes. Unlike
    ``S_B / S_T`` its expectation is 0 for a latent that is independent of the classes. An image counts for each class
    by its probability; classes with a total probability below one image are left out.

    Args:
        batches: sparse codes ``[batch, k]`` with class probabilities ``[batch, classes]`` (rows sum to 1).
        num_latents: number of latents.
    """
    count, sums, mass, squares = 0, torch.empty(0), torch.empty(0), torch.empty(0)
    for latents, probabilities in batches:
        if count == 0:
            sums = probabilities.new_zeros(probabilities.shape[1], num_latents, dtype=torch.float64)
            mass, squares = sums.new_zeros(len(sums)), sums.new_zeros(num_latents)
        sums += sum_by_latent(by_latent(latents.indices, num_latents), latents.values, probabilities).T
        mass += probabilities.double().sum(0)
        add_at(squares, latents.indices.flatten(), latents.values.flatten().double().square())
        count += len(probabilities)
    present = mass >= 1
    classes, within = int(present.sum()), max(count - int(present.sum()), 1)
    mean = sums.sum(0) / count
    total = squares - count * mean.square()
    between = (mass[present, None] * (sums[present] / mass[present, None] - mean).square()).sum(0)
    noise = (total - between).clamp_min(0) / within
    omega = (between - (classes - 1) * noise) / (total + noise)
    # A latent that is never active has no variance: 0/0 becomes 0.
    return omega.nan_to_num(0).clamp(0, 1).sqrt().float()


def latent_weights(selectivity: Tensor, p: float) -> Tensor:
    """Return ``w_j = (r_j / mean of the positive r)^p``, ``[latents]``; all 1 if p = 0 or no latent is selective."""
    positive = selectivity[selectivity > 0]
    if p == 0 or len(positive) == 0:
        return torch.ones_like(selectivity)
    return (selectivity / positive.mean()) ** p


class Selectivity:
    """The :func:`class_selectivity` over a gallery, computed when first needed, and again for another classifier.

    For a large gallery, a sample of images, evenly spread over the gallery, is used.
    """

    def __init__(self, sae: TopKSAE, activations: Activations, retriever: Retriever) -> None:
        """Take the gallery's ``activations`` at the SAE's site."""
        self._sae, self._activations, self._retriever = sae, activations, retriever
        self._known_for: Tensor | None = None
        self._rows = spread(len(retriever.gallery), _IMAGES).split(_BATCH)
        self._kept: list[tuple[Tensor, Tensor]] = []

    def _codes(self) -> Iterator[Latents]:
        """Yield the codes of the images, batch by batch, computed once and kept: at most 26 MB with k = 64."""
        for number, rows in enumerate(self._rows):
            if number == len(self._kept):
                latents = self._sae.encode(self._activations[rows])
                self._kept.append((latents.values, latents.indices.int()))
            values, indices = self._kept[number]
            yield Latents(values, indices.long())

    def _batches(self) -> Iterator[tuple[Latents, Tensor]]:
        """Yield codes, and zero-shot probabilities at CLIP's logit scale of 100."""
        embeddings = Activations(self._retriever.gallery.embeddings[CLIP], self._retriever.device)
        for rows, latents in zip(self._rows, self._codes(), strict=True):
            logits = 100 * F.normalize(embeddings[rows], dim=-1) @ self._retriever.classifier
            yield latents, logits.softmax(1)

    def weights(self, p: float) -> tuple[Tensor, float]:
        """Return the :func:`latent_weights`, and the factor that gives the weighted steering vectors the mean length of
        those of VS2 over the gallery, so that α means the same for both."""
        if self._known_for is not self._retriever.classifier:
            self._known_for = self._retriever.classifier
            self._r = class_selectivity(self._batches(), self._sae.config.num_latents)
            self._weights: dict[float, tuple[Tensor, float]] = {}
        if p not in self._weights:
            weights = latent_weights(self._r, p)
            self._weights[p] = weights, 1.0 if (weights == 1).all() else self._scale(weights)
        return self._weights[p]

    def _scale(self, weights: Tensor) -> float:
        lengths = torch.zeros(2, dtype=torch.float64)
        for latents in self._codes():
            for row, code in enumerate((latents, weighted(latents, weights))):
                lengths[row] += self._sae.combine(code).norm(dim=1).double().sum().cpu()
        return float(lengths[0] / lengths[1]) if lengths[1] > 0 else 1.0


def weighted(latents: Latents, weights: Tensor) -> Latents:
    """Return the code ``w ⊙ c``."""
    return Latents(latents.values * weights[latents.indices], latents.indices)


class SelectiveSteering(nn.Module):
    """``x + α s W_decᵀ (w ⊙ c)`` at the norm of x, with the weights w and the factor s of :class:`Selectivity`."""

    replayable = True

    def __init__(self, sae: TopKSAE, selectivity: Selectivity, alpha: float, p: float) -> None:
        super().__init__()
        self.sae, self.selectivity, self.alpha, self.p = sae, selectivity, alpha, p
        self.facts = {"alpha": alpha, "p": p}

    def forward(self, x: Tensor, batch: Batch) -> Move:
        """Return the move of activations ``[batch, d]``."""
        code = batch.code(self.sae, x)
        # The direction does not depend on the strength.
        return Move(batch.once((code, self.selectivity, self.p), lambda: self._weighted(code)), self.alpha)

    @torch.no_grad()
    def _weighted(self, code: Code) -> Code:
        weights, scale = self.selectivity.weights(self.p)
        return code.scaled((scale * weights)[code.indices])
