"""Triton kernels of the training step on a GPU; :mod:`vs2_plugin.sae.gpu` says what for."""

import triton
import triton.language as tl

__all__ = ["BETA1", "BETA2", "explain", "largest", "update"]

BETA1, BETA2, EPS = tl.constexpr(0.9), tl.constexpr(0.999), tl.constexpr(1e-8)  # of Adam: torch's defaults
_LEAST = tl.constexpr(-(2**31))


@triton.jit
def _chunk(bits, start, n, GROUPS: tl.constexpr, BITS: tl.constexpr, EVEN: tl.constexpr):
    """Part of a row, as keys: integers in the order of the floating-point numbers with these bits."""
    at = start + tl.arange(0, GROUPS)
    keys = tl.load(bits + at, mask=None if EVEN else at < n, other=None if EVEN else 0).to(tl.int32)
    keys ^= (keys >> 31) & ((1 << (BITS - 1)) - 1)
    if not EVEN:
        keys = tl.where(at < n, keys, _LEAST)
    return keys


@triton.jit
def _kth(keys, k, BITS: tl.constexpr):
    """The k-th largest of some keys, bit by bit."""
    found = tl.where(tl.sum((keys >= 0).to(tl.int32), 0) >= k, 0, -(1 << (BITS - 1)))
    for bit in tl.static_range(1, BITS):
        tried = found + (1 << (BITS - 1 - bit))
        found = tl.where(tl.sum((keys >= tried).to(tl.int32), 0) >= k, tried, found)
    return found


@triton.jit
def _kth_of_row(bits, n, k, GROUPS: tl.constexpr, BITS: tl.constexpr, EVEN: tl.constexpr):
    """The k-th largest key of a whole row: as many passes over it as a key has bits."""
    found = tl.full((), -(1 << (BITS - 1)), tl.int64)
    for bit in range(BITS):
        tried = found + (tl.full((), 1, tl.int64) << (BITS - 1 - bit))
        count = 0
        for start in range(0, n, GROUPS):
            count += tl.sum((_chunk(bits, start, n, GROUPS, BITS, EVEN) >= tried).to(tl.int32), 0)
        found = tl.where(count >= k, tried, found)
    return found.to(tl.int32)


@triton.jit
def _collect(
    bits, places, least, n, GROUPS: tl.constexpr, CANDIDATES: tl.constexpr, BITS: tl.constexpr, EVEN: tl.constexpr
):
    """Write where a row's keys are larger than the given one, and return how many are; of too many, not all."""
    count = 0
    for start in range(0, n, GROUPS):
        larger = (_chunk(bits, start, n, GROUPS, BITS, EVEN) > least).to(tl.int32)
        found = tl.sum(larger, 0)
        if found > 0:
            at = count + tl.cumsum(larger, 0) - 1
            tl.store(places + at, start + tl.arange(0, GROUPS), mask=(larger > 0) & (at < CANDIDATES))
        count += found
    tl.debug_barrier()  # all threads see what each wrote
    return count


@triton.jit
def largest(
    rows, indices, places, n, k, GROUPS: tl.constexpr, CANDIDATES: tl.constexpr, BITS: tl.constexpr, EVEN: tl.constexpr
):
    """Write where the k largest of a row of n numbers are, given their bits: ``indices`` ``[batch, k]``; one program
    per row. ``places`` ``[batch, CANDIDATES]`` is room to work in."""
    row = tl.program_id(0).to(tl.int64)
    bits = rows + row * n
    indices += row * k
    places += row * CANDIDATES
    maxima = _chunk(bits, 0, n, GROUPS, BITS, EVEN)
    for start in range(GROUPS, n, GROUPS):
        maxima = tl.maximum(maxima, _chunk(bits, start, n, GROUPS, BITS, EVEN))
    least = _kth(maxima, k, BITS)
    count = _collect(bits, places, least, n, GROUPS, CANDIDATES, BITS, EVEN)
    if count > CANDIDATES:  # too many in the same few groups
        least = _kth_of_row(bits, n, k, GROUPS, BITS, EVEN)
        count = _collect(bits, places, least, n, GROUPS, CANDIDATES, BITS, EVEN)
    slots = tl.arange(0, CANDIDATES)
    place = tl.load(places + slots, mask=slots < count, other=0)
    keys = tl.load(bits + place, mask=slots < count, other=0).to(tl.int32)
    keys ^= (keys >> 31) & ((1 << (BITS - 1)) - 1)
    keys = tl.where(slots < count, keys, _LEAST)
    if count > k:
        least = _kth(keys, k, BITS)
    above = (slots < count) & (keys > least)
    at = tl.cumsum(above.to(tl.int32), 0) - 1
    tl.store(indices + at, place.to(tl.int64), mask=above)
    taken = tl.sum(above.to(tl.int32), 0)
    start = 0
    while (taken < k) & (start < n):  # the rest are equal to the k-th largest
        columns = start + tl.arange(0, GROUPS)
        equal = ((_chunk(bits, start, n, GROUPS, BITS, EVEN) == least) & (columns < n)).to(tl.int32)
        slot = taken + tl.cumsum(equal, 0) - 1
        tl.store(indices + slot, columns.to(tl.int64), mask=(equal > 0) & (slot < k))
        taken += tl.sum(equal, 0)
        start += GROUPS


@triton.jit
def explain(
    centered, decoder, values, indices, variance, to_output, to_values, d, k, D: tl.constexpr, TILE: tl.constexpr
):
    """With ``r = centered - W_decᵀ c``, write ``-2 r / variance`` ``[batch, d]`` and its inner products with the active
    rows of the decoder, ``[batch, k]``; one program per activation."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, D)
    inside = columns < d
    residual = tl.load(centered + row * d + columns, mask=inside, other=0.0)
    for start in range(0, k, TILE):
        slots = start + tl.arange(0, TILE)
        value = tl.load(values + row * k + slots, mask=slots < k, other=0.0)
        latent = tl.load(indices + row * k + slots, mask=slots < k, other=0)
        at = latent[:, None] * d + columns[None, :]
        block = tl.load(decoder + at, mask=(slots < k)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        residual -= tl.sum(block * value[:, None], 0)
    slope = residual * (-2 / tl.load(variance))
    tl.store(to_output + row * d + columns, slope.to(tl.bfloat16), mask=inside)
    for start in range(0, k, TILE):
        slots = start + tl.arange(0, TILE)
        latent = tl.load(indices + row * k + slots, mask=slots < k, other=0)
        at = latent[:, None] * d + columns[None, :]
        block = tl.load(decoder + at, mask=(slots < k)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        tl.store(to_values + row * k + slots, tl.sum(block * slope[None, :], 1), mask=slots < k)


@triton.jit
def _adam(parameter, gradient, mean, square, at, inside, size, root):
    """The next value of some elements of a parameter; their moments are written."""
    first = tl.load(mean + at, mask=inside, other=0.0)
    second = tl.load(square + at, mask=inside, other=0.0)
    first += (gradient - first) * (1 - BETA1)
    second = second * BETA2 + gradient * gradient * (1 - BETA2)
    tl.store(mean + at, first, mask=inside)
    tl.store(square + at, second, mask=inside)
    return parameter - size * first / (tl.sqrt(second) * root + EPS)


@triton.jit
def update(
    W_dec, dec_gradient, dec_mean, dec_square,
    W_enc, enc_gradient, enc_mean, enc_square,
    b_enc, bias_gradient, bias_mean, bias_square,
    b_dec, base_gradient, base_mean, base_square,
    decoder, encoder, rates, n, d, BIASED: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Update by Adam a latent's rows of decoder and encoder, and its bias; the last of n + 1 programs: ``b_dec``."""
    latent = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, D)
    inside = columns < d
    size, root = tl.load(rates), tl.load(rates + 1)
    if latent == n:  # the last program has the decoder's bias
        gradient = tl.load(base_gradient + columns, mask=inside, other=0.0)
        b = tl.load(b_dec + columns, mask=inside, other=0.0)
        tl.store(b_dec + columns, _adam(b, gradient, base_mean, base_square, columns, inside, size, root), mask=inside)
    else:
        at = latent * d + columns
        w = tl.load(W_dec + at, mask=inside, other=0.0)
        gradient = tl.load(dec_gradient + at, mask=inside, other=0.0)
        gradient -= tl.sum(gradient * w, 0) * w
        w = tl.where(inside, _adam(w, gradient, dec_mean, dec_square, at, inside, size, root), 0.0)
        w /= tl.maximum(tl.sqrt(tl.sum(w * w, 0)), 1e-38)
        tl.store(W_dec + at, w, mask=inside)
        tl.store(decoder + at, w.to(tl.bfloat16), mask=inside)
        w = tl.load(W_enc + at, mask=inside, other=0.0)
        gradient = tl.load(enc_gradient + at, mask=inside, other=0.0)
        w = _adam(w, gradient, enc_mean, enc_square, at, inside, size, root)
        tl.store(W_enc + at, w, mask=inside)
        tl.store(encoder + at, w.to(tl.bfloat16), mask=inside)
        if BIASED:
            one = columns == 0
            spot = latent + columns
            b = tl.load(b_enc + spot, mask=one, other=0.0)
            gradient = tl.load(bias_gradient + spot, mask=one, other=0.0)
            tl.store(b_enc + spot, _adam(b, gradient, bias_mean, bias_square, spot, one, size, root), mask=one)
