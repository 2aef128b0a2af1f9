"""StatA: a mixture of Gaussians among all test images, anchored at the texts (arXiv 2501.03729)."""

from __future__ import annotations

from torch import Tensor

from vs2_plugin.logits.graph import both_ways, nearest

__all__ = ["mixture"]

#: Neighbours of an image, and rounds on their classes within each round on the mixture.
_NEIGHBOURS, _INNER = 3, 5
#: A variance is that at least; the mean one is 1 / e or so.
_LEAST = 1e-8


def mixture(classifier: Tensor, unlabeled: Tensor, anchor: float, rounds: int) -> Tensor:
    """Return the logits ``[m, classes]`` of all images: logarithms of z.

    Maximised in turn are z, μ and Σ (diagonal) in ``Σ_i z_i . log p(x_i | μ, Σ) + Σ_ij w_ij z_i . z_j
    - KL(z || y) - a Σ_c KL(N(μ'_c, Σ'_c) || N(μ_c, Σ_c))``, with y = softmax(100 x . t), and w the cosines of the
    nearest images. The anchor's mean μ'_c is the class embedding, its variance Σ'_c that of images around it, by y::

        z_i ~ y_i exp(log p_i + Σ_j (w_ij + w_ji) z_j)
        μ_c = (Σ_i z_ic x_i + a μ'_c) / (Σ_i z_ic + a)
        Σ_c = (Σ_i z_ic (x_i - μ_c)² + a (Σ'_c + (μ_c - μ'_c)²)) / (Σ_i z_ic + a)

    Args:
        classifier: t, ``[e, classes]``, of unit norm.
        unlabeled: x, ``[m, e]``, of unit norm.
        anchor: a, in images: a class of fewer stays near its text.
        rounds: on z, μ and Σ.
    """
    x, texts = unlabeled, classifier.T
    plain = (100 * x @ classifier).log_softmax(1)
    graph = both_ways(*_affinity(x))
    tied = _variance(plain, x, texts)
    logits, mean, variance = plain, texts, tied
    for _ in range(rounds):
        likely = plain + _density(x, mean, variance)
        for _ in range(_INNER):
            logits = (likely + graph @ logits.exp()).log_softmax(1)
        count = logits.exp().sum(0)[:, None]
        mean = (count * (logits.softmax(0).T @ x) + anchor * texts) / (count + anchor)
        own = count * _variance(logits, x, mean)
        variance = (own + anchor * (tied + (mean - texts) ** 2)) / (count + anchor)
    return logits


def _affinity(x: Tensor) -> tuple[Tensor, Tensor]:
    cosines, rows = nearest(x, x, _NEIGHBOURS, own=True)
    return cosines.clamp_min(0), rows


def _variance(logits: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    """Of images ``[m, e]`` around a class, in each dimension, by their share in it: ``[classes, e]``."""
    shares = logits.softmax(0).T  # the same as of probabilities, and there is no class of which they are all 0
    return (shares @ x**2 - 2 * mean * (shares @ x) + mean**2).clamp_min(_LEAST)


def _density(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Logarithms ``[m, classes]`` of the density, but for a constant."""
    sharp = 1 / variance
    squares = x**2 @ sharp.T - 2 * x @ (mean * sharp).T + (mean**2 * sharp).sum(1)
    return -(squares + variance.log().sum(1)) / 2
