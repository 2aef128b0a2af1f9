"""Amplify the active latents of each activation: VS2, PASS, and the reconstructions that the paper compares with."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from vs2_plugin.sae.topk import TopKSAE
from vs2_plugin.steering.batch import Batch
from vs2_plugin.steering.move import Move

__all__ = ["Amplify"]


class Amplify(nn.Module):
    """``x + α W_decᵀ c``, scaled to the norm of x (VS2; base x), or ``γ W_decᵀ c + b_dec`` (REC_F+γ; base b_dec).

    arXiv 2506.01247. With base b_dec, strength 1 is the plain reconstruction REC_F; 0 and -1 are the paper's controls.
    """

    replayable = True

    def __init__(self, sae: TopKSAE, strength: float, base: Literal["x", "b_dec"] = "x") -> None:
        super().__init__()
        self.sae, self.strength, self.base = sae, strength, base
        self.facts = {"alpha": strength} if base == "x" else {}

    def forward(self, x: Tensor, batch: Batch) -> Move:
        """Return the move of activations ``[batch, d]``."""
        return Move(batch.code(self.sae, x), self.strength, self.base, keep_norm=self.base == "x")
