"""What comes of a stress test: a model's accuracy on each subset, and means over draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

__all__ = ["ALL", "AXES", "Mean", "Outcome", "means"]

#: What is changed, in words.
AXES = {
    "present": "share of the classes present",
    "tail": "most frequent to rarest class",
    "images": "test images",
    "batch": "classes in a batch of 64 images",
    "order": "order of the stream",
}
#: The axis of all test images.
ALL = "all"


@dataclass(frozen=True)
class Outcome:
    """A model on one draw of a subset."""

    model: str
    """The model string, or the plain model."""
    protocol: str
    """What it sees beside the image at hand."""
    axis: str
    """What is changed: ``all`` (nothing), or one of :data:`AXES`."""
    value: str
    """To what."""
    draw: int
    images: int
    classes: int
    """How many the images are of."""
    accuracy: float
    """Top-1, a share."""
    recall: float
    """The mean of the recalls of the classes present."""
    zero_shot: float
    """The accuracy of the plain model on the same images."""


@dataclass(frozen=True)
class Mean:
    """A model's outcomes at one value of an axis."""

    outcomes: tuple[Outcome, ...]

    @property
    def accuracy(self) -> float:
        """The mean."""
        return fmean(one.accuracy for one in self.outcomes)

    @property
    def change(self) -> float:
        """The mean change over the plain model, on the same images."""
        return fmean(one.accuracy - one.zero_shot for one in self.outcomes)

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest change of a draw."""
        changes = [one.accuracy - one.zero_shot for one in self.outcomes]
        return min(changes), max(changes)

    @property
    def spread(self) -> float | None:
        """Standard deviation of the change over the draws; None for one."""
        changes = [one.accuracy - one.zero_shot for one in self.outcomes]
        return stdev(changes) if len(changes) > 1 else None


def means(outcomes: Sequence[Outcome]) -> dict[tuple[str, str, str], Mean]:
    """Return the mean over draws for each model, axis and value, in the order in which they came."""
    found: dict[tuple[str, str, str], list[Outcome]] = {}
    for one in outcomes:
        found.setdefault((one.model, one.axis, one.value), []).append(one)
    return {key: Mean(tuple(some)) for key, some in found.items()}
