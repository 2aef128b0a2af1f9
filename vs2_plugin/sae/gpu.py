"""The training step on a GPU: products in bfloat16, and Triton kernels for what lies between them.

A GPU multiplies matrices so fast that the rest takes most of a step: selecting the active latents, reading their rows
of the decoder, and passes over batch, codes and weights. So whatever can share a pass does, in six kernels. What a
product does best is left to torch: finding the latents, and the weights' gradients, from dense codes.

The mathematics are those of :mod:`vs2_plugin.sae.step`. Weights, moments, gradients and sums are float32; what is
multiplied (activations, weights, codes) is rounded to bfloat16. The same step gives the same bits each time.
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

#: What is multiplied is rounded to this.
_HALF = torch.bfloat16
#: Activations, and latents, that one program sums; and numbers of a row that it looks at together.
_SUMMED, _LOOKED_AT = 16, 2048
#: The least number of dead latents that AuxK is told for.
_FEWEST = 128


class GpuStep:
    """The training steps of an SAE on a GPU.

    The moments are those of ``optimizer``, whose own ``step`` is not called. The weights are kept in bfloat16 too,
    anew with each step: whoever changes them by other means calls :meth:`read_weights`.

    Args:
        silent: for how many steps each latent has not been active, int64 ``[n]``; each step counts on.
        scale: what activations are divided by.

    Raises:
        RuntimeError: a GPU without units for bfloat16; and whatever Triton raises where it cannot compile.
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
            self._set_gradients()  # whatever cannot be compiled is found here
        self._sums.zero_()
        self._active.zero_()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": torch.zeros(()), **moments}
        self._replayed = Replayed(), Replayed()
        most = _rounded_up(len(silent))
        self._listed, self._is_listed = silent.new_zeros(most), self._rates.new_zeros(most)
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
            # The answer waits for the step before, and is asked for while nothing waits for it.
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
        """Copy the weights of the SAE."""
        encoder = self._sae.encoder
        self._encoder, self._decoder, self._bias = (
            weight.detach().to(_HALF, copy=True) for weight in (encoder.weight, self._sae.W_dec, encoder.bias)
        )

    @torch.no_grad()
    def _take(self, x: Tensor) -> None:
        """Make ``x`` the batch."""
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
        """The batch less ``b_dec``, bfloat16; and of all processes' batches the sum of such ``[d]``, the sum of their
        squares, and how many they are."""
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
        """The derivatives by the output, ``-2 (x - x̃) / variance`` ``[batch, d]``, bfloat16; those by the active
        latents' values, ``[batch, k]``; and the variance."""
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
        """Set those of the encoder's bias, by the sums of derivatives, and of ``b_dec``."""
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
        """Add the gradients of AuxK on the last batch, for the latents ``dead``, int64 ``[count]``; ``replayed``, as
        those of the loss are."""
        count, wanted = len(dead), self._sae.config.d_in // 2
        size = _rounded_up(count)
        self._listed[:count] = dead
        self._is_listed[:count], self._is_listed[count:] = 1.0, 0.0
        self._weight_of_auxk.fill_(auxk * min(1.0, count / wanted))
        if not replayed:
            return self._add_auxk_of(size)
        if size not in self._auxk:
            self._auxk[size] = Replayed(self._room_of_auxk)
        return self._auxk[size](partial(self._add_auxk_of, size))

    @torch.no_grad()
    def _add_auxk_of(self, size: int) -> None:
        """The same for the first ``size`` that are listed. Those that only fill the list up have no weights here: they
        are not active, and their gradients are 0."""
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
        """One step of Adam by the gradients, without their part along the decoder's rows; these then get norm 1."""
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
    """The number of dead latents that stands for ``count``, at most a quarter more."""
    count = max(count, _FEWEST)
    part: int = triton.next_power_of_2(count) // 8
    rounded: int = part * triton.cdiv(count, part)
    return rounded


def _sizes(sae: TopKSAE) -> tuple[int, int, int]:
    return sae.config.num_latents, sae.config.d_in, sae.config.k


def select(rows: Tensor, activation: str, latents: Latents, codes: Tensor) -> None:
    """Write the active latents of pre-activations ``[batch, n]``, which ``TopKSAE.select`` gives, and their values to
    ``codes`` ``[batch, n]`` too. The groups that are looked at first are of about √(n/k) numbers."""
    batch, n = rows.shape
    k = latents.values.shape[1]
    size = min(triton.next_power_of_2(isqrt(n // k)), 1 << ((n // k).bit_length() - 1))
    groups, wanted = triton.cdiv(n, size), triton.next_power_of_2(k)
    bits = rows.view({2: torch.int16, 4: torch.int32}[rows.element_size()])
    padded = triton.next_power_of_2(groups)
    kernels.largest[(batch,)](
        rows, bits, bits.new_empty(batch, groups), bits.new_empty(batch, k, dtype=torch.int32),
        latents.indices, latents.values, codes, n, groups, k,
        SIZE=size, GROUPS=padded, TILE=min(padded, max(1, _LOOKED_AT // size)), K=wanted, BITS=8 * rows.element_size(),
        ABS=activation == "abs", RELU=activation == "relu", num_warps=max(1, max(padded, wanted * size) // 1024),
    )  # fmt: skip
