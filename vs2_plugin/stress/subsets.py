"""Subsets of test images: some classes only, long tails, few images, batches of few classes. NumPy only.

A subset is an int64 array of row numbers, in random order.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Rows", "batch", "few", "long_tail", "of_classes", "shuffled"]

Rows = NDArray[np.int64]


def shuffled(labels: Rows, seed: int) -> Rows:
    """Return all rows in random order."""
    return np.random.default_rng(seed).permutation(len(labels))


def few(labels: Rows, count: int, seed: int) -> Rows:
    """Return ``count`` random rows, or all rows if there are fewer."""
    return shuffled(labels, seed)[:count]


def batch(labels: Rows, images: int, least: int, most: int, seed: int) -> Rows:
    """Return ``images`` rows, or all rows if there are fewer, of ``least`` to ``most`` random classes.

    The number of classes is random, from ``least`` to ``most`` inclusive, both at most the number of classes present.
    """
    random = np.random.default_rng(seed)
    classes = random.permutation(np.unique(labels))
    chosen = classes[: random.integers(min(least, len(classes)), min(most, len(classes)) + 1)]
    return random.permutation(np.flatnonzero(np.isin(labels, chosen)))[:images]


def of_classes(labels: Rows, share: float, seed: int) -> Rows:
    """Return the rows of a random ``share`` of the classes present, of at least one class."""
    classes = np.unique(labels)
    count = max(1, round(share * len(classes)))
    chosen = np.random.default_rng(seed).permutation(classes)[:count]
    order = shuffled(labels, seed)
    return order[np.isin(labels[order], chosen)]


def long_tail(labels: Rows, ratio: float, seed: int) -> Rows:
    """Return rows such that class sizes fall off exponentially.

    Of C classes in random order, class i keeps ``n_i = n ratio^(-i / (C - 1))`` images, at least one, where n is the
    number of images of the smallest class, so that every class has enough. The most frequent class has ``ratio`` times
    as many images as the rarest.
    """
    classes, counts = np.unique(labels, return_counts=True)
    ranked = np.random.default_rng(seed).permutation(classes)
    order, size = shuffled(labels, seed), int(counts.min())
    parts = []
    for rank, label in enumerate(ranked):
        share = ratio ** (-rank / max(len(ranked) - 1, 1))
        parts.append(order[labels[order] == label][: max(1, round(size * share))])
    rows = np.concatenate(parts)
    return np.random.default_rng(seed).permutation(rows)
