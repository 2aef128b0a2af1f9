"""The gate: steer only what the SAE knows. And what it saw, for the results' metrics."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from vs2_plugin.errors import CheckpointError
from vs2_plugin.sae.topk import TopKSAE, sample_fvu
from vs2_plugin.steering.batch import Batch, Steering, steer
from vs2_plugin.steering.tally import Tally

__all__ = ["Gate", "threshold"]


def threshold(quantiles: Mapping[str, float], q: float) -> float:
    """τ, the q-quantile of FVU over held-out training activations, interpolated between the stored ones.

    Raises:
        CheckpointError: q lies outside of these.

    >>> threshold({"0.9": 0.2, "0.99": 0.5}, 0.99)
    0.5
    """
    levels = sorted(quantiles, key=float)
    if not levels or not float(levels[0]) <= q <= float(levels[-1]):
        told = f"{levels[0]} to {levels[-1]}" if levels else "none"
        raise CheckpointError(
            f"the checkpoint has no FVU quantile for gate={q:g} (it has {told}); train the checkpoint again"
        )
    return float(np.interp(q, [float(level) for level in levels], [quantiles[level] for level in levels]))


class Gate(nn.Module):
    """Around any steering: steer an activation where its FVU is at most τ, and elsewhere leave it alone, bit for bit.

    ``FVU(x) = ‖x - x̃‖² / ‖x - μ‖²`` with the stored μ, so that an image's fate does not depend on its batch
    (arXiv 2506.01247). Without τ everything is steered, and the FVU is only looked at.
    """

    mean: Tensor

    def __init__(self, steering: Steering, sae: TopKSAE, mean: Tensor, tau: float | None) -> None:
        super().__init__()
        self.steering, self.sae, self.tau = steering, sae, tau
        self.register_buffer("mean", mean)
        #: Whether to keep what :meth:`per_image` tells.
        self.recording = False
        self._tally = Tally()
        self._ratios: list[Tensor] = []

    def reset(self) -> None:
        """Forget the images seen so far."""
        self._tally.reset()
        self._ratios.clear()

    def per_image(self) -> dict[str, Tensor]:
        """``fvu`` (float32) and ``steered`` (bool) of each image seen since :meth:`reset`, if :attr:`recording`."""
        ratios = torch.cat([torch.empty(0), *(ratio.cpu() for ratio in self._ratios)])
        return {"fvu": ratios, "steered": ratios <= (float("inf") if self.tau is None else self.tau)}

    @property
    def facts(self) -> dict[str, float]:
        """``coverage``, the share of images steered, and ``mean_fvu``, over the images seen since :meth:`reset`."""
        seen = self._tally.means()
        if self.tau is None:
            return {"coverage": 1.0, **seen} if seen else {}
        return {"gate_threshold": self.tau, **seen}

    def forward(self, x: Tensor, batch: Batch | None = None) -> Tensor:
        """Steer ``[batch, d]`` where the gate is open."""
        batch = batch or Batch()
        # Detached: ratios outlive the batch, and must not keep all that they were computed from.
        ratio = sample_fvu(x, batch.code(self.sae, x).reconstruction, self.mean).detach()
        opened = None if self.tau is None else ratio <= self.tau
        self._tally.add(**({} if opened is None else {"coverage": opened}), mean_fvu=ratio)
        if self.recording:
            self._ratios.append(ratio)
        steered = steer(self.steering, x, batch)
        return steered if opened is None else steered.where(opened[:, None], x)
