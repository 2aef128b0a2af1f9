"""The rows of a report: a result, or the mean of several results that differ in the seed of the SAE only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean, stdev

import numpy as np

from vs2_plugin.results.images import Array, Images
from vs2_plugin.results.runs import Run
from vs2_plugin.results.statistics import (
    Bin,
    Calibration,
    ClassChange,
    Interval,
    by_fvu,
    calibration,
    class_changes,
    interval,
    pair,
    share_interval,
)

__all__ = ["Mean", "Pairing", "Row"]

#: If all confidences are above this, they are not probabilities.
_CERTAIN = 0.9999


@dataclass(frozen=True, eq=False)
class Pairing:
    """Two results of the same images."""

    after: Images
    before: Images
    """The zero-shot result, in its own order."""
    order: Array
    """The indices that put ``before`` into the order of ``after``."""

    @cached_property
    def prediction(self) -> Array:
        """Zero-shot's predictions in the order of ``after``."""
        return self.before.prediction[self.order]

    @cached_property
    def was_correct(self) -> Array:
        """Which of the images of ``after`` zero-shot classified correctly, bool ``[n]``."""
        return np.asarray(self.prediction == self.after.target)

    @cached_property
    def change(self) -> Array:
        """1 for an image that was mended, -1 for a broken one, else 0: int ``[n]``, in the order of ``after``."""
        return np.asarray(self.after.correct.astype(int) - self.was_correct)

    @classmethod
    def of(cls, run: Run, zero: Run | None) -> Pairing | None:
        """Pair the images of a run with those of a zero-shot result; None where they cannot be paired."""
        after, before = run.images, zero and zero.images
        if after is None or not isinstance(before, Images) or after.classes != before.classes:
            return None
        order = pair(after.digest, after.target, before.digest, before.target)
        return None if order is None else cls(after, before, order)


@dataclass(frozen=True, eq=False)
class Row:
    """A result, and its change over zero-shot. Properties without data are None."""

    run: Run
    label: str
    """Method and options."""
    zero: Run | None = field(default=None, repr=False)
    """The zero-shot result that the run is compared with: the one that it recorded itself or else one of the plain
    model. None for a zero-shot result."""
    about: str = ""
    """Other facts that tell this row from others: strength, and k, size and seed of the SAE."""
    shown: str = ""
    """The name of the checkpoint as it stands in the label; empty if it does not."""

    @property
    def title(self) -> str:
        """The label, and the facts that tell this row from others."""
        return f"{self.label} ({self.about})" if self.about else self.label

    @property
    def members(self) -> tuple[Row, ...]:
        """The results that this row stands for: itself, or those of several seeds."""
        return (self,)

    @property
    def spread(self) -> float | None:
        """Standard deviation of the accuracy over the seeds of the SAE; None for a single seed."""
        return None

    def number(self, name: str) -> float | None:
        """Return the metric of that name, if it is a finite number."""
        return self.run.number(name)

    @property
    def top1(self) -> float:
        """Accuracy."""
        return float(self.run.metrics["acc1"])

    @property
    def change(self) -> float | None:
        """Change of the accuracy over zero-shot."""
        return None if self.zero is None else self.top1 - float(self.zero.metrics["acc1"])

    @cached_property
    def interval(self) -> Interval | None:
        """95 % interval of the accuracy, Wilson's."""
        return None if self.run.images is None else share_interval(self.run.images.correct)

    @cached_property
    def pairing(self) -> Pairing | None:
        """The pairing with the zero-shot result; None where images cannot be paired."""
        return Pairing.of(self.run, self.zero)

    @property
    def is_of_other_images(self) -> bool:
        """Whether the images of this run and of its zero-shot result are known, but cannot be paired."""
        return bool(self.run.images and self.zero and self.zero.images and self.pairing is None)

    @cached_property
    def change_interval(self) -> Interval | None:
        """95 % bootstrap interval of the change, over the paired images."""
        both = self.pairing
        return None if both is None else interval(both.change)

    @property
    def mended(self) -> float | None:
        """Images that zero-shot got wrong and this run right."""
        both = self.pairing
        return self._count("vs2_mended") if both is None else int((both.change > 0).sum())

    @property
    def broken(self) -> float | None:
        """Images that zero-shot got right and this run wrong."""
        both = self.pairing
        return self._count("vs2_broken") if both is None else int((both.change < 0).sum())

    def _count(self, name: str) -> int | None:
        number = self.run.number(name)
        return None if number is None else int(number)

    @property
    def seconds(self) -> float | None:
        """Wall clock of the run."""
        return self.run.seconds

    @property
    def peak_memory(self) -> float | None:
        """Peak memory in bytes."""
        return self.run.peak_memory

    @cached_property
    def calibration(self) -> Calibration | None:
        """Calibration of the confidences; None without them, or where all are 1, as with votes."""
        images = self.run.images
        fit = self.run.calibration() if images is None else calibration(images.confidence, images.correct)
        return None if fit is None or np.nanmin(fit.confidence) > _CERTAIN else fit

    @cached_property
    def calibration_before(self) -> Calibration | None:
        """Calibration of zero-shot's confidences on the same images; None where these are not known."""
        if self.pairing is None:
            return self.run.calibration("_before")
        return calibration(self.pairing.before.confidence, self.pairing.before.correct)

    @property
    def ece(self) -> float | None:
        """Expected calibration error; None where the confidences are no probabilities."""
        if self.calibration is None and (self.run.images is not None or self.run.calibration() is not None):
            return None
        return self.run.number("vs2_ece") if self.calibration is None else self.calibration.ece

    @property
    def ece_before(self) -> float | None:
        """Expected calibration error of zero-shot on the same images; None for a zero-shot result."""
        before = self.calibration_before
        return self.run.number("vs2_ece_before") if before is None else before.ece

    @cached_property
    def classes(self) -> list[ClassChange]:
        """The change of every class, from the largest gain to the largest loss; empty where images cannot be paired."""
        both = self.pairing
        return [] if both is None else class_changes(both.after.target, both.prediction, both.after.prediction)

    @cached_property
    def bins(self) -> list[Bin]:
        """Bins of the images by FVU; empty where images cannot be paired, have no FVU, or are too few for two bins."""
        if self.pairing is None or self.pairing.after.fvu is None:
            return []
        bins = by_fvu(self.pairing.after.fvu)
        return bins if len(bins) > 1 else []


@dataclass(frozen=True, eq=False)
class Mean(Row):
    """The mean of results that differ in the seed of the SAE only.

    Classes, bins and calibration are not averaged: they are those of the first seed, whose run is ``run``.
    """

    seeds: tuple[Row, ...] = ()
    """The results by rising seed; at least two."""

    @property
    def members(self) -> tuple[Row, ...]:
        """The results of the seeds."""
        return self.seeds

    @property
    def spread(self) -> float | None:
        """Sample standard deviation of the accuracy over the seeds."""
        return stdev(row.top1 for row in self.seeds)

    def number(self, name: str) -> float | None:
        """Return the mean of the metric over the seeds; None unless all have it."""
        return self._over(lambda row: row.run.number(name))

    @property
    def top1(self) -> float:
        """Mean accuracy."""
        return fmean(row.top1 for row in self.seeds)

    @property
    def change(self) -> float | None:
        """Mean change of the accuracy."""
        return self._over(lambda row: row.change)

    @cached_property
    def interval(self) -> Interval | None:
        """95 % bootstrap interval of the mean accuracy, over images but not over seeds."""
        return self._of_images(lambda row: None if row.run.images is None else row.run.images.correct)

    @cached_property
    def change_interval(self) -> Interval | None:
        """95 % bootstrap interval of the mean change, over images but not over seeds."""
        return self._of_images(lambda row: None if row.pairing is None else row.pairing.change)

    @property
    def mended(self) -> float | None:
        """Mean number of images that were mended."""
        return self._over(lambda row: row.mended)

    @property
    def broken(self) -> float | None:
        """Mean number of images that were broken."""
        return self._over(lambda row: row.broken)

    @property
    def seconds(self) -> float | None:
        """Mean wall clock of a run."""
        return self._over(lambda row: row.seconds)

    @property
    def peak_memory(self) -> float | None:
        """Mean peak memory in bytes."""
        return self._over(lambda row: row.peak_memory)

    @property
    def ece(self) -> float | None:
        """Mean expected calibration error."""
        return self._over(lambda row: row.ece)

    def _over(self, value: Callable[[Row], float | None]) -> float | None:
        values = [value(row) for row in self.seeds]
        numbers = [number for number in values if number is not None]
        return fmean(numbers) if len(numbers) == len(values) else None

    def _of_images(self, values: Callable[[Row], Array | None]) -> Interval | None:
        """Return the bootstrap interval of per-image ``values``, averaged over the seeds; None unless all have them."""
        parts = [values(row) for row in self.seeds]
        aligned = _aligned([row.run.images for row in self.seeds], [part for part in parts if part is not None])
        return None if aligned is None else interval(np.sum(aligned, axis=0) / len(aligned))


def _aligned(images: Sequence[Images | None], values: Sequence[Array]) -> list[Array] | None:
    """Return values ``[n]`` of runs in the order of the first run's images; None unless all have these images."""
    first, *others = images
    if first is None or len(values) < len(images):
        return None
    aligned = [values[0]]
    for other, value in zip(others, values[1:], strict=True):
        order = None if other is None else pair(first.digest, first.target, other.digest, other.target)
        if order is None:
            return None
        aligned.append(value[order])
    return aligned
