"""Exact search on a GPU by Triton kernels: products that are not written down, and cosines of what they single out."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vs2_plugin.sae.topk import largest

__all__ = ["GROUP", "ROWS", "candidates"]

#: Embeddings that follow each other and are singled out together; and those that a program multiplies.
GROUP, ROWS = 8, 128


@triton.jit
def _maxima(
    queries, rows, maxima, batch, count, groups, parts, width,
    QUERIES: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, INNER: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Write the largest product of each query with a group of embeddings, ``[batch, groups]``: one program per block
    of embeddings and part of the queries, those of one block beside each other. ``count`` embeddings are any."""
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
    best = tl.max(tl.reshape(products, (QUERIES, ROWS // GROUP, GROUP)), 2)
    group = block * (ROWS // GROUP) + tl.arange(0, ROWS // GROUP)
    at = line.to(tl.int64)[:, None] * groups + group[None, :]
    tl.store(maxima + at, best, mask=line[:, None] < batch)


@triton.jit
def _cosines(
    queries, rows, chosen, cosines, count, wanted, width, GROUP: tl.constexpr, TILE: tl.constexpr, INNER: tl.constexpr
):
    """Write the cosines of a query with the embeddings of some of its chosen groups, ``[batch, wanted, GROUP]``."""
    query = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * TILE + tl.arange(0, TILE)
    there = place < wanted * GROUP
    row = tl.load(chosen + query * wanted + place // GROUP, mask=there, other=0) * GROUP + place % GROUP
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
    groups, small = len(half) // GROUP, batch <= 64
    parts = triton.cdiv(batch, 64 if small else 128)
    maxima = queries.new_empty(batch, groups)
    with torch.cuda.device_of(half):
        _maxima[(parts * (len(half) // ROWS),)](
            queries.half(), half, maxima, batch, len(rows), groups, parts, width,
            QUERIES=64 if small else 128, ROWS=ROWS, GROUP=GROUP, INNER=64, EVEN=width % 64 == 0,
            num_warps=4 if small else 8, num_stages=4 if small else 3,
        )  # fmt: skip
        chosen = largest(maxima, min(wanted, groups))[1]
        places = (chosen[:, :, None] * GROUP + torch.arange(GROUP, device=half.device)).flatten(1)
        cosines = queries.new_empty(places.shape)
        _cosines[(batch, triton.cdiv(places.shape[1], 16))](
            queries, rows, chosen, cosines, len(rows), chosen.shape[1], width, GROUP=GROUP, TILE=16, INNER=256,
        )  # fmt: skip
    return cosines, places
