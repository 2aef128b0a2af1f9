"""Exact search on a GPU by Triton kernels: products that are not written down, and cosines of what they single out."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vs2_plugin.sae.topk import largest

__all__ = ["ROWS", "candidates"]

#: Embeddings that a program multiplies; and those of them that are singled out together, each so many after the last
#: that one thread has the products of all.
ROWS, GROUP = 128, 8
_GROUPS = ROWS // GROUP


@triton.jit
def _maxima(
    queries, rows, maxima, tops, batch, count, blocks, parts, width,
    QUERIES: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, INNER: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Write the largest product of each query with a group of embeddings, ``[batch, blocks, groups]``, and with a
    block, ``[blocks, batch]``: one program per block of embeddings and part of the queries, those of one block beside
    each other. ``count`` embeddings are any."""
    program = tl.program_id(0)
    block = (program // parts).to(tl.int64)
    line = (program % parts) * QUERIES + tl.arange(0, QUERIES)
    row = block * ROWS + tl.arange(0, ROWS)
    inner = tl.arange(0, INNER)
    left = queries + line[:, None] * width + inner[None, :]
    right = rows + row[:, None] * width + inner[None, :]
    products = tl.zeros((QUERIES, ROWS), tl.float32)
    for start in range(0, width, INNER):
        inside = inner[None, :] < width - start
        if EVEN:
            one = tl.load(left + start, mask=line[:, None] < batch, other=0.0)
            other = tl.load(right + start)
        else:
            one = tl.load(left + start, mask=(line[:, None] < batch) & inside, other=0.0)
            other = tl.load(right + start, mask=inside, other=0.0)
        products = tl.dot(one, tl.trans(other), products)
    products = tl.where(row[None, :] < count, products, float("-inf"))
    best = tl.max(tl.reshape(products, (QUERIES, GROUP, ROWS // GROUP)), 1)
    group = block * (ROWS // GROUP) + tl.arange(0, ROWS // GROUP)
    at = line.to(tl.int64)[:, None] * blocks * (ROWS // GROUP) + group[None, :]
    tl.store(maxima + at, best, mask=line[:, None] < batch)
    tl.store(tops + block * batch + line, tl.max(best, 1), mask=line < batch)


@triton.jit
def _cosines(
    queries, rows, chosen, cosines, count, wanted, width,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, TILE: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Write the cosines of a query with the embeddings of some of its chosen groups, ``[batch, wanted, GROUP]``. What
    is chosen is the first of each."""
    query = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * TILE + tl.arange(0, TILE)
    there = place < wanted * GROUP
    row = tl.load(chosen + query * wanted + place // GROUP, mask=there, other=0) + place % GROUP * GROUPS
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
    tl.store(cosines + query * wanted * GROUP + place, tl.where(row < count, cosine, float("-inf")), mask=there)


def candidates(queries: Tensor, half: Tensor, rows: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
    """The embeddings among which are those of the ``wanted`` largest products of half-precision numbers: their cosines,
    float32 and -inf beyond the last embedding, and their row numbers, ``[batch, m]`` each.

    Args:
        queries: ``[batch, e]``, float32, of unit norm.
        half: the embeddings, half precision, of unit norm: ``[padded, e]``, a multiple of :data:`ROWS`.
        rows: the same as they are stored, without padding.
        wanted: how many, at least.
    """
    batch, width = queries.shape
    blocks, small = len(half) // ROWS, batch <= 64
    parts = triton.cdiv(batch, 64 if small else 128)
    maxima, tops = queries.new_empty(batch, blocks, _GROUPS), queries.new_empty(blocks, batch)
    with torch.cuda.device_of(half):
        _maxima[(parts * blocks,)](
            queries.half(), half, maxima, tops, batch, len(rows), blocks, parts, width,
            QUERIES=64 if small else 128, ROWS=ROWS, GROUP=GROUP, INNER=64, EVEN=width % 64 == 0,
            num_warps=4 if small else 8, num_stages=4 if small else 3,
        )  # fmt: skip
        chosen = _first_of(maxima, tops, wanted)
        places = (chosen[:, :, None] + _GROUPS * torch.arange(GROUP, device=half.device)).flatten(1)
        cosines = queries.new_empty(places.shape)
        _cosines[(batch, triton.cdiv(places.shape[1], 16))](
            queries, rows, chosen, cosines, len(rows), chosen.shape[1], width,
            GROUP=GROUP, GROUPS=_GROUPS, TILE=16, INNER=256,
        )  # fmt: skip
    return cosines, places


def _first_of(maxima: Tensor, tops: Tensor, wanted: int) -> Tensor:
    """The first embedding of each of the ``wanted`` groups of largest maxima, or of all: they are in as many blocks of
    largest maxima."""
    blocks = largest(tops.T.contiguous(), min(wanted, len(tops)))[1]
    groups = maxima.gather(1, blocks[:, :, None].expand(-1, -1, _GROUPS)).flatten(1)
    chosen = largest(groups, min(wanted, groups.shape[1]))[1]
    return blocks.gather(1, chosen // _GROUPS) * ROWS + chosen % _GROUPS
