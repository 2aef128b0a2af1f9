"""The gate: steer only what the SAE knows. And what it saw, for the results' metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from vs2_plugin.sae.topk import TopKSAE, sample_fvu

__all__ = ["Gate", "threshold"]


def threshold(quantiles: Mapping[str, float], q: float) -> float:
    """τ, the q-quantile of FVU over held-out training activations, interpolated between the stored ones.

    >>> threshold({"0.9": 0.2, "0.99": 0.5}, 0.99)
    0.5
    """
    levels = sorted((float(level), value) for level, value in quantiles.items())
    return float(np.interp(q, *zip(*levels, strict=True)))


class Gate(nn.Module):
    """Around any steering: steer an activation where its FVU is at most τ, and elsewhere leave it alone, bit for bit.

    ``FVU(x) = ‖x - x̃‖² / ‖x - μ‖²`` with the stored μ, so that an image's fate does not depend on its batch
    (arXiv 2506.01247). Without τ everything is steered, and the FVU is only looked at.
    """

    def __init__(self, steering: Callable[[Tensor], Tensor], sae: TopKSAE, mean: Tensor, tau: float | None) -> None:
        super().__init__()
        self.steering, self.sae, self.tau = steering, sae, tau
        self.register_buffer("mean", mean)
        #: Whether to keep what :meth:`per_image` tells.
        self.recording = False
        self.reset()

    def reset(self) -> None:
        """Forget the images seen so far."""
        self._seen, self._steered, self._total = 0, 0, 0.0
        self._ratios: list[Tensor] = []

    def per_image(self) -> dict[str, Tensor]:
        """``fvu`` (float32) and ``steered`` (bool) of each image seen since :meth:`reset`, if :attr:`recording`."""
        ratios = torch.cat([torch.empty(0), *(ratio.cpu() for ratio in self._ratios)])
        return {"fvu": ratios, "steered": ratios <= (float("inf") if self.tau is None else self.tau)}

    @property
    def facts(self) -> dict[str, float]:
        """``coverage``, the share of images steered, and ``mean_fvu``, over the images seen since :meth:`reset`."""
        facts = {} if self.tau is None else {"gate_threshold": self.tau}
        if self._seen:
            facts |= {"coverage": float(self._steered) / self._seen, "mean_fvu": float(self._total) / self._seen}
        return facts

    def forward(self, x: Tensor) -> Tensor:
        """Steer ``[batch, d]`` where the gate is open."""
        with self.sae.encoded(x) as latents:  # most steerings ask for it too
            ratio = sample_fvu(x, self.sae.decode(latents), self.mean)
            steered = self.steering(x)
        if self.recording:
            self._ratios.append(ratio)
        # Summed on the device: asking for the numbers here would wait for it after every batch.
        self._seen += len(x)
        self._total = ratio.double().sum() + torch.as_tensor(self._total, device=ratio.device)
        if self.tau is None:
            self._steered += len(x)
            return steered
        opened = ratio <= self.tau
        self._steered = opened.sum() + torch.as_tensor(self._steered, device=ratio.device)
        return steered.where(opened[:, None], x)
