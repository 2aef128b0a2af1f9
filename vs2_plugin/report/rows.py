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

__all__ = ["Pairing", "Row"]

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
    """A result, or the mean of several that differ in the seed of the SAE only, and its change over zero-shot.

    Properties without data are None. Classes, bins and calibration are not averaged: they are those of the first seed.
    """

    run: Run
    """The result; of several seeds, that of the first."""
    label: str
    """Method and options."""
    zero: Run | None = field(default=None, repr=False)
    """The zero-shot result that the run is compared with: the one that it recorded itself or else one of the plain
    model. None for a zero-shot result."""
    about: str = ""
    """Other facts that tell this row from others: strength, and k, size and seed of the SAE."""
    shown: str = ""
    """The name of the checkpoint as it stands in the label; empty if it does not."""
    seeds: tuple[Row, ...] = ()
    """The results by rising seed, at least two; empty for a single result."""

    @property
    def title(self) -> str:
        """The label, and the facts that tell this row from others."""
        return f"{self.label} ({self.about})" if self.about else self.label

    @property
    def members(self) -> tuple[Row, ...]:
        """The results that this row stands for: itself, or those of several seeds."""
        return self.seeds or (self,)

    @property
    def is_changed(self) -> bool:
        """Whether a results file was changed after it was written."""
        return any(row.run.changed for row in self.members)

    def _over(self, value: Callable[[Row], float | None]) -> float | None:
        """Return the value of the result, or its mean over the seeds; None unless all have it."""
        if not self.seeds:
            return value(self)
        numbers = [number for row in self.seeds if (number := value(row)) is not None]
        return fmean(numbers) if len(numbers) == len(self.seeds) else None

    def _of_images(self, values: Callable[[Row], Array | None]) -> Interval | None:
        """Return the 95 % bootstrap interval of the mean of per-image ``values``, over images but not over seeds; None
        unless all seeds have them."""
        parts = [values(row) for row in self.members]
        aligned = _aligned([row.run.images for row in self.members], [part for part in parts if part is not None])
        return None if aligned is None else interval(np.sum(aligned, axis=0) / len(aligned))

    @property
    def top1(self) -> float:
        """Accuracy."""
        return fmean(float(row.run.metrics["acc1"]) for row in self.members)

    @property
    def spread(self) -> float | None:
        """Sample standard deviation of the accuracy over the seeds of the SAE; None for a single seed."""
        return stdev(row.top1 for row in self.seeds) if self.seeds else None

    def number(self, name: str) -> float | None:
        """Return the metric of that name, if it is a finite number."""
        return self._over(lambda row: row.run.number(name))

    @property
    def change(self) -> float | None:
        """Change of the accuracy over zero-shot."""
        return self._over(lambda row: None if row.zero is None else row.top1 - float(row.zero.metrics["acc1"]))

    @cached_property
    def interval(self) -> Interval | None:
        """95 % interval of the accuracy: Wilson's, or of several seeds by bootstrap."""
        if self.seeds:
            return self._of_images(lambda row: None if row.run.images is None else row.run.images.correct)
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
        return self._of_images(lambda row: None if row.pairing is None else row.pairing.change)

    @property
    def mended(self) -> float | None:
        """Images that zero-shot got wrong and this run right."""
        return self._over(lambda row: row._moved("vs2_mended", 1))

    @property
    def broken(self) -> float | None:
        """Images that zero-shot got right and this run wrong."""
        return self._over(lambda row: row._moved("vs2_broken", -1))

    def _moved(self, name: str, way: int) -> int | None:
        """Return the number of images that changed in a way (1: mended, -1: broken), else the metric that tells it."""
        number = self.run.number(name) if self.pairing is None else (self.pairing.change == way).sum()
        return None if number is None else int(number)

    @property
    def seconds(self) -> float | None:
        """Wall clock of the run."""
        return self._over(lambda row: row.run.seconds)

    @property
    def peak_memory(self) -> float | None:
        """Peak memory in bytes."""
        return self._over(lambda row: row.run.peak_memory)

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
        return self._over(Row._ece)

    def _ece(self) -> float | None:
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
