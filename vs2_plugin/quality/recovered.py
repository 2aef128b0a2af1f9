"""Measures how many zero-shot predictions of the model survive when the reconstruction replaces the activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vs2_plugin.sae.source import Source
from vs2_plugin.sae.topk import TopKSAE

__all__ = ["Recovered", "recovered"]


class Recovered(NamedTuple):
    """Shares of the images with equal or right predictions under each replacement of the activation."""

    agreement: float
    """Share with the same predicted class from the reconstruction."""
    by_mean: float
    """Share with the same predicted class from the mean activation, which holds no information on the image."""
    accuracy: float | None = None
    """Share that the plain model classifies right; None without labels."""
    reconstructed: float | None = None
    """Share classified right from the reconstruction; None without labels."""
    averaged: float | None = None
    """Share classified right from the mean activation; None without labels."""

    @property
    def share(self) -> float | None:
        """Share of the accuracy above the mean activation's that remains; None without labels, or if none is above."""
        if self.accuracy is None or self.reconstructed is None or self.averaged is None:
            return None
        above = self.accuracy - self.averaged
        return (self.reconstructed - self.averaged) / above if above > 0 else None


@torch.no_grad()
def recovered(
    sae: TopKSAE,
    source: Source,
    numbers: np.ndarray,
    embed: Callable[[Tensor], Tensor],
    classifier: Tensor,
    labels: np.ndarray | None = None,
) -> Recovered:
    """Classify images by their activations, by the reconstructions and by the mean activation.

    Args:
        sae: the SAE, on the device of the source.
        source: the activations.
        numbers: row numbers of the activations to classify, int64 ``[count]``.
        embed: the rest of the tower, which maps ``[batch, d]`` to ``[batch, e]``.
        classifier: class embeddings ``[e, classes]``.
        labels: true classes of the classified images, int64 ``[count]``.
    """

    def classes(x: Tensor) -> Tensor:
        return (F.normalize(embed(x).float(), dim=-1) @ classifier).argmax(-1).cpu()

    constant = classes(source.mean.to(source.device)[None])
    classified = [(classes(x), classes(sae(x))) for x in source.every(numbers)]
    plain, rebuilt = (torch.cat(parts) for parts in zip(*classified, strict=True))

    def share(found: Tensor, expected: Tensor) -> float:
        return (found == expected).double().mean().item()

    same = share(rebuilt, plain), share(constant, plain)
    if labels is None:
        return Recovered(*same)
    truth = torch.from_numpy(labels)
    return Recovered(*same, *(share(way, truth) for way in (plain, rebuilt, constant)))
