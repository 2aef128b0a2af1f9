"""The gate: steers only activations that the SAE reconstructs well, and reports FVU and coverage to the results."""

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
    """Return τ, the q-quantile of the FVU over held-out training activations, interpolated between stored quantiles.

    Raises:
        CheckpointError: q lies outside the stored levels.

    >>> threshold({"0.9": 0.2, "0.99": 0.5}, 0.99)
    0.5
    """
    levels = sorted(quantiles, key=float)
    if not levels or not float(levels[0]) <= q <= float(levels[-1]):
        stored = f"{levels[0]} to {levels[-1]}" if levels else "none"
        raise CheckpointError(
            f"the checkpoint has no FVU quantile for gate={q:g} (it has {stored}); train the checkpoint again"
        )
    return float(np.interp(q, [float(level) for level in levels], [quantiles[level] for level in levels]))


class Gate(nn.Module):
    """Wraps any steering: activations whose FVU is at most τ are steered, the others left alone, bit for bit.

    ``FVU(x) = ‖x - x̃‖² / ‖x - μ‖²`` with the stored μ, so that an image's FVU does not depend on its batch
    (arXiv 2506.01247). Without τ everything is steered, and the FVU is only recorded.
    """

    mean: Tensor

    def __init__(self, steering: Steering, sae: TopKSAE, mean: Tensor, tau: float | None) -> None:
        super().__init__()
        self.steering, self.sae, self.tau = steering, sae, tau
        self.register_buffer("mean", mean)
        #: Whether to keep the values for :meth:`per_image`.
        self.recording = False
        self._tally = Tally()
        self._ratios: list[Tensor] = []

    def reset(self) -> None:
        """Forget the images seen so far."""
        self._tally.reset()
        self._ratios.clear()

    def per_image(self) -> dict[str, Tensor]:
        """Return ``fvu`` (float32) and ``steered`` (bool) per image since :meth:`reset`; needs :attr:`recording`."""
        ratios = torch.cat([torch.empty(0), *(ratio.cpu() for ratio in self._ratios)])
        return {"fvu": ratios, "steered": ratios <= (float("inf") if self.tau is None else self.tau)}

    @property
    def facts(self) -> dict[str, float]:
        """``coverage``, the share of images steered, and ``mean_fvu``, over the images since :meth:`reset`; and τ."""
        seen = self._tally.means()
        if self.tau is None:
            return {"coverage": 1.0, **seen} if seen else {}
        return {"gate_threshold": self.tau, **seen}

    def forward(self, x: Tensor, batch: Batch | None = None) -> Tensor:
        """Steer activations ``[batch, d]`` where the gate is open."""
        batch = batch or Batch()
        # Detached: ratios outlive the batch, and must not keep its autograd graph alive.
        ratio = sample_fvu(x, batch.code(self.sae, x).reconstruction, self.mean).detach()
        opened = None if self.tau is None else ratio <= self.tau
        self._tally.add(**({} if opened is None else {"coverage": opened}), mean_fvu=ratio)
        if self.recording:
            self._ratios.append(ratio)
        steered = steer(self.steering, x, batch)
        return steered if opened is None else steered.where(opened[:, None], x)
