"""The arithmetic of steering, in float32."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from vs2_plugin.sae.topk import TopKSAE

__all__ = ["VisualSparseSteering", "keep_norm", "vs2_steer"]


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


class VisualSparseSteering(nn.Module):
    """:func:`vs2_steer` with its SAE, as a module that moves between devices with the model."""

    def __init__(self, sae: TopKSAE, alpha: float) -> None:
        super().__init__()
        self.sae = sae
        self.alpha = alpha

    @property
    def facts(self) -> Mapping[str, float]:
        """What the results' metrics say of it."""
        return {"alpha": self.alpha}

    def forward(self, x: Tensor) -> Tensor:
        """Steer ``[batch, d]``."""
        return vs2_steer(x, self.sae, self.alpha)
