"""InMaP: class embeddings learned among unlabeled images (arXiv 2310.19752)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

__all__ = ["balanced", "learned"]

#: Softmax temperatures of text embeddings, and of learned class embeddings, which lie closer to images.
_TEXTS, _IMAGES = 0.01, 0.04
#: Images at a time, so that an iteration holds only ``[2048, classes]`` probabilities.
_BATCH = 2048
#: A rate below this share of the first one moves no class embedding by as much as float32 resolves.
_STILL = 2.0**-24


def learned(
    classifier: Tensor, unlabeled: Tensor, steps: int, rate: float, sure: float, sinkhorn: int
) -> Callable[[Tensor], Tensor]:
    """Return the function from embeddings ``[batch, e]`` to logits ``x . w / 0.04`` ``[batch, classes]``.

    w minimises the cross-entropy of ``softmax(U w / 0.04)`` against ``P = softmax(U t / 0.01)``, in which rows with a
    value above ``sure`` are one-hot, by steps ``rate / (m 0.04)`` along the gradient from w = t. The rate is halved if
    the gradient's norm rises, and columns keep their unit norm. A step costs 4 m e classes operations.

    Args:
        classifier: t, ``[e, classes]``, of unit norm.
        unlabeled: U, ``[m, e]``, of unit norm.
        steps: the largest number of gradient steps; fewer if they no longer change anything.
        rate: the learning rate of the first step.
        sure: probability above which an image is taken to be of its class.
        sinkhorn: rounds in which P is scaled to equally frequent classes; 0: none.
    """
    targets = (unlabeled @ classifier / _TEXTS).softmax(1)
    if sinkhorn:
        targets = balanced(targets, sinkhorn)
    best, classes = targets.max(1)
    targets = torch.where(best[:, None] > sure, F.one_hot(classes, classifier.shape[1]).to(targets.dtype), targets)
    moments, weights = unlabeled.T @ targets, classifier
    del targets
    first, before = rate, torch.inf
    for _ in tqdm(range(steps), "inmap", unit="step", disable=None, leave=False):
        gradient = -moments
        for batch in unlabeled.split(_BATCH):
            gradient.addmm_(batch.T, (batch @ weights / _IMAGES).softmax(1))
        norm = float(gradient.norm())
        if norm > before:
            rate /= 2
        if rate < _STILL * first:
            break
        before = norm
        weights = F.normalize(weights - rate / (len(unlabeled) * _IMAGES) * gradient, dim=0)
    return lambda x: x @ weights / _IMAGES


def balanced(targets: Tensor, rounds: int) -> Tensor:
    """Scale probabilities ``[images, classes]`` so that all classes are about equally frequent, by Sinkhorn's
    iteration; rows have sum 1."""
    for _ in range(rounds):
        targets = targets / targets.sum(0).clamp_min(1e-30)
        targets = targets / targets.sum(1, keepdim=True)
    return targets
