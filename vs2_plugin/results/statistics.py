"""The statistics of the report: intervals, pairing, calibration, classes, bins of FVU. NumPy only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Bin",
    "Calibration",
    "ClassChange",
    "Interval",
    "by_fvu",
    "calibration",
    "calibration_of_bins",
    "class_changes",
    "interval",
    "pair",
    "share_interval",
]

Array = NDArray[Any]
#: Bins of the expected calibration error.
BINS = 15
#: Probability below a 95 % interval, and above it; resamples of a bootstrap.
_TAIL, _RESAMPLES = (1 - 0.95) / 2, 10_000
#: Largest number of FVU bins, and smallest number of images in a bin.
_FVU_BINS, _LEAST = 10, 20


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


class Calibration(NamedTuple):
    """Fit of confidences to accuracies, over equal bins of confidence; means are ``nan`` in empty bins."""

    ece: float
    """Expected calibration error."""
    share: Array
    """Share of the images in each bin, ``[bins]``."""
    confidence: Array
    """Mean confidence in each bin."""
    accuracy: Array
    """Accuracy in each bin."""


class ClassChange(NamedTuple):
    """The effect of steering on the images of one class."""

    label: int
    images: int
    before: float
    """Accuracy of zero-shot on these images."""
    after: float
    """Accuracy of the steered model on the same images."""
    mended: int
    """Images that zero-shot got wrong and steering right."""
    mended_from: tuple[int, int] | None
    """Zero-shot's most frequent prediction for the mended images, and its count."""
    broken: int
    """Images that zero-shot got right and steering wrong."""
    broken_to: tuple[int, int] | None
    """The steered model's most frequent prediction for the broken images, and its count."""

    @property
    def change(self) -> float:
        """Change of the accuracy."""
        return self.after - self.before


class Bin(NamedTuple):
    """The images of one range of FVU."""

    low: float
    high: float
    images: Array
    """Mask of the images in the bin, bool ``[n]``."""


def interval(values: Array) -> Interval:
    """Return the 95 % percentile bootstrap interval of the mean of ``values`` ``[n]``.

    Drawing n images with replacement draws each distinct value a multinomial number of times. So these numbers are
    drawn directly: the distribution is the same, and the cost grows with the distinct values, not with n.
    """
    distinct, counts = np.unique(np.asarray(values, dtype=float), return_counts=True)
    n = counts.sum()
    means = np.random.default_rng(0).multinomial(n, counts / n, size=_RESAMPLES) @ distinct / n
    return Interval(*np.quantile(means, [_TAIL, 1 - _TAIL]).tolist())


def share_interval(hits: Array) -> Interval:
    """Return the 95 % interval of the share of true values among ``hits``, bool ``[n]``: Wilson's score interval.

    Unlike a bootstrap's, its width is above 0 if all or none are true. Source: Wilson 1927, doi:10.2307/2276774.
    """
    n, share = len(hits), float(np.mean(hits))
    z = NormalDist().inv_cdf(1 - _TAIL)
    middle, wide = share + z**2 / (2 * n), z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    low, high = (max(0.0, min((middle + side) / (1 + z**2 / n), 1.0)) for side in (-wide, wide))
    return Interval(low, high)


def pair(
    digest: Array, target: Array, other_digest: Array, other_target: Array
) -> Array | None:
    """Return the indices that put the images of another run into the order of this run; None if the images differ.

    Images that occur more than once are paired in the order of their occurrence: their pixels are the same, so any
    pairing will do.
    """
    if len(digest) != len(other_digest):
        return None
    ours, theirs = np.lexsort((target, digest)), np.lexsort((other_target, other_digest))
    same = np.array_equal(digest[ours], other_digest[theirs]) and np.array_equal(target[ours], other_target[theirs])
    if not same:
        return None
    order: Array = np.empty_like(ours)
    order[ours] = theirs
    return order


def calibration(confidence: Array, correct: Array) -> Calibration:
    """Return the calibration of the predicted classes' probabilities ``[n]``, given which predictions are ``correct``.

    ``ECE = Σ_b n_b/n |acc_b - conf_b|`` over equal bins ``(b/15, (b+1)/15]`` of confidence (arXiv 1706.04599).
    """
    confidence = confidence.astype(float)
    index = _bin_of(confidence)
    counts = np.bincount(index, minlength=BINS)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(index, confidence, BINS) / counts
        accuracy = np.bincount(index, correct, BINS) / counts
    share = counts / len(confidence)
    return Calibration(float(np.nansum(share * np.abs(accuracy - mean))), share, mean, accuracy)


def calibration_of_bins(rows: Sequence[Sequence[float]], ece: float) -> Calibration:
    """Return a calibration from its non-empty bins, ``[images, mean confidence, accuracy]`` each, and its ECE.

    Raises:
        ValueError: ``rows`` are no such bins; depending on the type, TypeError instead.
    """
    images, mean, right = np.array(rows, dtype=float).reshape(-1, 3).T
    if not 0 < images.sum() < np.inf or not np.isfinite([mean, right]).all():
        raise ValueError("expected bins that hold images")
    index = _bin_of(mean)
    share, confidence, accuracy = np.zeros(BINS), np.full(BINS, np.nan), np.full(BINS, np.nan)
    share[index], confidence[index], accuracy[index] = images / images.sum(), mean, right
    return Calibration(ece, share, confidence, accuracy)


def _bin_of(confidence: Array) -> Array:
    return np.asarray(np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1))


def class_changes(target: Array, before: Array, after: Array) -> list[ClassChange]:
    """Return the change of each class that has images, from the largest gain to the largest loss.

    ``target`` are the true classes, ``before`` and ``after`` the predictions, all ``[n]`` and in the same order.
    """
    changes = []
    order = np.argsort(target, kind="stable")
    labels, starts = np.unique(target[order], return_index=True)
    for label, mine in zip(labels.tolist(), np.split(order, starts[1:]), strict=True):
        was, now = before[mine] == label, after[mine] == label
        mended, broken = mine[~was & now], mine[was & ~now]
        changes.append(
            ClassChange(
                label, len(mine), float(was.mean()), float(now.mean()),
                len(mended), _most(before[mended]), len(broken), _most(after[broken]),
            )
        )  # fmt: skip
    return sorted(changes, key=lambda change: (-change.change, -change.mended, change.label))


def _most(given: Array) -> tuple[int, int] | None:
    """Return the most frequent class (of several, the smallest) and its count; None for an empty array."""
    if not len(given):
        return None
    labels, counts = np.unique(given, return_counts=True)
    return int(labels[counts.argmax()]), int(counts.max())


def by_fvu(fvu: Array) -> list[Bin]:
    """Return up to 10 bins of about equal numbers of images (20 or more), by rising FVU; equal values share a bin."""
    bins = max(1, min(_FVU_BINS, len(fvu) // _LEAST))
    edges = np.unique(np.quantile(fvu, np.linspace(0, 1, bins + 1)))
    index = np.clip(np.searchsorted(edges, fvu, side="left") - 1, 0, max(len(edges) - 2, 0))
    pairs = zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    return [Bin(low, high, index == number) for number, (low, high) in enumerate(pairs)]
