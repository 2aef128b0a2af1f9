"""The zero-shot classes of the same images under many steerings, by the matrix products of a few.

Strengths go along lines: what a tower's final LayerNorm makes of an image's activation, steered by any of them, lies in
a plane or nearly. So the products with projection and class embeddings are done for a few directions, and the logits
are sums of those. An image whose two best classes are closer than rounding may have moved them goes the tower's own
way. Nothing is assumed of a steering: what lies beside the directions is measured, and counts as rounding does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vs2_plugin.clip.sites import ClipModel, Site, embedding_from, pooled_from

__all__ = ["ZeroShot"]

#: Images at a time, which stay in the processor's cache.
_PART = 64
_DIRECTIONS = 4
#: Of the product of two vectors' lengths, how far their inner product may be off in float32: some ten times as much as
#: it is.
_ROUNDING = 1e-5


class ZeroShot:
    """Classifies images by a tower's end and class embeddings ``[embed_dim, classes]``, float32."""

    def __init__(self, model: ClipModel, site: Site, classifier: Tensor) -> None:
        self._model, self._site, self._classifier = model, site, classifier
        projection = None if site.token_dim is None else model.visual.proj
        #: From activations after the final LayerNorm straight to classes, ``[d, classes]``.
        self._weights = classifier if projection is None else projection.float() @ classifier
        self._longest = self._weights.norm(dim=0).max()
        #: Of an activation that is 0, the LayerNorm gives its bias, which no line goes through.
        self._origin = pooled_from(model, site, classifier.new_zeros(1, site.width))
        self._shift = self._origin @ self._weights

    def __call__(self, ways: Sequence[Tensor]) -> Tensor:
        """The classes: int64 ``[images, ways]``, of activations ``[images, d]`` at the site under each steering."""
        found, unsure, spanning = [], [], None
        for part in zip(*(way.split(_PART) for way in ways), strict=True):
            z = pooled_from(self._model, self._site, torch.stack(part, dim=1)) - self._origin
            spanning = _spanning(z) if spanning is None else spanning
            classes, sure = self._part(z, spanning)
            found.append(classes)
            unsure.append(~sure)
        classes = torch.cat(found)
        for way, rows, own in zip(ways, torch.cat(unsure).unbind(1), classes.unbind(1), strict=True):
            if rows.any():
                embedding = F.normalize(embedding_from(self._model, self._site, way[rows]), dim=-1)
                own[rows] = (embedding @ self._classifier).argmax(1)
        return classes

    def _part(self, z: Tensor, spanning: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The classes of a few images, of vectors ``[images, ways, d]``, and which of them are beyond doubt."""
        directions = _directions(z[:, spanning])
        amounts = torch.bmm(z, directions.mT)
        rest = torch.baddbmm(z, amounts, directions, alpha=-1).norm(dim=2)
        lengths = amounts.norm(dim=2) + rest + self._origin.norm()
        products = torch.cat([directions @ self._weights, self._shift.expand(len(z), 1, -1)], dim=1)
        logits = torch.bmm(F.pad(amounts, (0, 1), value=1.0), products)
        doubt = (rest + _ROUNDING * lengths) * self._longest
        largest, classes = logits.topk(min(2, logits.shape[2]), dim=2)
        sure = (largest[..., 1:] < (largest[..., 0] - 2 * doubt)[..., None]).all(2)  # not where one is no number
        return classes[..., 0], sure


def _spanning(z: Tensor) -> list[int]:
    """A few of the ways, such that the vectors ``[images, ways, d]`` of all lie between theirs, or nearly."""
    found: list[int] = []
    rest, whole = z, z.norm(dim=2).clamp_min(1e-30)
    while len(found) < _DIRECTIONS:
        share = (rest.norm(dim=2) / whole).mean(0)
        way = int(share.argmax())
        if not share[way] > _ROUNDING:
            break
        found.append(way)
        direction = F.normalize(rest[:, way, None], dim=2)
        rest = rest - torch.bmm(rest, direction.mT) * direction
    return found


def _directions(vectors: Tensor) -> Tensor:
    """Orthogonal directions ``[images, m, d]`` of as many vectors: of length 1, or 0 where one has none of its own."""
    found: list[Tensor] = []
    for vector in vectors.unbind(1):
        rest = vector
        for direction in found:
            rest = rest - (rest * direction).sum(1, keepdim=True) * direction
        length = rest.norm(dim=1, keepdim=True)
        found.append(torch.where(length > _ROUNDING * vector.norm(dim=1, keepdim=True), rest / length, 0.0))
    return torch.stack(found, dim=1) if found else vectors
