"""StatA: a mixture of Gaussians among all test images, anchored at the texts (arXiv 2501.03729)."""

from __future__ import annotations

import torch
from torch import Tensor

from vs2_plugin.logits.graph import both_ways, nearest

__all__ = ["mixture"]

#: Neighbours of an image, and rounds on their classes within each round on the mixture.
_NEIGHBOURS, _INNER = 3, 5
#: Lower bound of the anchor's variance, which is about 1 / e on average.
_LEAST = 1e-8


def mixture(classifier: Tensor, unlabeled: Tensor, anchor: float, density: float, rounds: int) -> Tensor:
    """Return the logits ``[m, classes]`` of all images: logarithms of their class assignments z.

    Maximised in turn are z, μ and Σ (diagonal) in ``s Σ_i z_i . log p(x_i | μ, Σ) + Σ_ij w_ij z_i . z_j / 2
    - KL(z || y) - s a Σ_c KL(N(t_c, Σ') || N(μ_c, Σ_c))``, with y = softmax(100 x . t), w the cosines of the nearest
    images, and s the density's weight over the width e. The anchor of a class is its text t_c, with one variance Σ' for
    all, that of images around texts, by y. As in the paper, n_c counts the images whose largest z is at c::

        z_i ~ y_i exp(s log p_i + Σ_j (w_ij + w_ji) z_j / 2)
        β_c = n_c / (n_c + a)
        μ_c = β_c Σ_i z_ic x_i / Σ_i z_ic + (1 - β_c) t_c
        Σ_c = β_c Σ_i z_ic (x_i - μ_c)² / Σ_i z_ic + (1 - β_c) (Σ' + (μ_c - t_c)²)

    Images are far from texts, and near each other. A class whose mean has moved to the images is therefore likelier for
    all images than classes with means at their texts, by some 150 nats if e is 512; s keeps this below the terms of y
    and w.

    Args:
        classifier: t, ``[e, classes]``, of unit norm.
        unlabeled: x, ``[m, e]``, of unit norm.
        anchor: a, as a number of images; a class of fewer images stays near its text.
        density: the weight of the log densities, which are means over dimensions; e gives their sums.
        rounds: the number of updates of z, μ and Σ.
    """
    x, texts = unlabeled, classifier.T
    plain = (100 * x @ classifier).log_softmax(1)
    graph = both_ways(*_affinity(x))
    tied = _tied(plain.exp(), x, texts)
    logits, mean, variance = plain, texts, tied.expand_as(texts)
    for _ in range(rounds):
        likely = plain + density * _density(x, mean, variance)
        for _ in range(_INNER):
            logits = (likely + graph @ logits.exp()).log_softmax(1)
        count = torch.bincount(logits.argmax(1), minlength=len(texts))[:, None]
        trust = count / (count + anchor)
        shares = logits.softmax(0).T  # z / Σ_i z_i, without a division by 0 for an empty class
        mean = trust * (shares @ x) + (1 - trust) * texts
        own = (shares @ x**2 - 2 * mean * (shares @ x) + mean**2).clamp_min(0)
        variance = trust * own + (1 - trust) * (tied + (mean - texts) ** 2)
    return logits


def _affinity(x: Tensor) -> tuple[Tensor, Tensor]:
    cosines, rows = nearest(x, x, _NEIGHBOURS, own=True)
    return cosines.clamp_min(0) / 2, rows  # halved, since the graph holds w and its transpose


def _tied(z: Tensor, x: Tensor, texts: Tensor) -> Tensor:
    """Return the variance ``[e]``, per dimension, of images ``[m, e]`` around the texts of their classes."""
    return (x**2 - 2 * x * (z @ texts) + z @ texts**2).mean(0).clamp_min(_LEAST)


def _density(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Return the log densities ``[m, classes]``, as means over dimensions and up to a constant."""
    sharp = 1 / variance
    squares = x**2 @ sharp.T - 2 * x @ (mean * sharp).T + (mean**2 * sharp).sum(1)
    return -(squares + variance.log().sum(1)) / (2 * x.shape[1])
