"""The arithmetic of steering, in float32: functions of activations ``x`` and their sparse codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from vs2_plugin.sae.topk import TopKSAE

__all__ = ["SparseSteering", "amplified", "keep_norm", "vs2_steer"]


def keep_norm(steered: Tensor, x: Tensor) -> Tensor:
    """``steered`` scaled, row by row, to the norm of ``x``; both ``[batch, d]``. A row of norm 0 stays as it is."""
    norm = steered.norm(dim=-1, keepdim=True)
    # Where nothing moved, both norms are the same number and the ratio is exactly 1.
    return steered * (x.norm(dim=-1, keepdim=True) / norm).where(norm > 0, norm.new_ones(()))


def vs2_steer(x: Tensor, sae: TopKSAE, alpha: float) -> Tensor:
    """Visual Sparse Steering of ``[batch, d]`` (arXiv 2506.01247).

    ``v = D(γ c) - D(c) = (γ - 1) W_decᵀ c`` and ``x̂ = (x + λ v) · ‖x‖ / ‖x + λ v‖``. Only ``alpha = λ (γ - 1)``
    matters.
    """
    if alpha == 0:
        return x
    return keep_norm(x + alpha * sae.combine(sae.encode(x)), x)


def amplified(x: Tensor, sae: TopKSAE, gamma: float) -> Tensor:
    """The reconstruction with its code amplified, in place of the activation (arXiv 2506.01247, REC_F+γ).

    ``x̂ = D(γ c) = γ W_decᵀ c + b_dec``; ``gamma`` 1 is the plain reconstruction REC_F, 0 and -1 are its controls.
    """
    return gamma * sae.combine(sae.encode(x)) + sae.b_dec


class SparseSteering(nn.Module):
    """A function ``(x, sae, strength)`` of this module with its SAE, as a module that moves with the model."""

    def __init__(
        self,
        function: Callable[[Tensor, TopKSAE, float], Tensor],
        sae: TopKSAE,
        strength: float,
        facts: Mapping[str, float],
    ) -> None:
        super().__init__()
        self.function, self.sae, self.strength, self.facts = function, sae, strength, facts

    def forward(self, x: Tensor) -> Tensor:
        """Steer ``[batch, d]``."""
        return self.function(x, self.sae, self.strength)
