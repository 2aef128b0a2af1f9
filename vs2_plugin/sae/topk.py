"""The top-k sparse autoencoder and its measure of fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vs2_plugin.documented import documented
from vs2_plugin.errors import SettingError
from vs2_plugin.selection import largest_above_zero, quotient
from vs2_plugin.settings import setting, validate

__all__ = [
    "ByLatent",
    "Latents",
    "SaeConfig",
    "TopKSAE",
    "by_latent",
    "combine",
    "fvu",
    "sample_fvu",
    "sum_by_latent",
]

#: Added to the standard deviation that activations are divided by, as in SAELens and Prisma.
_EPSILON = 1e-5


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
    """How an activation is normalised before it is encoded (undone after decoding), by SAELens's names: not at all, as
    in all SAEs that this package trains; to mean 0 and standard deviation 1 over its d values; or to norm √d."""

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
    """``[batch, k]``, the latents' numbers; int64."""


class TopKSAE(nn.Module):
    """Top-k sparse autoencoder (arXiv 2506.01247, section 3; arXiv 2406.04093).

    ``c = TopK_k(act(W_enc (x - b_dec) + b_enc))`` and ``x̃ = W_decᵀ c + b_dec``, with decoder directions (rows of
    ``W_dec``) of unit norm. Parameters have the names and shapes of EleutherAI sparsify: ``encoder.weight``
    ``[n, d]``, ``encoder.bias`` ``[n]``, ``W_dec`` ``[n, d]``, ``b_dec`` ``[d]``.

    An SAE of another library may normalise activations first. It encodes ``z = (x - m) / s``, with m and s of each x,
    and reconstructs ``x̃ = s (W_decᵀ TopK_k(…) + b_dec) + m``, so that its code in units of x is ``c = s · TopK_k(…)``.

    Shapes are given for a batch ``[batch, d]``; a single activation ``[d]`` and tokens ``[batch, tokens, d]`` work too.
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
        """Return ``W_enc (x - b_dec) + b_enc`` ``[batch, n]`` of ``[batch, d]``."""
        return F.linear(x - self.b_dec, self.encoder.weight, self.encoder.bias)

    def select(self, pre: Tensor) -> Latents:
        """Return the k active latents of pre-activations ``[batch, n]``."""
        if self.config.activation == "abs":
            indices = largest_above_zero(pre.abs(), self.config.k)[1]
            return Latents(pre.gather(-1, indices), indices)
        # Selecting before the ReLU picks the same latents, and zeroes what is not positive.
        values, indices = largest_above_zero(pre, self.config.k)
        return Latents(F.relu(values), indices)

    def encode(self, x: Tensor) -> Latents:
        """Return the sparse code of activations ``[batch, d]``."""
        if self.config.normalize_activations == "none":
            return self.select(self.pre_activations(x))
        mean, scale, divisor = self._frame(x)
        values, indices = self.select(self.pre_activations((x - mean) / divisor))
        return Latents(values * scale, indices)

    def combine(self, latents: Latents) -> Tensor:
        """Return ``W_decᵀ c`` ``[batch, d]``, without the bias. Only the k active rows of the decoder are read."""
        # For a weight that requires gradients, embedding_bag prepares them even where gradients are disabled.
        return combine(latents, self.W_dec if torch.is_grad_enabled() else self.W_dec.detach())

    def decode(self, latents: Latents) -> Tensor:
        """Return the reconstruction ``x̃ = W_decᵀ c + b_dec``: ``[batch, d]``. Raises SettingError for an SAE that
        normalises activations, since its reconstruction needs x as well as the code: call the SAE itself."""
        if self.config.normalize_activations != "none":
            raise SettingError("the SAE normalises activations, so it reconstructs from them: expected sae(x)")
        return self.combine(latents) + self.b_dec

    def origin(self, x: Tensor) -> Tensor:
        """Return the part of the reconstruction of x ``[batch, d]`` that is not ``W_decᵀ c``: ``b_dec`` ``[d]``, or
        ``s b_dec + m`` ``[batch, d]`` where activations are normalised."""
        if self.config.normalize_activations == "none":
            return self.b_dec
        mean, scale, _ = self._frame(x)
        return scale * self.b_dec + mean

    def _frame(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean m, scale s and divisor of each activation, ``[batch, 1]``, as SAELens and Prisma have them."""
        if self.config.normalize_activations == "constant_norm_rescale":
            scale = x.norm(dim=-1, keepdim=True) / self.config.d_in**0.5
            return torch.zeros_like(scale), scale, scale
        scale = x.std(dim=-1, keepdim=True)
        return x.mean(dim=-1, keepdim=True), scale, scale + _EPSILON

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction ``x̃`` of activations ``[batch, d]``."""
        return self.combine(self.encode(x)) + self.origin(x)

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Scale every decoder direction to unit norm."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(torch.finfo(self.W_dec.dtype).tiny))


def combine(latents: Latents, decoder: Tensor) -> Tensor:
    """Return ``W_decᵀ c`` in the dtype of the decoder: ``[batch, d]``, or ``[..., d]`` for a code ``[..., k]``."""
    values, indices = latents
    if indices.dim() != 2:  # embedding_bag takes a matrix
        *leading, k = indices.shape
        rows = combine(Latents(values.reshape(-1, k), indices.reshape(-1, k)), decoder)
        return rows.reshape(*leading, decoder.shape[-1])
    return F.embedding_bag(indices, decoder, per_sample_weights=values.to(decoder.dtype), mode="sum")


class ByLatent(NamedTuple):
    """The places at which each latent occurs in the flattened indices of a code ``[batch, k]``; int64."""

    order: Tensor
    """``[batch · k]``: the places, sorted by latent."""
    activations: Tensor
    """``[batch · k]``: the activation (row of the code) of each place in ``order``."""
    starts: Tensor
    """``[n]``: where the places of each latent start in ``order``."""


def by_latent(indices: Tensor, num_latents: int) -> ByLatent:
    """Sort the indices ``[batch, k]`` of a code by latent."""
    listed = indices.flatten()
    counts = torch.bincount(listed, minlength=num_latents)
    order = listed.int().argsort(stable=True)
    return ByLatent(order, quotient(order, indices.shape[1]), counts.cumsum(0) - counts)


def sum_by_latent(places: ByLatent, weights: Tensor, rows: Tensor) -> Tensor:
    """Return, for each latent, ``Σ weight · row`` over the activations in which it is active: ``[n, d]``, from weights
    ``[batch, k]`` and rows ``[batch, d]``, in the dtype of the rows."""
    ordered = weights.to(rows.dtype).flatten().index_select(0, places.order)  # three times as fast as indexing
    return F.embedding_bag(places.activations, rows, places.starts, per_sample_weights=ordered, mode="sum")


def fvu(x: Tensor, reconstruction: Tensor) -> Tensor:
    """Return the FVU of a set, ``Σ‖x - x̃‖² / Σ‖x - mean‖²``, a scalar; both arguments are ``[n, d]``."""
    return (x - reconstruction).pow(2).sum() / (x - x.mean(0)).pow(2).sum()


def sample_fvu(x: Tensor, reconstruction: Tensor, mean: Tensor) -> Tensor:
    """Return the FVU of each activation, ``‖x - x̃‖² / ‖x - μ‖²``: ``[batch]``, from ``[batch, d]`` twice and ``[d]``.

    ``mean`` is the stored mean of the training split, so that an image's FVU does not depend on its batch.
    The FVU is 0 by definition where ``x = μ``.
    """
    variance = (x - mean).pow(2).sum(-1)
    ratio = (x - reconstruction).pow(2).sum(-1) / variance
    return torch.where(variance == 0, 0.0, ratio)
