"""Steering along decoder directions, as a value: how far along which latents, and from where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import Tensor

from vs2_plugin.documented import documented
from vs2_plugin.sae.topk import Latents, TopKSAE

__all__ = ["Code", "Move", "keep_norm", "vs2_steer"]


def keep_norm(steered: Tensor, x: Tensor) -> Tensor:
    """Scale ``steered``, row by row, to the norm of ``x``; both ``[batch, d]``. A row of norm 0 stays as it is."""
    norm = steered.norm(dim=-1, keepdim=True)
    # Where nothing moved, both norms are the same number and the ratio is exactly 1.
    ratio: Tensor = x.norm(dim=-1, keepdim=True) / (norm + (norm == 0))
    return steered * ratio


class Code:
    """Amounts of an SAE's latents for each row of a batch: a sparse code, or a mixture of several."""

    def __init__(
        self,
        sae: TopKSAE,
        values: Tensor | Callable[[], Tensor],
        indices: Tensor | None = None,
        activations: Tensor | None = None,
        origin: Tensor | None = None,
    ) -> None:
        """
        Args:
            sae: whose latents.
            values: ``[batch, k]`` with ``indices``; without, ``[batch, n]``, one for every latent, or a function that
                gives them, since many of these are too large to keep.
            indices: int64 ``[batch, k]``: which latents.
            activations: ``[batch, k]``, the latents' activations, if the amounts are something else.
            origin: ``[d]`` or ``[batch, d]``: what a reconstruction adds to them, if not ``b_dec``.
        """
        self.sae, self._values, self.indices, self._activations = sae, values, indices, activations
        self.origin = sae.b_dec if origin is None else origin

    @classmethod
    def of(cls, sae: TopKSAE, x: Tensor) -> Code:
        """The sparse code of activations ``[batch, d]``."""
        return cls(sae, *sae.encode(x), origin=sae.origin(x))

    def scaled(self, factors: Tensor) -> Code:
        """The same latents with amounts times ``factors``, which broadcast to ``[batch, k]``; the activations stay."""
        known = self.values if self._activations is None else self._activations
        return Code(self.sae, self.values * factors, self.indices, known, self.origin)

    @property
    def values(self) -> Tensor:
        """The amounts: ``[batch, k]``, or ``[batch, n]`` without :attr:`indices`."""
        return self._values if isinstance(self._values, Tensor) else self._values()

    @cached_property
    def direction(self) -> Tensor:
        """``W_decᵀ c``: ``[batch, d]``."""
        if self.indices is None:
            return self.values @ self.sae.W_dec
        return self.sae.combine(Latents(self.values, self.indices))

    def tensors(self) -> dict[str, Tensor | None]:
        """What is known of it so far."""
        values = self._values if isinstance(self._values, Tensor) else None
        return {"values": values, "indices": self.indices, "direction": self.__dict__.get("direction")}

    @property
    def reconstruction(self) -> Tensor:
        """``x̃ = W_decᵀ c + b_dec``: ``[batch, d]``."""
        return self.direction + self.origin

    def __getitem__(self, rows: Tensor) -> Code:
        """The code of some rows, int64 ``[m]``."""
        indices = None if self.indices is None else self.indices[rows]
        origin = self.origin if self.origin.ndim == 1 else self.origin[rows]
        part = Code(self.sae, lambda: self.values[rows], indices, origin=origin)
        part.direction = self.direction[rows]
        return part

    def active(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of a row: the latents that are active, int64 ``[m]``, their activations ``[m]``, and the amounts ``[m]``."""
        values = self.values[row]
        activations = values if self._activations is None else self._activations[row]
        places = activations.nonzero()[:, 0]
        latents = places if self.indices is None else self.indices[row][places]
        return latents, activations[places], values[places]


@documented
@dataclass(frozen=True)
class Move:
    """``x̂ = base + strength · W_decᵀ c``, and then, unless told otherwise, back to the norm of x.

    A steering may return it in place of the steered activations. What is steered is the same; besides, ``vs2 inspect``
    can tell what each latent contributed.
    """

    code: Code
    """c."""
    strength: float
    """α in VS2, γ in the amplified reconstruction."""
    base: Literal["x", "b_dec"] = "x"
    """Whether the latents are added to the activation, or take its place."""
    keep_norm: bool = True
    """Whether the result has the norm of x."""

    def apply(self, x: Tensor) -> Tensor:
        """The steered activations ``[batch, d]``."""
        if self.base == "x" and self.strength == 0:
            return x
        base = x if self.base == "x" else self.code.origin
        moved = base + self.strength * self.code.direction
        return keep_norm(moved, x) if self.keep_norm else moved

    @property
    def gain(self) -> float:
        """How far from x the move goes along each latent, per unit of its amount. Already in x, once, is what the SAE
        reconstructs of it."""
        return self.strength - (self.base == "b_dec")

    @property
    def rest(self) -> str:
        """In words, the part of the change that goes along no latent."""
        if self.base == "b_dec":
            return "what the SAE does not explain, left out"
        return "back to the norm of x" if self.keep_norm else "rest"


def vs2_steer(x: Tensor, sae: TopKSAE, alpha: float) -> Tensor:
    """Visual Sparse Steering of ``[batch, d]`` (arXiv 2506.01247).

    ``v = D(γ c) - D(c) = (γ - 1) W_decᵀ c`` and ``x̂ = (x + λ v) · ‖x‖ / ‖x + λ v‖``. Only ``alpha = λ (γ - 1)``
    matters.
    """
    return Move(Code.of(sae, x), alpha).apply(x)
