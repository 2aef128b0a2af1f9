"""Distribution normalisation (arXiv 2302.11084)."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

__all__ = ["normalised"]


def normalised(classifier: Tensor, unlabeled: Tensor, weight: float) -> Callable[[Tensor], Tensor]:
    """Return the function from embeddings ``[batch, e]`` to logits ``[batch, classes]``.

    ``s = 100 x' . t'`` with ``x' = norm(x - w mean(U))`` and ``t' = norm(t - w mean(t))``.

    Args:
        classifier: t, ``[e, classes]``, of unit norm.
        unlabeled: U, ``[images, e]``, of unit norm.
        weight: w, lambda in the paper.
    """
    mean_image = unlabeled.mean(0)
    texts = F.normalize(classifier - weight * classifier.mean(1, keepdim=True), dim=0)
    return lambda x: 100 * F.normalize(x - weight * mean_image, dim=-1) @ texts
