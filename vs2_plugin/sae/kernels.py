"""Triton kernels of the training step on a GPU, in the order of their use; see :mod:`vs2_plugin.sae.gpu`.

Sums over many programs are sums of integers, or of parts that are added in a fixed order: the same bits each time.
"""

import triton
import triton.language as tl

__all__ = ["BETA1", "BETA2", "centre", "explain", "largest", "parts_of_base", "spread", "update"]

BETA1, BETA2, EPS = tl.constexpr(0.9), tl.constexpr(0.999), tl.constexpr(1e-8)  # of Adam: torch's defaults
_LEAST = tl.constexpr(-(2**31))
#: Derivatives are summed as integers, in units of _UNIT · (root of the mean squared norm) / variance, and clipped at
#: ± _MOST units. A sum of 4,096 derivatives of 16,000 such norms each fits into 64 bits; a derivative is at most twice
#: an activation's norm.
_UNIT, _MOST = tl.constexpr(2.0**-36), tl.constexpr(2.0**50)


@triton.jit
def centre(
    x, b_dec, rounded, parts, codes, indices, batch, n, d, k, ROWS: tl.constexpr, D: tl.constexpr, K: tl.constexpr
):
    """Write ``x - b_dec`` in half precision to ``rounded``, and to ``parts`` ``[programs, d + 2]`` the sum of each ROWS
    of these, the sum of their squares, and their number. Set to 0 what the step before wrote to ``codes``."""
    program = tl.program_id(0)
    columns, slots = tl.arange(0, D), tl.arange(0, K)
    base = tl.load(b_dec + columns, mask=columns < d, other=0.0)
    sums, squares = tl.zeros((D,), tl.float32), tl.zeros((D,), tl.float32)
    for number in tl.static_range(ROWS):
        row = (program * ROWS + number).to(tl.int64)
        inside = (columns < d) & (row < batch)
        centered = tl.where(inside, tl.load(x + row * d + columns, mask=inside, other=0.0) - base, 0.0)
        tl.store(rounded + row * d + columns, centered.to(rounded.dtype.element_ty), mask=inside)
        sums += centered
        squares += centered * centered
        filled = (slots < k) & (row < batch)
        latent = tl.load(indices + row * k + slots, mask=filled, other=0)
        tl.store(codes + row * n + latent, tl.zeros((K,), codes.dtype.element_ty), mask=filled)
    parts += program * (d + 2)
    tl.store(parts + columns, sums, mask=columns < d)
    tl.store(parts + d, tl.sum(squares, 0))
    tl.store(parts + d + 1, tl.minimum(ROWS, batch - program * ROWS).to(tl.float32))


@triton.jit
def _keys(bits, BITS: tl.constexpr, ABS: tl.constexpr):
    """Return integers that are ordered as the floating-point numbers with these bits, or as their magnitudes."""
    keys = bits.to(tl.int32)
    return keys & ((1 << (BITS - 1)) - 1) if ABS else keys ^ ((keys >> 31) & ((1 << (BITS - 1)) - 1))


@triton.jit
def _kth(keys, k, BITS: tl.constexpr):
    """Return the k-th largest of the keys, which is found bit by bit."""
    kth = tl.where(tl.sum((keys >= 0).to(tl.int32), 0) >= k, 0, -(1 << (BITS - 1)))
    for bit in tl.static_range(1, BITS):
        tried = kth + (1 << (BITS - 1 - bit))
        kth = tl.where(tl.sum((keys >= tried).to(tl.int32), 0) >= k, tried, kth)
    return kth


@triton.jit
def _places(keys, k, BITS: tl.constexpr):
    """Return each key's place in a list of the k largest, and which keys are among the k largest."""
    least = _kth(keys, k, BITS)
    above, equal = (keys > least).to(tl.int32), (keys == least).to(tl.int32)
    place = tl.where(above > 0, tl.cumsum(above, 0), tl.sum(above, 0) + tl.cumsum(equal, 0)) - 1
    return place, ((above > 0) | (equal > 0)) & (place < k)


@triton.jit
def largest(
    rows, bits, maxima, chosen, indices, values, codes, n, groups, k,
    SIZE: tl.constexpr, GROUPS: tl.constexpr, TILE: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr,
    ABS: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """Write the places of the k largest of each row of n numbers to ``indices`` ``[batch, k]``, and the numbers to
    ``values`` ``[batch, k]`` and to the same places of ``codes`` ``[batch, n]``; one program per row.

    The k largest lie in the k groups of SIZE numbers each whose maxima are largest. ``maxima`` ``[batch, groups]`` and
    ``chosen`` ``[batch, k]`` are scratch memory; ``bits`` are ``rows`` viewed as integers."""
    row = tl.program_id(0).to(tl.int64)
    rows, bits, codes = rows + row * n, bits + row * n, codes + row * n
    indices, values, chosen, maxima = indices + row * k, values + row * k, chosen + row * k, maxima + row * groups
    inner = tl.arange(0, SIZE)
    for start in range(0, groups, TILE):
        group = start + tl.arange(0, TILE)
        at = group[:, None] * SIZE + inner[None, :]
        keys = tl.where(at < n, _keys(tl.load(bits + at, mask=at < n, other=0), BITS, ABS), _LEAST)
        tl.store(maxima + group, tl.max(keys, 1).to(maxima.dtype.element_ty), mask=group < groups)
    tl.debug_barrier()  # makes the writes of each thread visible to all
    group = tl.arange(0, GROUPS)
    best = tl.load(maxima + group, mask=group < groups, other=0).to(tl.int32)
    place, taken = _places(tl.where(group < groups, best, _LEAST), k, BITS)
    tl.store(chosen + place, group, mask=taken)
    tl.debug_barrier()
    slots = tl.arange(0, K)
    group = tl.load(chosen + slots, mask=slots < k, other=groups)
    at = tl.reshape(group[:, None] * SIZE + inner[None, :], (K * SIZE,))
    keys = tl.where(at < n, _keys(tl.load(bits + at, mask=at < n, other=0), BITS, ABS), _LEAST)
    place, taken = _places(keys, k, BITS)
    value = tl.load(rows + at, mask=taken, other=0.0)
    if RELU:
        value = tl.maximum(value, 0.0)
    tl.store(indices + place, at.to(tl.int64), mask=taken)
    tl.store(values + place, value.to(tl.float32), mask=taken)
    tl.store(codes + at, value, mask=taken)


@triton.jit
def explain(
    x, b_dec, decoder, values, indices, moments, variance, to_output, to_values, d, k,
    D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """With ``r = x - b_dec - W_decᵀ c``, write ``-2 r / variance`` to ``to_output`` ``[batch, d]``, and its inner
    products with the active latents' rows of the decoder to ``to_values`` ``[batch, k]``; one program per activation.
    The variance ``Σ‖x - batch mean‖²`` is computed from ``moments`` ``[d + 2]`` (the sum of all ``x - b_dec``, the sum
    of their squares, their number), and written too."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, D)
    inside = columns < d
    sums = tl.load(moments + columns, mask=inside, other=0.0)
    total = tl.load(moments + d) - tl.sum(sums * sums, 0) / tl.load(moments + d + 1)
    if row == 0:
        tl.store(variance, total)
    residual = tl.load(x + row * d + columns, mask=inside, other=0.0)
    residual -= tl.load(b_dec + columns, mask=inside, other=0.0)
    for start in range(0, k, TILE):
        slots = start + tl.arange(0, TILE)
        value = tl.load(values + row * k + slots, mask=slots < k, other=0.0)
        latent = tl.load(indices + row * k + slots, mask=slots < k, other=0)
        at = latent[:, None] * d + columns[None, :]
        block = tl.load(decoder + at, mask=(slots < k)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        residual -= tl.sum(block * value[:, None], 0)
    slope = residual * (-2 / total)
    tl.store(to_output + row * d + columns, slope.to(to_output.dtype.element_ty), mask=inside)
    for start in range(0, k, TILE):
        slots = start + tl.arange(0, TILE)
        latent = tl.load(indices + row * k + slots, mask=slots < k, other=0)
        at = latent[:, None] * d + columns[None, :]
        block = tl.load(decoder + at, mask=(slots < k)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        tl.store(to_values + row * k + slots, tl.sum(block * slope[None, :], 1), mask=slots < k)


@triton.jit
def _unit(moments, variance, d):
    """Return the unit in which derivatives are summed as integers."""
    norm = tl.sqrt(tl.load(moments + d) / tl.load(moments + d + 1))
    return tl.maximum(norm, 1e-30) / tl.load(variance) * _UNIT


@triton.jit
def spread(
    values, indices, to_values, codes, sums, active, moments, variance, n, d, k, RELU: tl.constexpr, K: tl.constexpr
):
    """Write the derivatives by the active latents' values to the latents' places of ``codes``, sum them by latent in
    ``sums``, int64, and mark the latents that are ``active``, int32; one program per activation."""
    row = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, K)
    filled = slots < k
    value = tl.load(values + row * k + slots, mask=filled, other=0.0)
    latent = tl.load(indices + row * k + slots, mask=filled, other=0)
    slope = tl.load(to_values + row * k + slots, mask=filled, other=0.0)
    if RELU:
        slope = tl.where(value > 0, slope, 0.0)
    tl.store(codes + row * n + latent, slope.to(codes.dtype.element_ty), mask=filled)
    scaled = tl.minimum(tl.maximum(slope / _unit(moments, variance, d), -_MOST), _MOST)
    tl.atomic_add(sums + latent, scaled.to(tl.int64), mask=filled)
    tl.store(active + latent, tl.full((K,), 1, tl.int32), mask=filled & (value != 0))


@triton.jit
def parts_of_base(
    sums, moments, variance, bias_gradient, encoder, to_output, parts, n, d, batch, blocks,
    ROWS: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Write the share of ROWS activations or latents in the derivative by ``b_dec`` to ``parts`` ``[programs, d]``.

    ``b_dec`` is added to the output, and subtracted from the encoder's input. The first ``blocks`` programs have the
    latents; they also convert ``sums``, the derivatives by the latents' biases, to floats in ``bias_gradient``."""
    program = tl.program_id(0)
    columns = tl.arange(0, D)
    inside = columns < d
    total = tl.zeros((D,), tl.float32)
    for start in tl.static_range(0, ROWS, TILE):
        if program < blocks:
            row = (program * ROWS + start + tl.arange(0, TILE)).to(tl.int64)
            gradient = tl.load(sums + row, mask=row < n, other=0).to(tl.float32) * _unit(moments, variance, d)
            tl.store(bias_gradient + row, gradient, mask=row < n)
            filled = (row < n)[:, None] & inside[None, :]
            block = tl.load(encoder + row[:, None] * d + columns[None, :], mask=filled, other=0.0).to(tl.float32)
            total -= tl.sum(block * gradient[:, None], 0)
        else:
            row = ((program - blocks) * ROWS + start + tl.arange(0, TILE)).to(tl.int64)
            filled = (row < batch)[:, None] & inside[None, :]
            block = tl.load(to_output + row[:, None] * d + columns[None, :], mask=filled, other=0.0).to(tl.float32)
            total += tl.sum(block, 0)
    tl.store(parts + program * d + columns, total, mask=inside)


@triton.jit
def _adam(parameter, gradient, mean, square, at, inside, size, root):
    """Return elements of a parameter after a step of Adam, and write their moments."""
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
    decoder, encoder, bias, sums, active, silent, rates, n, d, BIASED: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Update a latent's rows of decoder and encoder and its bias by Adam, and count for how many steps the latent has
    been silent; the last of n + 1 programs updates ``b_dec``. Set ``sums`` and ``active`` to 0 for the next step."""
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
        tl.store(decoder + at, w.to(decoder.dtype.element_ty), mask=inside)
        w = tl.load(W_enc + at, mask=inside, other=0.0)
        gradient = tl.load(enc_gradient + at, mask=inside, other=0.0)
        w = _adam(w, gradient, enc_mean, enc_square, at, inside, size, root)
        tl.store(W_enc + at, w, mask=inside)
        tl.store(encoder + at, w.to(encoder.dtype.element_ty), mask=inside)
        if BIASED:
            first_column = columns == 0
            spot = latent + columns
            b = tl.load(b_enc + spot, mask=first_column, other=0.0)
            gradient = tl.load(bias_gradient + spot, mask=first_column, other=0.0)
            b = _adam(b, gradient, bias_mean, bias_square, spot, first_column, size, root)
            tl.store(b_enc + spot, b, mask=first_column)
            tl.store(bias + spot, b.to(bias.dtype.element_ty), mask=first_column)
        steps = tl.load(silent + latent) + 1
        tl.store(silent + latent, tl.where(tl.load(active + latent) > 0, 0, steps))
        tl.store(active + latent, 0)
        tl.store(sums + latent, tl.zeros((), tl.int64))
