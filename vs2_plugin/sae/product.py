"""The encoder's product in a training step, at the precision in which the processor is fast."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vs2_plugin.devices import has_bfloat16_units
from vs2_plugin.sae.topk import TopKSAE

__all__ = ["FLOAT32", "Precision", "Room", "multiplies_int8", "pre_activations"]

#: Largest inputs and weights as integers. A processor without VNNI adds two products of an unsigned and a signed
#: integer in 16 bits: (64 + 63) · 127 · 2 is less than 2**15.
_INPUT, _OFFSET, _WEIGHT = 63, 64, 127


class Precision(NamedTuple):
    """The types in which parts of a training step are computed, if not in that of the SAE, which is float32."""

    product: torch.dtype | None = None
    """The encoder's product: None, as the SAE; bfloat16, which rounds values by up to 1 %, and with them all of AuxK;
    or int8, off by 1 to 2 % of the norm. Either selects other latents where pre-activations are nearly equal."""
    rows: torch.dtype | None = None
    """The sums over rows of the decoder and of the batch, with these rows and their weights: None, or bfloat16."""

    @classmethod
    def fastest(cls, device: torch.device, batch: int, width: int, latents: int) -> Precision:
        """Return the fastest choice for a device and the shape of a product.

        On x86 processors, rows are in bfloat16, since torch sums them by FBGEMM and reads them from the cache. There
        the product is in bfloat16 if the processor has units for it, otherwise in int8 if the product is large and so
        is the batch, which has to make up for rounding all weights.
        """
        units = has_bfloat16_units() if device.type == "cpu" else None
        if units is None:
            return FLOAT32
        large = batch >= 512 and batch * width * latents >= 10**8
        product = torch.bfloat16 if units else torch.int8 if large and multiplies_int8() else None
        return cls(product, torch.bfloat16)


FLOAT32 = Precision()


class Room:
    """Memory for the tensors of a step, kept for the next step: allocating it takes as long as computing them."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}
        # For tensors that are not kept here: glibc keeps freed memory up to about twice the largest block (below 32 MB)
        # ever freed, and returns the rest to the system. Freeing one large block now avoids that in each step.
        torch.empty(31 << 20, dtype=torch.uint8)

    def like(self, tensor: Tensor, name: str, shape: tuple[int, ...] | None = None, dtype: Any = None) -> Tensor:
        """Return the uninitialised tensor ``name``, like ``tensor`` but for a given ``shape`` and ``dtype``."""
        shape, dtype = shape or tensor.shape, dtype or tensor.dtype
        room = self._kept.get(name)
        if room is None or (*room.shape,) != (*shape,) or room.dtype != dtype:
            room = self._kept[name] = tensor.new_empty(shape, dtype=dtype)
        return room

    def cast(self, tensor: Tensor, name: str, dtype: torch.dtype) -> Tensor:
        """Return ``tensor`` in ``dtype``: a copy in the memory ``name``, or the tensor itself if it has that dtype."""
        return tensor.detach() if tensor.dtype == dtype else self.like(tensor, name, dtype=dtype).copy_(tensor)


def pre_activations(sae: TopKSAE, centered: Tensor, dtype: torch.dtype | None, room: Room) -> Tensor:
    """Return ``W_enc (x - b_dec) + b_enc`` ``[batch, n]`` of ``centered``, which is ``x - b_dec`` ``[batch, d]``.

    ``dtype`` is that of :class:`Precision`. Products of integers are returned in float32.
    """
    weight, bias = sae.encoder.weight.detach(), sae.encoder.bias.detach()
    if dtype == torch.int8:
        return _in_int8(centered, weight, bias, room)
    weight = room.cast(weight, "encoder", dtype or weight.dtype)
    inputs = room.cast(centered, "inputs", weight.dtype)
    pre = room.like(inputs, "pre-activations", (len(inputs), len(weight)))
    return torch.addmm(bias.to(inputs.dtype), inputs, weight.T, out=pre)


def _in_int8(x: Tensor, weight: Tensor, bias: Tensor, room: Room) -> Tensor:
    """Return ``W x + b`` ``[batch, n]``.

    Dimensions of x and W are balanced as in SmoothQuant (arXiv 2211.10438, α = 1/2), since CLIP's activations are far
    larger in a few dimensions than in the others. Then each row has a unit of its own.
    """
    balance = (_largest(x, 0, "inputs", room) / _largest(weight, 0, "weights", room)).sqrt_()
    inputs = torch.div(x, balance, out=room.like(x, "inputs"))
    weights = torch.mul(weight, balance, out=room.like(weight, "weights"))
    unit, weight_unit = (_largest(inputs, 1, "inputs", room) / _INPUT, _largest(weights, 1, "weights", room) / _WEIGHT)
    whole = room.like(inputs, "whole inputs", dtype=torch.uint8).copy_(inputs.div_(unit).round_().add_(_OFFSET))
    whole_weights = room.like(weights, "whole weights", dtype=torch.int8).copy_(weights.div_(weight_unit).round_())
    pre = _multiply(whole, whole_weights, weight_unit.flatten())
    return torch.addcmul(bias, pre, unit, out=pre)


def _largest(matrix: Tensor, dim: int, name: str, room: Room) -> Tensor:
    """Return the largest magnitude along ``dim``, which is kept; never 0, so that ratios of two are finite."""
    magnitudes = torch.abs(matrix, out=room.like(matrix, f"magnitudes of {name}"))  # a norm takes twice as long
    return magnitudes.amax(dim, keepdim=True).clamp_min(1e-19)


def _multiply(inputs: Tensor, weights: Tensor, unit: Tensor) -> Tensor:
    """Return ``(inputs - 64) weightsᵀ unit`` ``[batch, n]``, float32, of ``inputs`` ``[batch, d]``, uint8, ``weights``
    ``[n, d]``, int8, and ``unit`` ``[n]``, float32."""
    packed = torch.ops.onednn.qlinear_prepack(weights, [*inputs.shape])
    product: Tensor = torch.ops.onednn.qlinear_pointwise(
        inputs, 1.0, _OFFSET, packed, unit, torch.zeros(len(weights), dtype=torch.int32), None,  # no bias
        1.0, 0, torch.float32, "none", [], "",  # the output is not quantized, and nothing is applied to it
    )  # fmt: skip
    return product


@functools.cache
def multiplies_int8() -> bool:
    """Return whether torch multiplies 8-bit integers on this processor: some builds of it have no oneDNN, and these
    operators, which ``torch.compile`` uses, are not documented, so the result is compared."""
    inputs = torch.arange(64, dtype=torch.uint8).view(2, 32) * 2
    weights = (torch.arange(96) - 48).to(torch.int8).view(3, 32)
    try:
        found = _multiply(inputs, weights, torch.ones(3))
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    return torch.equal(found, ((inputs.int() - _OFFSET) @ weights.int().T).float())
