"""The training step on a GPU: matrix products in bfloat16, and Triton kernels for the work between them.

A GPU multiplies matrices so fast that the rest takes most of a step: selecting the active latents, reading their rows
of the decoder, and passes over batch, codes and weights. So six kernels share as many of these passes as they can.
Matrix products are left to torch: the pre-activations, and the gradients of the weights from dense codes.

The mathematics are those of :mod:`vs2_plugin.sae.step`. Weights, moments, gradients and sums are float32; the factors
of products (activations, weights, codes) are rounded to bfloat16. The same step gives the same bits each time.
"""

from __future__ import annotations

from functools import partial
from math import isqrt

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from vs2_plugin.devices import Replayed
from vs2_plugin.distributed import alone, total
from vs2_plugin.sae import kernels
from vs2_plugin.sae.step import ClassMeans, gradient_of
from vs2_plugin.sae.topk import Latents, TopKSAE

__all__ = ["GpuStep", "select"]

#: The dtype of the factors of matrix products.
_HALF = torch.bfloat16
#: Activations, or latents, that one program sums; and numbers of a row that one program loads at a time.
_SUMMED, _LOOKED_AT = 16, 2048
#: The smallest number of dead latents that AuxK is computed for; the list is filled up to it.
_FEWEST = 128


class GpuStep:
    """The training steps of an SAE on a GPU.

    The moments are kept in ``optimizer``, whose own ``step`` is not called. A copy of the weights in bfloat16 is
    updated with each step: code that changes the weights by other means has to call :meth:`read_weights`.

    Args:
        silent: for how many steps each latent has not been active, int64 ``[n]``; updated by each step.
        scale: activations are divided by this.

    Raises:
        RuntimeError: the GPU has no units for bfloat16. Triton's own errors pass through where it cannot compile.
    """

    def __init__(self, sae: TopKSAE, optimizer: torch.optim.Adam, silent: Tensor, scale: float = 1.0) -> None:
        self._sae, self._optimizer, self._silent, self._scale = sae, optimizer, silent, scale
        self._rates = sae.b_dec.detach().new_zeros(2)
        if torch.cuda.get_device_capability(sae.b_dec.device) < (8, 0):
            raise RuntimeError("it has no units for bfloat16")
        self._sums = torch.zeros_like(silent)
        self._active = torch.zeros_like(silent, dtype=torch.int32)
        self._batch = self._rates.new_empty(0, 0)
        self.read_weights()
        self._take(torch.eye(2, sae.config.d_in, device=sae.b_dec.device))
        with torch.cuda.device_of(self._batch):
            self._set_gradients()  # kernels that cannot be compiled fail here, not in training
        self._sums.zero_()
        self._active.zero_()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": torch.zeros(()), **moments}
        self._replayed = Replayed(), Replayed()
        capacity = _rounded_up(len(silent))
        self._listed, self._is_listed = silent.new_zeros(capacity), self._rates.new_zeros(capacity)
        self._weight_of_auxk = self._rates.new_zeros(())
        self._auxk: dict[int, Replayed] = {}
        self._room_of_auxk = torch.cuda.graph_pool_handle()

    def step(
        self, x: Tensor, rate: float, number: int, dead: Tensor | None = None, auxk: float = 0.0,
        classes: ClassMeans | None = None, labels: Tensor | None = None,
    ) -> Latents:  # fmt: skip
        """Take one step on a batch ``[batch, d]``; return its code, which the next step overwrites.

        Args:
            x: the batch, always of one size.
            rate: Adam's learning rate.
            number: the step's number, from 1.
            dead: which latents are dead, bool ``[n]``, for AuxK.
            auxk: weight of AuxK; 0: none.
            classes: adds the term of PASS; needs ``labels``, int64 ``[batch]``.
        """
        self._rates[0].fill_(rate / (1 - kernels.BETA1.value**number))
        self._rates[1].fill_((1 - kernels.BETA2.value**number) ** -0.5)
        replayed = classes is None and alone()
        with torch.cuda.device_of(x):  # where Triton launches
            # nonzero() waits for the step before, so it is called before this step's work is queued.
            listed = dead.nonzero().squeeze(1) if auxk and dead is not None else self._silent[:0]
            self._take(x)
            if replayed:
                self._replayed[0](self._set_gradients)
            else:
                self._set_gradients(classes, labels)
            if len(listed):
                self._add_auxk(listed, auxk, replayed)
            if replayed:
                self._replayed[1](self._update)
            else:
                self._update()
        return self._latents

    @torch.no_grad()
    def read_weights(self) -> None:
        """Copy the SAE's weights to bfloat16, before the first step: captured graphs read these copies."""
        encoder = self._sae.encoder
        self._encoder, self._decoder, self._bias = (
            weight.detach().to(_HALF, copy=True) for weight in (encoder.weight, self._sae.W_dec, encoder.bias)
        )

    @torch.no_grad()
    def _take(self, x: Tensor) -> None:
        """Make ``x``, divided by the scale, the batch; allocate memory for the code where the size changes."""
        if self._batch.shape != x.shape:
            config, batch = self._sae.config, len(x)
            self._batch = torch.empty_like(x)
            #: Dense codes ``[batch, n]``: 0 but for the active latents of the last step.
            self._codes = torch.zeros(batch, config.num_latents, dtype=_HALF, device=x.device)
            self._latents = Latents(x.new_empty(batch, config.k), x.new_zeros(batch, config.k, dtype=torch.long))
        torch.div(x, self._scale, out=self._batch)

    @torch.no_grad()
    def _set_gradients(self, classes: ClassMeans | None = None, labels: Tensor | None = None) -> None:
        """Set ``.grad`` of every parameter to that of the loss on the batch, but for AuxK; see
        :func:`vs2_plugin.sae.step.set_gradients`. The part along the decoder's rows is left to the update."""
        sae, codes, latents = self._sae, self._codes, self._latents
        config = sae.config
        rounded, moments = self._centre()
        select(F.linear(rounded, self._encoder, self._bias), config.activation, latents, codes)
        to_output, to_values, variance = self._explain(moments)
        if classes is not None and labels is not None:
            to_values += classes(latents, labels, config.num_latents)[1] / variance
        sae.W_dec.grad = torch.mm(codes.T, to_output, out_dtype=torch.float32)
        kernels.spread[(len(codes),)](
            *latents, to_values, codes, self._sums, self._active, moments, variance, *_sizes(sae),
            RELU=config.activation == "relu", K=triton.next_power_of_2(config.k), num_warps=1,
        )  # fmt: skip
        sae.encoder.weight.grad = torch.mm(codes.T, rounded, out_dtype=torch.float32)
        self._set_gradients_of_biases(to_output, moments, variance)
        self._last = rounded, to_output, variance

    def _centre(self) -> tuple[Tensor, Tensor]:
        """Return ``x - b_dec`` of the batch, bfloat16; and moments ``[d + 2]`` over all processes' batches: the sum of
        these rows ``[d]``, the sum of their squares, and their number."""
        x, sae = self._batch, self._sae
        batch, d = x.shape
        programs = triton.cdiv(batch, _SUMMED // 2)
        rounded, parts = torch.empty_like(x, dtype=_HALF), x.new_empty(programs, d + 2)
        kernels.centre[(programs,)](
            x, sae.b_dec, rounded, parts, self._codes, self._latents.indices, batch, *_sizes(sae),
            ROWS=_SUMMED // 2, D=triton.next_power_of_2(d), K=triton.next_power_of_2(sae.config.k), num_warps=4,
        )  # fmt: skip
        return rounded, total(parts.sum(0))

    def _explain(self, moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the derivatives by the output, ``-2 (x - x̃) / variance`` ``[batch, d]``, bfloat16; those by the
        active latents' values, ``[batch, k]``; and the variance."""
        x, sae = self._batch, self._sae
        width = triton.next_power_of_2(x.shape[1])
        to_output, to_values = torch.empty_like(x, dtype=_HALF), torch.empty_like(self._latents.values)
        variance = x.new_empty(())
        kernels.explain[(len(x),)](
            x, sae.b_dec, self._decoder, *self._latents, moments, variance, to_output, to_values, *_sizes(sae)[1:],
            D=width, TILE=max(1, 8192 // width), num_warps=2,
        )  # fmt: skip
        return to_output, to_values, variance

    def _set_gradients_of_biases(self, to_output: Tensor, moments: Tensor, variance: Tensor) -> None:
        """Set the gradients of the encoder's bias, from the sums of derivatives, and of ``b_dec``."""
        sae = self._sae
        n, d, _ = _sizes(sae)
        blocks = triton.cdiv(n, _SUMMED)
        programs = blocks + triton.cdiv(len(to_output), _SUMMED)
        parts, gradient = moments.new_empty(programs, d), moments.new_empty(n)
        width = triton.next_power_of_2(d)
        kernels.parts_of_base[(programs,)](
            self._sums, moments, variance, gradient, self._encoder, to_output, parts, n, d, len(to_output), blocks,
            ROWS=_SUMMED, TILE=max(1, min(_SUMMED, 8192 // width)), D=width, num_warps=4,
        )  # fmt: skip
        sae.encoder.bias.grad, sae.b_dec.grad = gradient, parts.sum(0)

    @torch.no_grad()
    def _add_auxk(self, dead: Tensor, auxk: float, replayed: bool) -> None:
        """Add the gradients of AuxK on the last batch, for the latents ``dead``, int64 ``[count]``; ``replayed`` says
        whether a CUDA graph is recorded and replayed."""
        count, half_width = len(dead), self._sae.config.d_in // 2
        size = _rounded_up(count)
        self._listed[:count] = dead
        self._is_listed[:count], self._is_listed[count:] = 1.0, 0.0
        self._weight_of_auxk.fill_(auxk * min(1.0, count / half_width))
        if not replayed:
            return self._add_auxk_of(size)
        if size not in self._auxk:
            self._auxk[size] = Replayed(self._room_of_auxk)
        return self._auxk[size](partial(self._add_auxk_of, size))

    @torch.no_grad()
    def _add_auxk_of(self, size: int) -> None:
        """Add the gradients of AuxK for the first ``size`` listed latents. Those after the dead ones only fill the list
        up: their encoder rows and biases count as 0, so that they are not active and their gradients are 0."""
        sae, (rounded, to_output, variance), weight = self._sae, self._last, self._weight_of_auxk
        relu, dead, real = sae.config.activation == "relu", self._listed[:size], self._is_listed[:size].to(_HALF)
        encoder, decoder = self._encoder[dead] * real[:, None], self._decoder[dead]
        pre = F.linear(rounded, encoder, self._bias[dead] * real)
        codes = torch.zeros_like(pre)
        values = to_output.new_empty(len(pre), min(sae.config.d_in // 2, size), dtype=torch.float32)
        select(pre, sae.config.activation, Latents(values, torch.empty_like(values, dtype=torch.long)), codes)
        guess = torch.mm(codes, decoder, out_dtype=torch.float32)
        to_guess = (guess * (2 * weight / variance) + to_output * weight).to(_HALF)
        to_values = torch.ops.aten.threshold_backward(to_guess @ decoder.T, codes if relu else codes.abs(), 0.0)
        sums = to_values.sum(0, dtype=torch.float32)
        gradients = {
            sae.W_dec: torch.mm(codes.T, to_guess, out_dtype=torch.float32),
            sae.encoder.weight: torch.mm(to_values.T, rounded, out_dtype=torch.float32),
            sae.encoder.bias: sums,
        }
        for parameter, gradient in gradients.items():
            gradient_of(parameter).index_add_(0, dead, gradient)
        gradient_of(sae.b_dec).sub_(sums @ encoder.float())

    @torch.no_grad()
    def _update(self) -> None:
        """Take a step of Adam, without the gradient along the decoder's rows, and scale these rows to unit norm."""
        sae = self._sae
        biased = sae.encoder.bias.requires_grad
        parameters = (sae.W_dec, sae.encoder.weight, sae.encoder.bias if biased else sae.b_dec, sae.b_dec)
        tensors = []
        for parameter in parameters:
            state = self._optimizer.state[parameter]
            tensors += [parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]]
        for parameter in sae.parameters():
            if parameter.grad is not None:
                total(parameter.grad)
        n, d, _ = _sizes(sae)
        kernels.update[(n + 1,)](
            *tensors, self._decoder, self._encoder, self._bias, self._sums, total(self._active), self._silent,
            self._rates, n, d, BIASED=biased, D=triton.next_power_of_2(d), num_warps=4,
        )  # fmt: skip


def _rounded_up(count: int) -> int:
    """Return ``count`` rounded up, by at most a quarter, so that few sizes (and CUDA graphs) occur; 128 at least."""
    count = max(count, _FEWEST)
    part: int = triton.next_power_of_2(count) // 8
    rounded: int = part * triton.cdiv(count, part)
    return rounded


def _sizes(sae: TopKSAE) -> tuple[int, int, int]:
    return sae.config.num_latents, sae.config.d_in, sae.config.k


def select(rows: Tensor, activation: str, latents: Latents, codes: Tensor) -> None:
    """Write the active latents of pre-activations ``[batch, n]``, as by ``TopKSAE.select``, to ``latents``, and their
    values to ``codes`` ``[batch, n]`` too. The kernel first compares groups of about √(n/k) numbers."""
    batch, n = rows.shape
    k = latents.values.shape[1]
    size = min(triton.next_power_of_2(isqrt(n // k)), 1 << ((n // k).bit_length() - 1))
    groups, slots = triton.cdiv(n, size), triton.next_power_of_2(k)
    bits = rows.view({2: torch.int16, 4: torch.int32}[rows.element_size()])
    padded = triton.next_power_of_2(groups)
    kernels.largest[(batch,)](
        rows, bits, bits.new_empty(batch, groups), bits.new_empty(batch, k, dtype=torch.int32),
        latents.indices, latents.values, codes, n, groups, k,
        SIZE=size, GROUPS=padded, TILE=min(padded, max(1, _LOOKED_AT // size)), K=slots, BITS=8 * rows.element_size(),
        ABS=activation == "abs", RELU=activation == "relu", num_warps=max(1, max(padded, slots * size) // 1024),
    )  # fmt: skip
