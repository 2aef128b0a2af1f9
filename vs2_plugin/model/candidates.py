"""Zero-shot classes of the same images under many steerings, for the matrix products of a few steerings.

Steerings that differ only in strength move an activation along a line, so that the outputs of the tower's final
LayerNorm lie in a plane, or nearly. The products with projection and class embeddings are therefore computed for a few
directions only, and logits are sums of these products. An image whose two best logits are closer than the possible
error is classified by the tower itself. Nothing is assumed of a steering: the part of an output outside of the
directions is measured, and counts as error, as rounding does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vs2_plugin.clip.sites import ClipModel, Site, embedding_from, pooled_from

__all__ = ["ZeroShot"]

#: Images in one block, few enough that their vectors stay in the processor's cache.
_PART = 64
_DIRECTIONS = 4
#: Bound on the float32 error of an inner product, as a share of the product of the two vectors' lengths: about ten
#: times the error that occurs.
_ROUNDING = 1e-5


class ZeroShot:
    """Zero-shot classifier of activations at a tower's end, by float32 class embeddings ``[embed_dim, classes]``."""

    def __init__(self, model: ClipModel, site: Site, classifier: Tensor) -> None:
        self._model, self._site, self._classifier = model, site, classifier
        projection = None if site.token_dim is None else model.visual.proj
        #: Maps outputs of the final LayerNorm to logits: ``[d, classes]``.
        self._weights = classifier if projection is None else projection.float() @ classifier
        self._longest = self._weights.norm(dim=0).max()
        #: Output of the LayerNorm for an activation of 0: its bias, which is subtracted from all outputs.
        self._origin = pooled_from(model, site, classifier.new_zeros(1, site.width))
        self._shift = self._origin @ self._weights

    def __call__(self, ways: Sequence[Tensor]) -> Tensor:
        """Return the classes, int64 ``[images, steerings]``, of the activations ``[images, d]`` under each steering."""
        labels, unsure, spanning = [], [], None
        for part in zip(*(way.split(_PART) for way in ways), strict=True):
            z = pooled_from(self._model, self._site, torch.stack(part, dim=1)) - self._origin
            spanning = _spanning(z) if spanning is None else spanning
            classes, sure = self._part(z, spanning)
            labels.append(classes)
            unsure.append(~sure)
        classes = torch.cat(labels)
        for way, rows, own in zip(ways, torch.cat(unsure).unbind(1), classes.unbind(1), strict=True):
            if rows.any():
                embedding = F.normalize(embedding_from(self._model, self._site, way[rows]), dim=-1)
                own[rows] = (embedding @ self._classifier).argmax(1)
        return classes

    def _part(self, z: Tensor, spanning: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the classes of a block of vectors ``[images, steerings, d]``, and which of them are beyond doubt."""
        directions = _directions(z[:, spanning])
        amounts = torch.bmm(z, directions.mT)
        rest = torch.baddbmm(z, amounts, directions, alpha=-1).norm(dim=2)
        lengths = amounts.norm(dim=2) + rest + self._origin.norm()
        products = torch.cat([directions @ self._weights, self._shift.expand(len(z), 1, -1)], dim=1)
        logits = torch.bmm(F.pad(amounts, (0, 1), value=1.0), products)
        doubt = (rest + _ROUNDING * lengths) * self._longest
        largest, classes = logits.topk(min(2, logits.shape[2]), dim=2)
        sure = (largest[..., 1:] < (largest[..., 0] - 2 * doubt)[..., None]).all(2)  # False where a logit is NaN
        return classes[..., 0], sure


def _spanning(z: Tensor) -> list[int]:
    """Return the indices of a few steerings whose vectors span, or nearly, all vectors ``[images, steerings, d]``."""
    chosen: list[int] = []
    rest, whole = z, z.norm(dim=2).clamp_min(1e-30)
    while len(chosen) < _DIRECTIONS:
        share = (rest.norm(dim=2) / whole).mean(0)
        way = int(share.argmax())
        if not share[way] > _ROUNDING:
            break
        chosen.append(way)
        direction = F.normalize(rest[:, way, None], dim=2)
        rest = rest - torch.bmm(rest, direction.mT) * direction
    return chosen


def _directions(vectors: Tensor) -> Tensor:
    """Return orthogonal directions ``[images, m, d]`` of as many vectors: of length 1, or 0 for a dependent vector."""
    directions: list[Tensor] = []
    for vector in vectors.unbind(1):
        rest = vector
        for direction in directions:
            rest = rest - (rest * direction).sum(1, keepdim=True) * direction
        length = rest.norm(dim=1, keepdim=True)
        directions.append(torch.where(length > _ROUNDING * vector.norm(dim=1, keepdim=True), rest / length, 0.0))
    return torch.stack(directions, dim=1) if directions else vectors
