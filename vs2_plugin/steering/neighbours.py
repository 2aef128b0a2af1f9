"""Steering along the neighbours of an image, and along class prototypes: VS2++ and the baselines with a gallery.

The steerings are called with activations ``[batch, d]`` and their :class:`Batch`, and look up its neighbours in a
:class:`Retriever`. All are from arXiv 2506.01247 unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from vs2_plugin.arrays import Stack
from vs2_plugin.devices import add_at
from vs2_plugin.errors import DataError
from vs2_plugin.gallery.gallery import CLIP, Gallery
from vs2_plugin.sae.topk import Latents, TopKSAE
from vs2_plugin.steering.batch import Batch
from vs2_plugin.steering.move import Code, Move
from vs2_plugin.steering.retriever import Neighbours, Retriever, majority
from vs2_plugin.steering.tally import Tally

__all__ = [
    "Activations",
    "Codes",
    "MixedSteering",
    "NeighbourSteering",
    "PrototypeSteering",
    "VoteSteering",
    "contrast",
    "gallery_batches",
]

_CHUNK = 4096
#: Up to this many bytes of codes are computed once and kept; for a larger gallery, those of each batch's neighbours are
#: computed for each batch.
_RESIDENT = 2 << 30
#: Images of the gallery that are yielded at a time.
_BATCH = 2048
_PER_CLASS = 10


class Activations:
    """The gallery's activations at one site, as directions to steer along."""

    def __init__(self, rows: np.ndarray | Stack, device: torch.device) -> None:
        self._rows, self._device = rows, device

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Return the activations of these row numbers: float32 ``[*rows.shape, d]``."""
        activations = torch.from_numpy(np.asarray(self._rows[rows.flatten().cpu().numpy()]))
        return activations.to(self._device).float().view(*rows.shape, -1)

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Return ``Σ_j w_j x_j`` ``[batch, d]`` of row numbers and weights ``[batch, n]``."""
        return torch.einsum("bn,bnd->bd", weights, self[rows])


def gallery_batches(
    gallery: Gallery, hookpoint: str, retriever: Retriever | None, device: torch.device, rows: Tensor
) -> Iterator[tuple[Tensor, Batch]]:
    """Yield images of the gallery as the last site of a tower sees them: activations ``[batch, d]``, and their batch.

    Args:
        gallery: the images.
        hookpoint: the tower's last site. Where the gallery stores no activations for it, embeddings are yielded.
        retriever: the retriever of a method that looks up neighbours.
        device: the device of the activations.
        rows: row numbers of the images, int64 ``[count]``.
    """
    activations = Activations(gallery.activations.get(hookpoint, gallery.embeddings[CLIP]), device)
    for part in rows.split(_BATCH):
        yield activations[part], Batch(rows=part) if retriever is None else retriever.own(part)


class Codes:
    """The sparse codes of the gallery's activations at one site, as directions to steer along.

    The codes are computed when they are first needed.
    """

    def __init__(self, sae: TopKSAE, activations: Activations, count: int) -> None:
        self._sae, self._activations, self._count = sae, activations, count
        #: Whether all codes are kept on the device.
        self.kept = count * sae.config.k * 8 <= _RESIDENT
        self._all: Latents | None = None

    def __getitem__(self, rows: Tensor) -> Latents:
        """Return the codes of these row numbers: values and indices ``[*rows.shape, k]``."""
        if not self.kept:
            return self._sae.encode(self._activations[rows])
        if self._all is None:
            self._all = self._encode_all()
        rows = rows.to(self._all.values.device)
        return Latents(self._all.values[rows], self._all.indices[rows].long())

    def _encode_all(self) -> Latents:
        parts = []
        bar = tqdm(total=self._count, desc="codes of the gallery", unit="img", disable=None, leave=False)
        with torch.no_grad(), bar:
            for start in range(0, self._count, _CHUNK):
                rows = torch.arange(start, min(start + _CHUNK, self._count))
                latents = self._sae.encode(self._activations[rows])
                parts.append((latents.values, latents.indices.int()))
                bar.update(len(rows))
        return Latents(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def mixed(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Return ``Σ_j w_j c_j``, dense: ``[batch, latents]`` of row numbers and weights ``[batch, n]``."""
        latents = self[rows]
        code = weights.new_zeros(len(rows), self._sae.config.num_latents)
        places, values = latents.indices.flatten(1), (latents.values * weights[..., None]).flatten(1)
        return add_at(code, places, values)

    def combine(self, rows: Tensor, weights: Tensor) -> Code:
        """Return ``Σ_j w_j c_j`` of row numbers and weights ``[batch, n]``, as a code that is computed when needed."""
        return Code(self._sae, partial(self.mixed, rows, weights))


def contrast(labels: Tensor, chosen: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights with which a sum over neighbours is the mean over S⁺ minus the mean over S⁻.

    S⁺ are the neighbours whose label is the chosen one, S⁻ the others. An empty set contributes 0.

    Args:
        labels: int64 ``[batch, n]``.
        chosen: int64 ``[batch]``.
        valid: bool ``[batch, n]``; False where there is no neighbour.

    Returns:
        The weights ``[batch, n]``, and the share of neighbours in S⁺, ``[batch]``.
    """
    same = valid & (labels == chosen[:, None])
    size, number = same.sum(1, keepdim=True), valid.sum(1, keepdim=True)
    weights = valid / size.where(same, (size - number).clamp_max(-1))
    return weights, (size / number.clamp_min(1))[:, 0]


class _Voting(nn.Module):
    """Base class of steerings along neighbours: a retriever, the neighbours' labels, and their agreement.

    The metric ``agreement`` of the results is the mean share of neighbours that have the chosen label.
    """

    def __init__(self, retriever: Retriever) -> None:
        super().__init__()
        self.retriever = retriever
        self._tally = Tally()

    def reset(self) -> None:
        """Forget the images seen so far."""
        self._tally.reset()

    @property
    def facts(self) -> dict[str, float]:
        """Scalars for the metrics of the results file."""
        return self._tally.means()

    def _labels(self, kind: str, neighbours: Neighbours) -> Tensor:
        """Return the neighbours' labels ``[batch, n]``."""
        return self.retriever.labels(kind)[neighbours.rows]


class _Contrast(NamedTuple):
    """The contrast between the neighbours of each image in S⁺ and in S⁻."""

    direction: Code | Tensor
    """Mean over S⁺ minus mean over S⁻: codes, or activations ``[batch, d]``."""
    shares: Tensor
    """``[batch]``: the share of neighbours in S⁺."""


class NeighbourSteering(_Voting):
    """``x + α (mean over S⁺ - mean over S⁻)``, with sparse codes (VS2++) or activations (CLIP steering).

    S⁺ are the neighbours with the most frequent label among them (``rule`` majority), or with the query's own
    zero-shot class (query); S⁻ are the others. VS2++ with ``α = λ (γ - 1)`` is the mean VS2 direction of S⁺ minus
    that of S⁻, and keeps the norm of x as VS2 does; CLIP steering does not. ``dataset`` is the one under evaluation.

    With a ``brake``, an image is left alone if S⁺ is less than that share of its neighbours: where zero-shot labels
    disagree, a direction computed from them is as unreliable as the labels. (Ours, not the paper's.)
    """

    def __init__(
        self,
        retriever: Retriever,
        directions: Codes | Activations,
        alpha: float,
        rule: str,
        labels: str,
        dataset: str | None = None,
        brake: float | None = None,
    ) -> None:
        super().__init__(retriever)
        self.directions, self.alpha = directions, alpha
        self.rule, self.labels, self.dataset, self.brake = rule, labels, dataset, brake

    @property
    def facts(self) -> dict[str, float]:
        """Scalars for the metrics of the results file; ``braked`` is the share of images that the brake left alone."""
        return {"alpha": self.alpha, **super().facts}

    @property
    def replayable(self) -> bool:
        """Whether a forward pass reads nothing but memory of the device, so that it can be replayed as a CUDA graph."""
        return isinstance(self.directions, Codes) and self.directions.kept and self.retriever.replayable

    def _contrast(self, batch: Batch) -> _Contrast:
        likely = self.retriever.likely(batch)
        if likely is not None:
            guess = self._towards(batch, likely)
            if isinstance(guess.direction, Code):
                _ = guess.direction.direction  # queues all work on the GPU before the CPU waits
            if self.retriever.neighbours(batch) is likely:
                return guess
        return self._towards(batch, self.retriever.neighbours(batch))

    def _towards(self, batch: Batch, neighbours: Neighbours) -> _Contrast:
        labels = self._labels(self.labels, neighbours)
        chosen = self._own_classes(batch) if self.rule == "query" else majority(labels, neighbours)
        weights, shares = contrast(labels, chosen, neighbours.valid)
        if self.brake is not None:
            weights = weights * (shares >= self.brake)[:, None]
        return _Contrast(self.directions.combine(neighbours.rows, weights), shares)

    def _own_classes(self, batch: Batch) -> Tensor:
        """Return the queries' zero-shot classes, numbered as the neighbours' labels. Raises DataError if none fit."""
        if self.labels == "pseudo":
            return self.retriever.classes(batch)
        firsts = self.retriever.gallery.first_labels
        if self.dataset not in firsts and (self.dataset is not None or len(firsts) > 1):
            raise DataError(
                f"the query rule compares an image's class with the training labels of {' and '.join(firsts)}, and the "
                f"data set under evaluation is {self.dataset or 'not known'}; expected one of them, or @rule=majority"
            )
        return self.retriever.classes(batch) + (firsts.get(self.dataset, 0) if self.dataset else 0)

    def forward(self, x: Tensor, batch: Batch) -> Tensor | Move:
        """Steer activations ``[batch, d]``."""
        # The direction does not depend on the strength.
        key = (self.directions, self.retriever, self.rule, self.labels, self.brake)
        direction, shares = batch.once(key, lambda: self._contrast(batch))
        self._tally.add(agreement=shares, **({} if self.brake is None else {"braked": shares < self.brake}))
        if isinstance(direction, Code):
            return Move(direction, self.alpha)
        return x + self.alpha * direction


class MixedSteering(_Voting):
    """Weighted RAG, at the output embedding: ``mix q + (1 - mix) Σ_j w_j r_j`` with ``q`` and ``r_j`` of unit norm.

    ``w_j`` is the similarity of a neighbour, normalised to sum 1; negative similarities count as 0. With ``labels``,
    only the neighbours that have the most frequent label are used (the paper does not define its oracle form; this is
    our reading). A query without neighbours of positive similarity is left alone.
    """

    def __init__(self, retriever: Retriever, mix: float, labels: str) -> None:
        super().__init__(retriever)
        self.mix, self.labels = mix, labels
        self.embeddings = Activations(retriever.gallery.embeddings[CLIP], retriever.device)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """Steer embeddings ``[batch, e]``."""
        neighbours = self.retriever.neighbours(batch)
        members = neighbours.valid
        if self.labels != "none":
            labels = self._labels(self.labels, neighbours)
            members = members & (labels == majority(labels, neighbours)[:, None])
            self._tally.add(agreement=members.sum(1) / neighbours.valid.sum(1).clamp_min(1))
        weights = neighbours.similarity.clamp_min(0) * members
        total = weights.sum(1, keepdim=True)
        retrieved = F.normalize(self.embeddings[neighbours.rows], dim=-1)
        mean = torch.einsum("bn,bnd->bd", weights / total.clamp_min(torch.finfo(total.dtype).tiny), retrieved)
        norm: Tensor = x.norm(dim=-1, keepdim=True)
        mixed: Tensor = norm * (self.mix * F.normalize(x, dim=-1) + (1 - self.mix) * mean)
        return mixed.where(total > 0, x)


class PrototypeSteering(nn.Module):
    """Oracle prototypes: ``x + α W_decᵀ c̄``, at the norm of x, with ``c̄`` the prototype of the image's true class.

    The prototype is the mean sparse code of the ten gallery images that the zero-shot classifier assigns to the class
    with the highest probability. A class without such images has no prototype; its images are left alone.
    """

    def __init__(self, retriever: Retriever, codes: Codes, alpha: float) -> None:
        super().__init__()
        self.retriever, self.codes, self.alpha = retriever, codes, alpha
        self.facts = {"alpha": alpha}
        self._prototypes: tuple[Tensor, Code] | None = None

    def prototypes(self) -> Code:
        """Return ``c̄`` of each class: a code with a row per class."""
        pseudo = self.retriever.pseudo[0]
        if self._prototypes is None or self._prototypes[0] is not pseudo:
            count = self.retriever.classifier.shape[1]
            own, confidence = (part.cpu() for part in self.retriever.pseudo)
            rows, weights = torch.zeros(count, _PER_CLASS, dtype=torch.long), torch.zeros(count, _PER_CLASS)
            for label in own.unique().tolist():
                mine = (own == label).nonzero()[:, 0]
                best = mine[confidence[mine].argsort(descending=True, stable=True)[:_PER_CLASS]]
                rows[label, : len(best)], weights[label, : len(best)] = best, 1 / len(best)
            self._prototypes = pseudo, self.codes.combine(rows, weights.to(self.retriever.device))
        return self._prototypes[1]

    def forward(self, x: Tensor, batch: Batch) -> Move:
        """Return the move of activations ``[batch, d]``. Raises DataError unless every image has one true class."""
        targets = batch.targets
        if targets is None or targets.ndim != 1 or len(targets) != len(x):
            raise DataError(
                "oracle prototypes need the true class of every image, one each; they run in the zero-shot "
                "classification of data sets with one label per image"
            )
        return Move(self.prototypes()[targets.to(x.device)], self.alpha)


class VoteSteering(_Voting):
    """Vote of the neighbours' zero-shot classes: the output embedding becomes the embedding of the winning class.

    A query without neighbours is left alone. In bfloat16 (clip_benchmark's default) the winner's logit cannot be told
    from that of a class whose embedding has a cosine above about 0.997 with its own; ``--no_amp`` can.
    """

    @property
    def replayable(self) -> bool:
        """Whether a forward pass reads nothing but memory of the device, so that it can be replayed as a CUDA graph."""
        return self.retriever.replayable

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """Replace embeddings ``[batch, e]`` by those of the winning classes."""
        neighbours = self.retriever.neighbours(batch)
        labels = self._labels("pseudo", neighbours)
        winner = majority(labels, neighbours)
        self._tally.add(agreement=contrast(labels, winner, neighbours.valid)[1])
        return self.retriever.classifier.T[winner].where(neighbours.valid.any(1, keepdim=True), x)
