"""The top-k sparse autoencoder and its measure of fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vs2_plugin.devices import partitions_fast
from vs2_plugin.documented import documented
from vs2_plugin.errors import SettingError
from vs2_plugin.settings import setting, validate

__all__ = [
    "ByLatent",
    "Latents",
    "SaeConfig",
    "TopKSAE",
    "by_latent",
    "combine",
    "fvu",
    "largest",
    "largest_above_zero",
    "sample_fvu",
    "sum_by_latent",
]


#: What SAELens and Prisma add to the standard deviation that they divide by.
_EPSILON = 1e-5


class _Integers(NamedTuple):
    """Integers by which numbers are selected: of the size of one, and of twice that."""

    bits: torch.dtype
    keys: torch.dtype


_INTEGERS = {
    torch.bfloat16: _Integers(torch.int16, torch.int32),
    torch.float32: _Integers(torch.int32, torch.int64),
}
_PLACE = (1 << 16) - 1  # the bits of a key that are a place
_AT_ONCE = 1 << 22  # bytes of rows that are looked at before the next ones, so that they are still in a cache


@documented
@dataclass(frozen=True)
class SaeConfig:
    """The shape of an SAE.

    Raises:
        SettingError: a value outside its range.
    """

    d_in: int = setting(minimum=1)
    """Width d of the activations."""
    num_latents: int = setting(minimum=1)
    """Number of latents n."""
    k: int = setting(64, minimum=1)
    """Active latents per activation."""
    activation: str = setting("relu", choices=("relu", "abs"))
    """``relu``: the k largest positive pre-activations. ``abs``: the k pre-activations of largest magnitude, signs
    kept, without encoder bias (version 3 of arXiv 2506.01247)."""
    normalize_activations: str = setting("none", choices=("none", "layer_norm", "constant_norm_rescale"))
    """What is done to an activation before it is encoded, and undone afterwards, by SAELens's names: nothing, as by all
    SAEs that this package trains; mean 0 and standard deviation 1 over its d values; or the norm √d."""

    def __post_init__(self) -> None:
        validate(self)
        if self.k > self.num_latents:
            raise SettingError(
                f"k is {self.k}, more than the {self.num_latents} latents; lower k or raise expansion_factor"
            )


class Latents(NamedTuple):
    """A sparse code: k active latents per activation."""

    values: Tensor
    """``[batch, k]``, the latents' activations, in units of x (0 where fewer than k pre-activations are positive)."""
    indices: Tensor
    """``[batch, k]``, which latents; int64."""


class TopKSAE(nn.Module):
    """Top-k sparse autoencoder (arXiv 2506.01247, section 3; arXiv 2406.04093).

    ``c = TopK_k(act(W_enc (x - b_dec) + b_enc))`` and ``x̃ = W_decᵀ c + b_dec``, with decoder directions (rows of
    ``W_dec``) of unit norm. Parameters have the names and shapes of EleutherAI sparsify: ``encoder.weight``
    ``[n, d]``, ``encoder.bias`` ``[n]``, ``W_dec`` ``[n, d]``, ``b_dec`` ``[d]``.

    An SAE of another library may normalise activations first. It encodes ``z = (x - m) / s`` of each, and reconstructs
    ``x̃ = s (W_decᵀ TopK_k(…) + b_dec) + m``, so that its code in the units of x is ``c = s · TopK_k(…)``.
    """

    def __init__(self, config: SaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = nn.Linear(config.d_in, config.num_latents)
        nn.init.zeros_(self.encoder.bias)
        with torch.no_grad():  # W_dec = W_encᵀ, both with rows of unit norm
            self.encoder.weight /= self.encoder.weight.norm(dim=1, keepdim=True)
        self.W_dec = nn.Parameter(self.encoder.weight.detach().clone())
        self.b_dec = nn.Parameter(torch.zeros(config.d_in))
        if config.activation == "abs":
            self.encoder.bias.requires_grad_(False)

    def pre_activations(self, x: Tensor) -> Tensor:
        """``W_enc (x - b_dec) + b_enc``: ``[batch, d]`` to ``[batch, n]``."""
        return F.linear(x - self.b_dec, self.encoder.weight, self.encoder.bias)

    def select(self, pre: Tensor) -> Latents:
        """The k active latents of pre-activations ``[batch, n]``."""
        if self.config.activation == "abs":
            indices = largest_above_zero(pre.abs(), self.config.k)[1]
            return Latents(pre.gather(-1, indices), indices)
        # Selecting before the ReLU picks the same latents, and zeroes what is not positive.
        values, indices = largest_above_zero(pre, self.config.k)
        return Latents(F.relu(values), indices)

    def encode(self, x: Tensor) -> Latents:
        """The sparse code of activations ``[batch, d]``."""
        if self.config.normalize_activations == "none":
            return self.select(self.pre_activations(x))
        mean, scale, divisor = self._frame(x)
        values, indices = self.select(self.pre_activations((x - mean) / divisor))
        return Latents(values * scale, indices)

    def combine(self, latents: Latents) -> Tensor:
        """``W_decᵀ c``, without the bias: ``[batch, d]``. Reads only the k active rows of the decoder."""
        # Of a weight that requires gradients, a bag prepares for them, even where none are asked for.
        return combine(latents, self.W_dec if torch.is_grad_enabled() else self.W_dec.detach())

    def decode(self, latents: Latents) -> Tensor:
        """The reconstruction ``x̃ = W_decᵀ c + b_dec``: ``[batch, d]``. Raises SettingError where activations are
        normalised, since it is not of the code alone then: call the SAE itself."""
        if self.config.normalize_activations != "none":
            raise SettingError("the SAE normalises activations, so that it reconstructs from them: expected sae(x)")
        return self.combine(latents) + self.b_dec

    def origin(self, x: Tensor) -> Tensor:
        """What the reconstruction of ``[batch, d]`` adds to ``W_decᵀ c``: ``b_dec`` ``[d]``, or ``s b_dec + m``
        ``[batch, d]`` where activations are normalised."""
        if self.config.normalize_activations == "none":
            return self.b_dec
        mean, scale, _ = self._frame(x)
        return scale * self.b_dec + mean

    def _frame(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean m and scale s of each activation ``[batch, 1]``, and what it is divided by, as SAELens and Prisma do."""
        if self.config.normalize_activations == "constant_norm_rescale":
            scale = x.norm(dim=-1, keepdim=True) / self.config.d_in**0.5
            return torch.zeros_like(scale), scale, scale
        scale = x.std(dim=-1, keepdim=True)
        return x.mean(dim=-1, keepdim=True), scale, scale + _EPSILON

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction ``x̃ = W_decᵀ c + b_dec`` of ``[batch, d]``."""
        return self.combine(self.encode(x)) + self.origin(x)

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Scale every decoder direction to unit norm."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(torch.finfo(self.W_dec.dtype).tiny))


def combine(latents: Latents, decoder: Tensor) -> Tensor:
    """``W_decᵀ c`` in the dtype of the decoder: ``[batch, d]``."""
    weights = latents.values.to(decoder.dtype)
    return F.embedding_bag(latents.indices, decoder, per_sample_weights=weights, mode="sum")


def largest(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of ``[batch, n]``, in no order, and where they are: ``torch.topk``, in two rounds.

    The k largest lie in the k groups of largest maximum, so a top-k of n/g maxima and one of k·g candidates find
    them. With groups of g ≈ √(n/k) both are far smaller than n. On a GPU it takes a large n for that to pay.
    """
    n = rows.shape[-1]
    # Sizes of groups, and the n/k from which on they were the fastest.
    sizes = {16: 256, 8: 24, 4: 12} if rows.device.type == "cpu" else {64: 192} if n >= 1 << 16 else {}
    size = _size(sizes, n, k)
    if size == 1:
        return _topk(rows, k)
    parts = rows.unflatten(-1, (size, n // size))
    groups = _topk(parts.amax(-2), k)[1]
    candidates = parts.gather(-1, groups.unsqueeze(-2).expand(*groups.shape[:-1], size, k))
    values, chosen = _topk(candidates.flatten(-2), k)
    within = _quotient(chosen, k)
    return values, groups.gather(-1, chosen - within * k).add_(within.mul_(n // size))


def _size(sizes: dict[int, int], n: int, k: int) -> int:
    """Of how many a group of n is: the first that divides n, if n/k is large enough for it."""
    for size, least in sizes.items():
        if n % size == 0 and n >= least * k:
            return size
    return 1


def _topk(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, places = rows.topk(k, dim=-1, sorted=False)
    return values, places


def largest_above_zero(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of ``[batch, n]``, in no order, and where they are. Where fewer than k are above 0, the
    others are any of the row.

    On few threads of a processor numpy is the fastest, which partitions integers. The bits of a number that is not
    negative, read as an integer, are in order; a key has them in its upper half and the place in its lower, so that it
    says both.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        # What numpy does would not be recorded.
        return largest(rows, k)
    n, size, integers = rows.shape[-1], rows.element_size(), _INTEGERS.get(rows.dtype)
    few = torch.get_num_threads() * size <= 16  # 8 in bfloat16, 4 in float32: more of them make torch faster
    has_data = rows.device.type == "cpu" and type(rows) is Tensor
    if integers is None or n > _PLACE + 1 or not (few and has_data and partitions_fast()):
        return largest(rows, k)
    bits = rows.detach().view(integers.bits).reshape(-1, n)
    keys = torch.empty(*rows.shape[:-1], k, dtype=integers.keys)
    at_once = max(1, _AT_ONCE // (n * size))
    for some, found in zip(bits.split(at_once), keys.view(-1, k).split(at_once), strict=True):
        found.copy_(_largest_keys(some, k, integers.keys))
    places = (keys & _PLACE).long()
    values = rows.gather(-1, places) if rows.requires_grad else (keys >> 8 * size).to(integers.bits).view(rows.dtype)
    return values, places


def _largest_keys(bits: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """The keys of the k largest of each row, in no order: ``[batch, k]``. In two rounds, as above."""
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


def _quotient(places: Tensor, k: int) -> Tensor:
    """``places // k`` of numbers that are not negative; where k is a power of two, in a tenth of the time."""
    return places >> (k.bit_length() - 1) if k & (k - 1) == 0 else places // k


class ByLatent(NamedTuple):
    """Where in the indices of a code ``[batch, k]``, read as one list, each latent occurs; int64."""

    order: Tensor
    """``[batch · k]``: the places, sorted by latent."""
    activations: Tensor
    """``[batch · k]``: of which activation each of them is."""
    starts: Tensor
    """``[n]``: where the places of each latent start."""


def by_latent(indices: Tensor, num_latents: int) -> ByLatent:
    """Sort the indices ``[batch, k]`` of a code by latent."""
    listed = indices.flatten()
    counts = torch.bincount(listed, minlength=num_latents)
    order = listed.int().argsort(stable=True)
    return ByLatent(order, _quotient(order, indices.shape[1]), counts.cumsum(0) - counts)


def sum_by_latent(places: ByLatent, weights: Tensor, rows: Tensor) -> Tensor:
    """``Σ weights · row`` over the activations in which a latent is active: ``[n, d]``, from ``[batch, k]`` and
    ``[batch, d]``, in the dtype of the rows."""
    ordered = weights.to(rows.dtype).flatten().index_select(0, places.order)  # three times as fast as by brackets
    return F.embedding_bag(places.activations, rows, places.starts, per_sample_weights=ordered, mode="sum")


def fvu(x: Tensor, reconstruction: Tensor) -> Tensor:
    """Fraction of variance unexplained of a set: ``Σ‖x - x̃‖² / Σ‖x - mean‖²``, a scalar. Both ``[n, d]``."""
    return (x - reconstruction).pow(2).sum() / (x - x.mean(0)).pow(2).sum()


def sample_fvu(x: Tensor, reconstruction: Tensor, mean: Tensor) -> Tensor:
    """FVU of each activation, ``‖x - x̃‖² / ‖x - μ‖²``: ``[batch]``, from ``[batch, d]`` twice and ``[d]``.

    The mean is the stored one of the training split, so that an image's value does not depend on its batch.
    It is 0 by definition where ``x = μ``.
    """
    variance = (x - mean).pow(2).sum(-1)
    ratio = (x - reconstruction).pow(2).sum(-1) / variance
    return torch.where(variance == 0, 0.0, ratio)
