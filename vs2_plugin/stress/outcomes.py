"""The outcomes of a stress test: a model's accuracy on each subset, and means over draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

__all__ = ["ALL", "AXES", "Mean", "Outcome", "means"]

#: Axis, along which subsets of the images differ -> the axis in words.
AXES = {
    "present": "share of the classes present",
    "tail": "most frequent to rarest class",
    "images": "test images",
    "batch": "classes in a batch of 64 images",
    "order": "order of the stream",
}
#: Name in place of an axis for all test images.
ALL = "all"


@dataclass(frozen=True)
class Outcome:
    """The accuracy of a model on one draw of a subset."""

    model: str
    """The model string, or the plain model."""
    protocol: str
    """Protocol of the model: which images it uses beside the one that is classified."""
    axis: str
    """Axis of the subset: ``all`` (all test images), or one of :data:`AXES`."""
    value: str
    """Value on the axis."""
    draw: int
    images: int
    classes: int
    """Number of classes of the images."""
    accuracy: float
    """Top-1 accuracy, from 0 to 1."""
    recall: float
    """Mean recall over the classes present."""
    zero_shot: float
    """Accuracy of the plain model on the same images."""


@dataclass(frozen=True)
class Mean:
    """A model's outcomes at one value of an axis."""

    outcomes: tuple[Outcome, ...]

    @property
    def accuracy(self) -> float:
        """Mean accuracy over the draws."""
        return fmean(outcome.accuracy for outcome in self.outcomes)

    @property
    def change(self) -> float:
        """Mean change of accuracy from the plain model, on the same images."""
        return fmean(self._changes)

    @property
    def range(self) -> tuple[float, float]:
        """Smallest and largest change of accuracy in a draw."""
        return min(self._changes), max(self._changes)

    @property
    def spread(self) -> float | None:
        """Standard deviation of the change over the draws; None for a single draw."""
        return stdev(self._changes) if len(self.outcomes) > 1 else None

    @property
    def _changes(self) -> list[float]:
        return [outcome.accuracy - outcome.zero_shot for outcome in self.outcomes]


def means(outcomes: Sequence[Outcome]) -> dict[tuple[str, str, str], Mean]:
    """Return the mean over draws for each model, axis and value, in the order of the outcomes."""
    groups: dict[tuple[str, str, str], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.model, outcome.axis, outcome.value), []).append(outcome)
    return {key: Mean(tuple(group)) for key, group in groups.items()}
