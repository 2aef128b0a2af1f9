"""The k largest numbers of each row of a matrix, with their indices."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vs2_plugin.devices import partitions_fast

__all__ = ["largest", "largest_above_zero", "quotient"]


class _Integers(NamedTuple):
    """Integer types by which floats are selected: of the size of the float (bits), and of twice that size (keys)."""

    bits: torch.dtype
    keys: torch.dtype


_INTEGERS = {
    torch.bfloat16: _Integers(torch.int16, torch.int32),
    torch.float32: _Integers(torch.int32, torch.int64),
}
_PLACE = (1 << 16) - 1  # the bits of a key that hold an index
_AT_ONCE = 1 << 22  # bytes of rows that are processed at a time, so that they stay in the CPU's cache


def largest(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of each row of ``[batch, n]``, unordered, and their indices: ``torch.topk`` in two rounds.

    The k largest lie in the k groups of largest maximum, so a top-k of n/g maxima and one of k·g candidates find
    them. With groups of g ≈ √(n/k) both are far smaller than n. On a GPU this pays only for large n.
    """
    n = rows.shape[-1]
    # Group size -> the n/k from which on it was measured to be the fastest.
    sizes = {16: 256, 8: 24, 4: 12} if rows.device.type == "cpu" else {64: 192} if n >= 1 << 16 else {}
    size = _size(sizes, n, k)
    if size == 1:
        return _topk(rows, k)
    parts = rows.unflatten(-1, (size, n // size))
    groups = _topk(parts.amax(-2), k)[1]
    candidates = parts.gather(-1, groups.unsqueeze(-2).expand(*groups.shape[:-1], size, k))
    values, chosen = _topk(candidates.flatten(-2), k)
    within = quotient(chosen, k)
    return values, groups.gather(-1, chosen - within * k).add_(within.mul_(n // size))


def _size(sizes: dict[int, int], n: int, k: int) -> int:
    """Return the group size: the first one that divides n and for which n/k is large enough; 1 if there is none."""
    for size, least in sizes.items():
        if n % size == 0 and n >= least * k:
            return size
    return 1


def _topk(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, places = rows.topk(k, dim=-1, sorted=False)
    return values, places


def largest_above_zero(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of each row of ``[batch, n]``, unordered, and their indices; if fewer than k are above 0,
    the others are arbitrary entries of the row.

    On few threads of a CPU, numpy's partition of integers is the fastest. The bits of floats that are not negative,
    read as integers, are in the order of the floats; a key holds these bits in its upper half and the index in its
    lower half.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        # Numpy's work would not be recorded.
        return largest(rows, k)
    n, size, integers = rows.shape[-1], rows.element_size(), _INTEGERS.get(rows.dtype)
    few = torch.get_num_threads() * size <= 16  # 8 threads in bfloat16, 4 in float32; with more, torch is faster
    has_data = rows.device.type == "cpu" and type(rows) is Tensor
    if integers is None or n > _PLACE + 1 or not (few and has_data and partitions_fast()):
        return largest(rows, k)
    bits = rows.detach().view(integers.bits).reshape(-1, n)
    keys = torch.empty(*rows.shape[:-1], k, dtype=integers.keys)
    at_once = max(1, _AT_ONCE // (n * size))
    for part, selected in zip(bits.split(at_once), keys.view(-1, k).split(at_once), strict=True):
        selected.copy_(_largest_keys(part, k, integers.keys))
    places = (keys & _PLACE).long()
    values = rows.gather(-1, places) if rows.requires_grad else (keys >> 8 * size).to(integers.bits).view(rows.dtype)
    return values, places


def _largest_keys(bits: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """Return the keys ``[batch, k]`` of the k largest of each row, unordered, in two rounds as :func:`largest` does."""
    upper = 1 << 8 * bits.element_size()

    def last(bits: Tensor, places: Tensor) -> Tensor:
        keys = bits.to(dtype).mul_(upper).add_(places).flatten(1)
        keys.numpy().partition(keys.shape[-1] - k)  # in place
        return keys[:, -k:]

    n = bits.shape[-1]
    size, places = _size({16: 256, 8: 32}, n, k), torch.arange(n, dtype=dtype)
    if size == 1:
        return last(bits, places)
    parts = bits.unflatten(-1, (size, n // size))
    groups = last(parts.amax(-2), places[: n // size]) & _PLACE
    candidates = parts.gather(-1, groups.long().unsqueeze(1).expand(-1, size, -1))
    return last(candidates, groups.unsqueeze(1) + places[:: n // size, None])


def quotient(places: Tensor, k: int) -> Tensor:
    """Return ``places // k`` of numbers that are not negative; if k is a power of two, in a tenth of the time."""
    return places >> (k.bit_length() - 1) if k & (k - 1) == 0 else places // k
