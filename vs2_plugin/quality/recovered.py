"""What is left of the model's zero-shot predictions when the reconstruction takes the activation's place."""

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
    """Shares of the images."""

    agreement: float
    """Whose predicted class is the same with the reconstruction."""
    by_mean: float
    """Whose predicted class is the same with the mean activation in its place, which says nothing of the image."""
    accuracy: float | None = None
    """Classified right by the plain model; None without labels."""
    reconstructed: float | None = None
    """Classified right from the reconstruction."""
    averaged: float | None = None
    """Classified right from the mean activation."""

    @property
    def share(self) -> float | None:
        """Of the accuracy above that of the mean activation, what is left; None without labels, or if there is none."""
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
        sae: on the device of the source.
        source: the activations.
        numbers: those to classify, int64 ``[count]``.
        embed: the rest of the tower, ``[batch, d]`` to ``[batch, e]``.
        classifier: class embeddings ``[e, classes]``.
        labels: int64 ``[count]``, of the images that are classified.
    """

    def classes(x: Tensor) -> Tensor:
        return (F.normalize(embed(x).float(), dim=-1) @ classifier).argmax(-1).cpu()

    constant = classes(source.mean.to(source.device)[None])
    ways = [(classes(x), classes(sae(x))) for x in source.every(numbers)]
    plain, rebuilt = (torch.cat(parts) for parts in zip(*ways, strict=True))

    def share(found: Tensor, expected: Tensor) -> float:
        return (found == expected).double().mean().item()

    same = share(rebuilt, plain), share(constant, plain)
    if labels is None:
        return Recovered(*same)
    truth = torch.from_numpy(labels)
    return Recovered(*same, *(share(way, truth) for way in (plain, rebuilt, constant)))
