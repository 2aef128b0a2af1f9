"""Search on a GPU by Triton kernels: products of 8-bit integers, which are not stored, single out groups of embeddings,
and the cosines of these groups are computed in float32."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vs2_plugin.selection import largest

__all__ = ["Rounded"]

#: Embeddings of a block, which one program multiplies, and of a group, which are singled out together. The members of
#: a group are ``_GROUPS`` rows apart, so that one thread has the products of all of them.
_ROWS, _GROUP = 128, 8
_GROUPS = _ROWS // _GROUP
_AT_ONCE = 1 << 16  # embeddings that are rounded at a time


@triton.jit
def _maxima(
    queries, query_units, rows, row_units, maxima, tops, batch, count, blocks, parts, width,
    QUERIES: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, INNER: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Write the largest product of each query with each group of embeddings, ``[batch, blocks, groups]``, and with each
    block, ``[blocks, batch]``. One program serves a block of embeddings and a part of the queries; programs of a block
    are neighbours. Queries and embeddings are integers in units of their own; rows from ``count`` on are padding."""
    program = tl.program_id(0)
    block = (program // parts).to(tl.int64)
    line = (program % parts) * QUERIES + tl.arange(0, QUERIES)
    row = block * ROWS + tl.arange(0, ROWS)
    inner = tl.arange(0, INNER)
    left = queries + line[:, None] * width + inner[None, :]
    right = rows + row[:, None] * width + inner[None, :]
    products = tl.zeros((QUERIES, ROWS), tl.int32)
    for start in range(0, width, INNER):
        inside = inner[None, :] < width - start
        if EVEN:
            query_tile = tl.load(left + start, mask=line[:, None] < batch, other=0)
            row_tile = tl.load(right + start)
        else:
            query_tile = tl.load(left + start, mask=(line[:, None] < batch) & inside, other=0)
            row_tile = tl.load(right + start, mask=inside, other=0)
        products = tl.dot(query_tile, tl.trans(row_tile), products, out_dtype=tl.int32)
    scaled = products.to(tl.float32) * tl.load(row_units + row)[None, :]
    scaled = tl.where(row[None, :] < count, scaled, float("-inf"))
    best = tl.max(tl.reshape(scaled, (QUERIES, GROUP, ROWS // GROUP)), 1)
    best *= tl.load(query_units + line, mask=line < batch, other=1.0)[:, None]
    group = block * (ROWS // GROUP) + tl.arange(0, ROWS // GROUP)
    at = line.to(tl.int64)[:, None] * blocks * (ROWS // GROUP) + group[None, :]
    tl.store(maxima + at, best.to(maxima.dtype.element_ty), mask=line[:, None] < batch)
    tl.store(tops + block * batch + line, tl.max(best, 1).to(tops.dtype.element_ty), mask=line < batch)


@triton.jit
def _cosines(
    queries, rows, chosen, cosines, count, wanted, width,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, TILE: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Write the cosines of a query with ``TILE`` members of its chosen groups, into ``[batch, wanted, GROUP]``;
    ``chosen`` holds the first row of each group."""
    query = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * TILE + tl.arange(0, TILE)
    valid = place < wanted * GROUP
    row = tl.load(chosen + query * wanted + place // GROUP, mask=valid, other=0) + place % GROUP * GROUPS
    products, squares = tl.zeros((TILE,), tl.float32), tl.zeros((TILE,), tl.float32)
    for start in range(0, width, INNER):
        inner = start + tl.arange(0, INNER)
        inside = inner < width
        q = tl.load(queries + query * width + inner, mask=inside, other=0.0)
        at = row[:, None] * width + inner[None, :]
        block = tl.load(rows + at, mask=(row < count)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        products += tl.sum(block * q[None, :], 1)
        squares += tl.sum(block * block, 1)
    cosine = products / tl.maximum(tl.sqrt(squares), 1e-12)
    tl.store(cosines + query * wanted * GROUP + place, tl.where(row < count, cosine, float("-inf")), mask=valid)


class Rounded:
    """Embeddings as 8-bit integers, among which those of largest cosine with a query are found.

    First the mean embedding is subtracted, which changes all cosines of a query by the same amount. Then the embeddings
    are rotated at random, so that no coordinate is much larger than the others: CLIP's embeddings have a few large
    coordinates, beside which the others would be rounded to zero. Each embedding has its own unit.

    Args:
        rows: the embeddings, ``[count, e]``, on a GPU.
    """

    def __init__(self, rows: Tensor) -> None:
        count, width = rows.shape
        padded = triton.cdiv(count, _ROWS) * _ROWS
        rotation = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0)))[0]
        self._stored, self._rotation = rows, rotation.to(rows.device)
        self._rows = torch.zeros(padded, width, dtype=torch.int8, device=rows.device)
        self._units = torch.zeros(padded, device=rows.device)
        #: Row offsets of the first member of each group within a block, and of a group's members from its first one.
        self._groups = torch.arange(_GROUPS, device=rows.device)
        self._members = torch.arange(0, _ROWS, _GROUPS, device=rows.device)
        parts = rows.split(_AT_ONCE)
        mean = torch.stack([F.normalize(part.float(), dim=-1).sum(0) for part in parts]).sum(0) / count
        for number, part in enumerate(parts):
            within = slice(number * _AT_ONCE, number * _AT_ONCE + len(part))
            self._rows[within], self._units[within] = self._round(F.normalize(part.float(), dim=-1) - mean)

    def _round(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Return rotated embeddings as 8-bit integers ``[count, e]``, and their units ``[count]``."""
        rotated = embeddings @ self._rotation
        units = torch.linalg.vector_norm(rotated, torch.inf, dim=1).clamp_min(1e-12) / 127
        return (rotated / units[:, None]).round().to(torch.int8), units

    def __call__(self, queries: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
        """See :data:`vs2_plugin.gallery.search.Candidates`."""
        batch, width = queries.shape
        blocks, small = len(self._rows) // _ROWS, batch <= 64
        parts = triton.cdiv(batch, 64 if small else 128)
        maxima = queries.new_empty(batch, blocks, _GROUPS, dtype=torch.float16)
        tops = maxima.new_empty(blocks, batch)
        count = len(self._stored)
        with torch.cuda.device_of(queries):
            rounded, units = self._round(queries)
            _maxima[(parts * blocks,)](
                rounded, units, self._rows, self._units, maxima, tops, batch, count, blocks, parts, width,
                QUERIES=64 if small else 128, ROWS=_ROWS, GROUP=_GROUP, INNER=128, EVEN=width % 128 == 0,
                num_warps=4 if small else 8, num_stages=4 if small else 3,
            )  # fmt: skip
            chosen = self._first_of(maxima, tops, wanted)
            places = (chosen[:, :, None] + self._members).flatten(1)
            cosines = queries.new_empty(places.shape)
            _cosines[(batch, triton.cdiv(places.shape[1], 16))](
                queries, self._stored, chosen, cosines, count, chosen.shape[1], width,
                GROUP=_GROUP, GROUPS=_GROUPS, TILE=16, INNER=256,
            )  # fmt: skip
        return cosines, places

    def _first_of(self, maxima: Tensor, tops: Tensor, wanted: int) -> Tensor:
        """Return the first row of each of the ``wanted`` groups with the largest maxima, or of all groups. They lie
        in the ``wanted`` blocks with the largest maxima."""
        blocks = largest(tops.T.contiguous(), min(wanted, len(tops)))[1][:, :, None]
        groups = maxima.gather(1, blocks.expand(-1, -1, _GROUPS)).flatten(1)
        chosen = largest(groups, min(wanted, groups.shape[1]))[1]
        return torch.add(self._groups, blocks, alpha=_ROWS).flatten(1).gather(1, chosen)
