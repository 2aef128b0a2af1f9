"""The training step on a GPU: products in bfloat16, and three Triton kernels for what lies between them.

A GPU multiplies matrices so fast that the rest takes most of a step: selecting the active latents, reading their rows
of the decoder, and the passes over the weights that an update takes. Each of the three is one kernel here. What a
product does best is left to torch: finding the latents, and the weights' gradients, from dense codes.

The mathematics are those of :mod:`vs2_plugin.sae.step`. Weights, moments, gradients and sums are float32; what is
multiplied (activations, weights, codes) is rounded to bfloat16. The same step gives the same bits each time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from vs2_plugin.distributed import alone, mean_row, total
from vs2_plugin.sae import kernels
from vs2_plugin.sae.step import ClassMeans, add_auxk
from vs2_plugin.sae.topk import Latents, TopKSAE

__all__ = ["GpuStep", "Replayed", "places_of_largest"]


class GpuStep:
    """The training steps of an SAE on a GPU.

    The moments are those of ``optimizer``, whose own ``step`` is not called. The weights are kept in bfloat16 too,
    anew with each step: whoever changes them by other means calls :meth:`read_weights`.

    Raises:
        RuntimeError: a GPU without units for bfloat16; and whatever Triton raises where it cannot compile.
    """

    def __init__(self, sae: TopKSAE, optimizer: torch.optim.Adam) -> None:
        self._sae, self._optimizer = sae, optimizer
        self._rates = sae.b_dec.detach().new_zeros(2)
        if torch.cuda.get_device_capability(sae.b_dec.device) < (8, 0):
            raise RuntimeError("it has no units for bfloat16")
        self.read_weights()
        self._batch = torch.eye(2, sae.config.d_in, device=sae.b_dec.device)
        with torch.cuda.device_of(self._batch):
            self._set_gradients(self._batch)  # whatever cannot be compiled is found here
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": torch.zeros(()), **moments}
        self._replayed = Replayed(lambda: self._set_gradients(self._batch)), Replayed(self._update)

    def step(
        self, x: Tensor, rate: float, number: int, dead: Tensor, auxk: float = 0.0,
        classes: ClassMeans | None = None, labels: Tensor | None = None,
    ) -> Latents:  # fmt: skip
        """Take one step on a batch ``[batch, d]``; return its code.

        Args:
            x: the batch, always of one size.
            rate: Adam's learning rate.
            number: the step's number, from 1.
            dead: which latents are dead, bool ``[n]``.
            auxk: weight of AuxK; 0: none.
            classes: adds the term of PASS; needs ``labels``, int64 ``[batch]``.
        """
        self._rates[0].fill_(rate / (1 - kernels.BETA1.value**number))
        self._rates[1].fill_((1 - kernels.BETA2.value**number) ** -0.5)
        replayed = classes is None and alone()
        with torch.cuda.device_of(x):  # where Triton launches
            if not replayed:
                self._set_gradients(x, classes, labels)
            else:
                if self._batch.shape != x.shape:
                    self._batch = torch.empty_like(x)
                self._batch.copy_(x)
                self._replayed[0]()
            if auxk and dead.any():
                self._add_auxk(dead, auxk)
            if replayed:
                self._replayed[1]()
            else:
                self._update()
        return self._latents

    @torch.no_grad()
    def read_weights(self) -> None:
        """Copy the weights of the SAE."""
        self._encoder, self._decoder = self._sae.encoder.weight.bfloat16(), self._sae.W_dec.bfloat16()

    @torch.no_grad()
    def _set_gradients(self, x: Tensor, classes: ClassMeans | None = None, labels: Tensor | None = None) -> None:
        """Set ``.grad`` of every parameter to that of the loss on a batch ``[batch, d]``, but for AuxK; see
        :func:`vs2_plugin.sae.step.set_gradients`. The part along the decoder's rows is left to the update."""
        sae = self._sae
        config = sae.config
        centered = x - sae.b_dec
        rounded = centered.bfloat16()
        codes = F.linear(rounded, self._encoder, sae.encoder.bias.bfloat16())
        indices = places_of_largest(codes.abs() if config.activation == "abs" else codes, config.k)
        values = codes.gather(-1, indices).float()
        latents = Latents(values.relu_() if config.activation == "relu" else values, indices)
        variance = total((x - mean_row(x)).pow(2).sum())
        to_output, to_values = self._explain(centered, latents, variance)
        if classes is not None and labels is not None:
            to_values += classes(latents, labels, config.num_latents)[1] / variance
        if config.activation == "relu":
            to_values *= latents.values > 0
        codes.zero_().scatter_(1, indices, latents.values.bfloat16())
        sae.W_dec.grad = torch.mm(codes.T, to_output, out_dtype=torch.float32)
        codes.scatter_(1, indices, to_values.bfloat16())  # at the same places
        sae.encoder.weight.grad = torch.mm(codes.T, rounded, out_dtype=torch.float32)
        sae.encoder.bias.grad = codes.sum(0, dtype=torch.float32)
        sae.b_dec.grad = to_output.sum(0, dtype=torch.float32) - sae.encoder.bias.grad @ sae.encoder.weight
        self._latents, self._last = latents, (x, to_output, variance)

    def _explain(self, centered: Tensor, latents: Latents, variance: Tensor) -> tuple[Tensor, Tensor]:
        """The derivatives ``-2 (centered - W_decᵀ c) / variance`` by the output ``[batch, d]``, bfloat16, and those by
        the active latents' values, ``[batch, k]``."""
        batch, d = centered.shape
        k = latents.values.shape[1]
        to_output, to_values = torch.empty_like(centered, dtype=torch.bfloat16), torch.empty_like(latents.values)
        width = triton.next_power_of_2(d)
        kernels.explain[(batch,)](
            centered, self._decoder, *latents, variance, to_output, to_values, d, k,
            D=width, TILE=max(1, 8192 // width), num_warps=4,
        )  # fmt: skip
        return to_output, to_values

    def _add_auxk(self, dead: Tensor, auxk: float) -> None:
        """Add the gradients of AuxK on the last batch."""
        x, to_output, variance = self._last
        residual = to_output.float() * (variance / -2)
        with torch.autocast("cuda", torch.bfloat16):
            add_auxk(self._sae, x, residual, variance, dead.nonzero().squeeze(1), auxk)

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
        n, d = sae.W_dec.shape
        kernels.update[(n + 1,)](
            *tensors, self._decoder, self._encoder, self._rates, n, d,
            BIASED=biased, D=triton.next_power_of_2(d), num_warps=4,
        )  # fmt: skip


class Replayed:
    """Work on a GPU that is told once and replayed from then on, with the same tensors: to tell a training step, of
    fifty kernels, takes the processor longer than the step takes (H100, d 768, n 3072, batch 4096: 1.2 and 0.5 ms)."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work, self._calls = work, 0
        self._graph = torch.cuda.CUDAGraph()

    def __call__(self) -> None:
        """Do the work; twice as it is told, for what a library sets up at first."""
        self._calls += 1
        if self._calls < 3:
            return self._work()
        if self._calls == 3:
            with torch.cuda.graph(self._graph):  # which does not do it
                self._work()
        return self._graph.replay()


def places_of_largest(rows: Tensor, k: int) -> Tensor:
    """Where the k largest of each row of ``[batch, n]`` are, in no order: ``torch.topk(...).indices``.

    One program per row. The k-th largest of the maxima of G groups is found by bisection of its bits; what is larger,
    little more than k numbers, is collected, and the same bisection finds the k-th largest among them.
    """
    batch, n = rows.shape
    groups = max(512, triton.next_power_of_2(4 * k))
    if n < 2 * groups:
        return rows.topk(k, dim=-1, sorted=False).indices
    candidates = triton.next_power_of_2(2 * k)
    indices = rows.new_empty(batch, k, dtype=torch.long)
    places = rows.new_empty(batch, candidates, dtype=torch.int32)
    bits = 8 * rows.element_size()
    kernels.largest[(batch,)](
        rows.view({16: torch.int16, 32: torch.int32}[bits]), indices, places, n, k,
        GROUPS=groups, CANDIDATES=candidates, BITS=bits, EVEN=n % groups == 0, num_warps=max(1, groups // 1024),
    )  # fmt: skip
    return indices
