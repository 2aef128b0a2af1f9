"""How well an SAE fits activations."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vs2_plugin.errors import DataError
from vs2_plugin.sae.source import Source
from vs2_plugin.sae.topk import TopKSAE, sample_fvu

__all__ = ["dead_share", "held_out_fvu", "samples_fvu"]


@torch.no_grad()
def held_out_fvu(sae: TopKSAE, source: Source, held: np.ndarray, scale: float = 1.0) -> float:
    """FVU on the activations of the numbers ``held``, divided by ``scale``.

    Raises:
        DataError: they are all equal.
    """
    origin = (source.read(held[:1]) / scale).double()  # sums around it keep their digits
    total = torch.zeros_like(origin[0])
    unexplained, squares = 0.0, 0.0
    for rows in source.every(held):
        x = rows / scale
        unexplained += (x - sae(x)).double().pow(2).sum().item()
        shifted = x.double() - origin
        total, squares = total + shifted.sum(0), squares + shifted.pow(2).sum().item()
    variance = float(squares - (total.pow(2).sum() / len(held)).item())
    if variance <= 0:
        raise DataError(f"all {len(held)} held-out activations are equal; expected more, and more varied, images")
    return unexplained / variance


@torch.no_grad()
def samples_fvu(sae: TopKSAE, source: Source, chosen: np.ndarray) -> Tensor:
    """Per-sample FVU of the activations of the numbers ``chosen``: float64 on the CPU, ``[len(chosen)]``."""
    mean = source.mean.to(source.device)
    return torch.cat([sample_fvu(x, sae(x), mean) for x in source.every(chosen)]).double().cpu()


@torch.no_grad()
def dead_share(sae: TopKSAE, source: Source, chosen: np.ndarray) -> float:
    """Share of the latents that none of the activations of the numbers ``chosen`` activates."""
    active = torch.zeros(sae.config.num_latents, dtype=torch.bool, device=source.device)
    for x in source.every(chosen):
        latents = sae.encode(x)
        active[latents.indices[latents.values != 0]] = True
    return round(1 - active.float().mean().item(), 6)
