"""Moves along decoder directions as values: from which base, along which latents, and how far."""

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
    # Where nothing moved, both norms are equal and the ratio is exactly 1.
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
            sae: the SAE.
            values: the amounts: ``[batch, k]`` with ``indices``; without them ``[batch, n]``, one per latent, or a
                function that returns these, since several such tensors can be too large to keep.
            indices: numbers of the latents, int64 ``[batch, k]``.
            activations: the latents' activations ``[batch, k]``, if they differ from the amounts.
            origin: ``[d]`` or ``[batch, d]``, which a reconstruction adds to ``W_decᵀ c``; by default ``b_dec``.
        """
        self.sae, self._values, self.indices, self._activations = sae, values, indices, activations
        self.origin = sae.b_dec if origin is None else origin

    @classmethod
    def of(cls, sae: TopKSAE, x: Tensor) -> Code:
        """Return the sparse code of activations ``[batch, d]``."""
        return cls(sae, *sae.encode(x), origin=sae.origin(x))

    def scaled(self, factors: Tensor) -> Code:
        """Return this code with amounts times ``factors``, which broadcast to ``[batch, k]``; the activations stay."""
        activations = self.values if self._activations is None else self._activations
        return Code(self.sae, self.values * factors, self.indices, activations, self.origin)

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
        """Return the tensors of the code that have been computed so far."""
        values = self._values if isinstance(self._values, Tensor) else None
        return {"values": values, "indices": self.indices, "direction": self.__dict__.get("direction")}

    @property
    def reconstruction(self) -> Tensor:
        """``x̃ = W_decᵀ c + b_dec``: ``[batch, d]``."""
        return self.direction + self.origin

    def __getitem__(self, rows: Tensor) -> Code:
        """Return the code of some rows, int64 ``[m]``."""
        indices = None if self.indices is None else self.indices[rows]
        origin = self.origin if self.origin.ndim == 1 else self.origin[rows]
        part = Code(self.sae, lambda: self.values[rows], indices, origin=origin)
        part.direction = self.direction[rows]
        return part

    def active(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the active latents of a row, int64 ``[m]``, their activations ``[m]`` and their amounts ``[m]``."""
        values = self.values[row]
        activations = values if self._activations is None else self._activations[row]
        places = activations.nonzero()[:, 0]
        latents = places if self.indices is None else self.indices[row][places]
        return latents, activations[places], values[places]


@documented
@dataclass(frozen=True)
class Move:
    """``x̂ = base + strength · W_decᵀ c``, by default scaled to the norm of x.

    A steering may return a move in place of steered activations. The result is the same, but ``vs2 inspect`` can then
    show the contribution of each latent.
    """

    code: Code
    """c, the code."""
    strength: float
    """α in VS2, γ in the amplified reconstruction."""
    base: Literal["x", "b_dec"] = "x"
    """Whether ``strength · W_decᵀ c`` is added to the activation x, or to the SAE's bias in place of x."""
    keep_norm: bool = True
    """Whether the result has the norm of x."""

    def apply(self, x: Tensor) -> Tensor:
        """Return the steered activations ``[batch, d]``."""
        if self.base == "x" and self.strength == 0:
            return x
        base = x if self.base == "x" else self.code.origin
        moved = base + self.strength * self.code.direction
        return keep_norm(moved, x) if self.keep_norm else moved

    @property
    def gain(self) -> float:
        """How far from x the move goes along each latent, per unit of its amount. With base b_dec that is strength - 1,
        since x already contains each latent once."""
        return self.strength - (self.base == "b_dec")

    @property
    def rest(self) -> str:
        """A name for the part of the change that is along no latent."""
        if self.base == "b_dec":
            return "what the SAE does not explain, left out"
        return "back to the norm of x" if self.keep_norm else "rest"


def vs2_steer(x: Tensor, sae: TopKSAE, alpha: float) -> Tensor:
    """Steer activations ``[batch, d]`` by Visual Sparse Steering (arXiv 2506.01247).

    ``v = D(γ c) - D(c) = (γ - 1) W_decᵀ c`` and ``x̂ = (x + λ v) · ‖x‖ / ‖x + λ v‖``. Only ``alpha = λ (γ - 1)``
    matters.
    """
    return Move(Code.of(sae, x), alpha).apply(x)
