"""Centring: moves every image away from the mean activation; the simplest baseline for VS2."""

from __future__ import annotations

from torch import Tensor, nn

from vs2_plugin.steering.move import keep_norm

__all__ = ["Centring"]


class Centring(nn.Module):
    """``x + alpha (x - mu)`` at the norm of x: VS2 with an SAE that reconstructs x exactly and whose bias is mu."""

    mean: Tensor
    replayable = True

    def __init__(self, mean: Tensor, alpha: float) -> None:
        """Take ``mean``, ``[d]``: mu, the mean activation over the unlabeled training images."""
        super().__init__()
        self.alpha, self.facts = alpha, {"alpha": alpha}
        self.register_buffer("mean", mean)

    def forward(self, x: Tensor) -> Tensor:
        """Return the steered activations of ``[batch, d]``."""
        return x if self.alpha == 0 else keep_norm(x + self.alpha * (x - self.mean), x)
