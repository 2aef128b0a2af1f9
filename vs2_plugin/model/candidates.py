"""Zero-shot classes of the same images under many steerings, for the matrix products of a few steerings.

Steerings that differ only in strength move an activation along a line, so that the outputs of the tower's final
LayerNorm lie in a plane, or nearly. The products with projection and class embeddings are therefore computed for a few
directions only, and logits are sums of these products. An image whose two best logits are closer than the possible
error is classified by the tower itself.

For moves, the directions follow from theirs, and no moved activation is computed. Of other steerings nothing is
assumed: the part of an output outside of the directions is measured, and counts as error, as rounding does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from vs2_plugin.clip.sites import ClipModel, Site, embedding_from, pooled_from, pooled_mixtures
from vs2_plugin.steering.move import Move

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
        found, spanning = [], None
        for part in zip(*(way.split(_PART) for way in ways), strict=True):
            z = self._outputs(torch.stack(part, dim=1))
            spanning = _spanning(z) if spanning is None else spanning
            found.append(self._part(z, spanning))
        return self._decided(found, lambda steering, rows: ways[steering][rows])

    @cached_property
    def mixes(self) -> bool:
        """Whether the tower's last module is a LayerNorm in float32, or nothing, as :meth:`along` supposes. It is tried
        on a few vectors."""
        d = self._site.width
        vectors = torch.randn(2, 3, d, generator=torch.Generator().manual_seed(0)).to(self._classifier)
        amounts = vectors[:, :, :3].clone()
        vectors[1] /= 1000  # so that LayerNorm's eps matters
        mixed = pooled_mixtures(self._model, self._site, vectors, amounts)
        z = self._outputs(torch.bmm(amounts, vectors))
        return mixed is not None and bool((torch.bmm(mixed[1], mixed[0]) - z).norm() <= _ROUNDING * z.norm())

    def along(self, x: Tensor, moves: Sequence[Move]) -> Tensor:
        """Return the classes, int64 ``[images, moves]``, of activations ``[images, d]`` under moves from x that keep
        its norm. The moved activations are not computed: only inner products of x and the moves' directions."""
        codes = list(dict.fromkeys(move.code for move in moves))
        lines = x.new_tensor([[1.0, *(move.strength * (move.code is code) for code in codes)] for move in moves])
        blocks = zip(x.split(_PART), *(code.direction.split(_PART) for code in codes), strict=True)
        found = [self._moved(torch.stack(block, dim=1), lines) for block in blocks]

        def steered(number: int, rows: Tensor) -> Tensor:
            move, rows = moves[number], rows.nonzero()[:, 0]
            return replace(move, code=move.code[rows]).apply(x[rows])

        return self._decided(found, steered)

    def _outputs(self, x: Tensor) -> Tensor:
        """Return the outputs of the final LayerNorm, without its bias, for activations ``[..., d]``."""
        return pooled_from(self._model, self._site, x) - self._origin

    def _part(self, z: Tensor, spanning: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the classes of a block of vectors ``[images, steerings, d]``, and which of them are beyond doubt."""
        directions = _directions(z[:, spanning])
        amounts = torch.bmm(z, directions.mT)
        rest = torch.baddbmm(z, amounts, directions, alpha=-1).norm(dim=2)
        return self._mixed(directions, amounts, rest + _ROUNDING * (amounts.norm(dim=2) + rest))

    def _moved(self, vectors: Tensor, lines: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same for mixtures ``lines`` ``[moves, m]`` of vectors ``[images, m, d]``, each mixture brought to
        the norm of the first vector."""
        amounts = lines.expand(len(vectors), -1, -1)
        amounts = amounts * (vectors[:, :1].norm(dim=2) / _norms(amounts, vectors))[..., None]
        mixed = pooled_mixtures(self._model, self._site, vectors, amounts)
        assert mixed is not None  # as mixes is True
        directions, amounts = mixed
        lengths = torch.bmm(amounts.abs(), directions.norm(dim=2, keepdim=True))[..., 0]
        cancelled = lengths / _norms(amounts, directions)  # 1, or more where vectors cancel, and less precision is left
        return self._mixed(directions, amounts, _ROUNDING * lengths * cancelled.square())

    def _mixed(self, directions: Tensor, amounts: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """Return the classes of vectors ``amounts @ directions``, and which of them are beyond doubt.

        Args:
            directions: ``[images, m, d]``.
            amounts: ``[images, steerings, m]``.
            error: bound on the length of the vectors' errors, ``[images, steerings]``.
        """
        products = torch.cat([directions @ self._weights, self._shift.expand(len(directions), 1, -1)], dim=1)
        logits = torch.bmm(F.pad(amounts, (0, 1), value=1.0), products)
        doubt = (error + _ROUNDING * self._origin.norm()) * self._longest
        largest, classes = logits.topk(min(2, logits.shape[2]), dim=2)
        sure = (largest[..., 1:] < (largest[..., 0] - 2 * doubt)[..., None]).all(2)  # False where a logit is NaN
        return classes[..., 0], sure

    def _decided(self, found: Sequence[tuple[Tensor, Tensor]], steered: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Return the classes found in blocks of images, those in doubt replaced by the tower's own; ``steered`` returns
        the activations of some rows, bool ``[images]``, under the steering of a number."""
        classes, sure = (torch.cat(parts) for parts in zip(*found, strict=True))
        for number, (rows, own) in enumerate(zip((~sure).unbind(1), classes.unbind(1), strict=True)):
            if rows.any():
                embedding = F.normalize(embedding_from(self._model, self._site, steered(number, rows)), dim=-1)
                own[rows] = (embedding @ self._classifier).argmax(1)
        return classes


def _norms(amounts: Tensor, vectors: Tensor) -> Tensor:
    """Return the norms of mixtures ``[images, mixtures, m]`` of vectors ``[images, m, d]``."""
    return (torch.bmm(amounts, torch.bmm(vectors, vectors.mT)) * amounts).sum(2).sqrt()


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
