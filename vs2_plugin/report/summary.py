"""Puts results side by side: data sets, backbones, each method against the zero-shot result of its backbone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

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
)

__all__ = ["Curve", "Group", "Row", "Section", "summarise"]

_STRENGTH = {"gamma", "lam", "alpha"}
_LABELS = ("none", "train", "oracle")
#: Confidences above this, all of them, are not meant as probabilities.
_CERTAIN = 0.9999
#: Two zero-shot results that agree on fewer images than this were made with other prompts. Precision and batch size
#: change fewer predictions.
_SAME_PROMPTS = 0.98
#: More rows than this are too many for one figure.
_MANY = 16


@dataclass(frozen=True, eq=False)
class Pairing:
    """Two results of the same images."""

    after: Images
    before: Images
    """Zero-shot's, in an order of its own."""
    order: Array
    """The indices that put them into the order of ``after``."""

    @cached_property
    def prediction(self) -> Array:
        """Zero-shot's predictions in the order of ``after``."""
        return self.before.prediction[self.order]

    @cached_property
    def was_correct(self) -> Array:
        """Which of the images of ``after`` zero-shot classified correctly, bool ``[n]``."""
        return np.asarray(self.prediction == self.after.target)

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
    """A result, and what it changes over zero-shot. What it has no data for is None."""

    run: Run
    label: str
    zero: Run | None = field(default=None, repr=False)
    """The zero-shot result that it is compared with: of the plain model or, where there is none of the same images, the
    one that the run recorded itself. None for a zero-shot result."""

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
        """95 % bootstrap interval of the accuracy."""
        return None if self.run.images is None else interval(self.run.images.correct)

    @cached_property
    def pairing(self) -> Pairing | None:
        """The same images before and after; None where they cannot be paired."""
        return Pairing.of(self.run, self.zero)

    @cached_property
    def change_interval(self) -> Interval | None:
        """95 % bootstrap interval of the change, over the same images."""
        both = self.pairing
        return None if both is None else interval(both.after.correct.astype(int) - both.was_correct)

    @property
    def mended(self) -> int | None:
        """Images that zero-shot got wrong and this run right."""
        both = self.pairing
        return self._count("vs2_mended") if both is None else int((~both.was_correct & both.after.correct).sum())

    @property
    def broken(self) -> int | None:
        """Images that zero-shot got right and this run wrong."""
        both = self.pairing
        return self._count("vs2_broken") if both is None else int((both.was_correct & ~both.after.correct).sum())

    def _count(self, name: str) -> int | None:
        number = self.run.number(name)
        return None if number is None else int(number)

    @cached_property
    def calibration(self) -> Calibration | None:
        """How well the confidences fit. None where all are 1, which says nothing: so it is with votes."""
        images = self.run.images
        found = self.run.calibration() if images is None else calibration(images.confidence, images.correct)
        return None if found is None or np.nanmin(found.confidence) > _CERTAIN else found

    @cached_property
    def calibration_before(self) -> Calibration | None:
        """How well those of zero-shot fit, on the same images; None where they are not known."""
        if self.pairing is None:
            return self.run.calibration("_before")
        return calibration(self.pairing.before.confidence, self.pairing.before.correct)

    @property
    def ece(self) -> float | None:
        """Expected calibration error."""
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
        """Every class, from the largest gain to the largest loss; empty where images cannot be paired."""
        both = self.pairing
        return [] if both is None else class_changes(both.after.target, both.prediction, both.after.prediction)

    @cached_property
    def bins(self) -> list[Bin]:
        """The images by FVU; empty where images cannot be paired, have no FVU, or are too few for two bins."""
        if self.pairing is None or self.pairing.after.fvu is None:
            return []
        bins = by_fvu(self.pairing.after.fvu)
        return bins if len(bins) > 1 else []


@dataclass(frozen=True, eq=False)
class Curve:
    """Results that differ in one setting only."""

    label: str
    points: tuple[tuple[float | None, Row], ...]
    """Value and result, by rising value; the value None (no gate) stands last."""


@dataclass(frozen=True, eq=False)
class Group:
    """The results of one backbone on one data set, with the same prompts as far as that can be told."""

    backbone: str
    pretrained: str
    rows: list[Row]
    """Zero-shot first, then by the labels used, vs2 before other methods."""
    alone: bool = True
    """True if all results of the backbone are here: those with other prompts, which have another zero-shot accuracy,
    are in a group of their own."""

    @property
    def prompts(self) -> str:
        """A name for these results beside those with other prompts; empty if there are none."""
        return "" if self.alone or self.zero is None else f"zero-shot {100 * self.zero.top1:.2f} %"

    @property
    def title(self) -> str:
        """The backbone, its weights, and what tells its prompts."""
        prompts = self.prompts and f"prompts with {self.prompts}"
        return ", ".join(filter(None, (self.backbone, self.pretrained, prompts)))

    @property
    def zero(self) -> Row | None:
        """The zero-shot result that the others are compared with."""
        return next((row for row in self.rows if row.run.method is None), None)

    @property
    def images(self) -> Images | None:
        """Per-image results of one of the rows."""
        return next((row.run.images for row in self.rows if row.run.images), None)

    @property
    def steered(self) -> list[Row]:
        """All but zero-shot."""
        return [row for row in self.rows if row.run.method is not None]

    @property
    def methods(self) -> list[Row]:
        """The first result of each method: the ones with figures of their own."""
        return list({row.run.method: row for row in reversed(self.steered)}.values())[::-1]

    @property
    def main(self) -> list[Row]:
        """The rows without, where there are many, those of a method that curves and grids show."""
        if len(self.rows) <= _MANY:
            return self.rows
        shown = {row for curves in self.curves().values() for curve in curves for _, row in curve.points}
        shown |= {row for _, cells in self.grids() for row in cells.values()}
        left_out = shown.difference(self.methods)
        return [row for row in self.rows if row not in left_out]

    def curves(self) -> dict[str, list[Curve]]:
        """Return curves along each setting. ``alpha`` stands for gamma and lam where both are there."""
        found = {"alpha": self._along("alpha", _STRENGTH)}
        found["gamma"] = self._along("gamma", {"gamma"}, without="alpha")
        found["k"] = self._along("k", {"k", "checkpoint"})  # an SAE of another k is another checkpoint
        for key in sorted(self._options - _STRENGTH - {"k"}):
            found[key] = self._along(key, {key})
        return {key: curves for key, curves in found.items() if curves}

    def grids(self) -> list[tuple[str, dict[tuple[float, float], Row]]]:
        """Return label and results by (gamma, lam), of results that differ in these only; at least two of each."""
        grids = []
        for label, rows in self._alike(_STRENGTH):
            cells = {}
            for row in reversed(rows):
                gamma, lam = (row.run.number(f"vs2_{name}") for name in ("gamma", "lam"))
                if gamma is not None and lam is not None:
                    cells[gamma, lam] = row
            if all(len({key[axis] for key in cells}) > 1 for axis in (0, 1)):
                grids.append((label, cells))
        return grids

    @property
    def _options(self) -> set[str]:
        return set().union(*(row.run.parts.given for row in self.steered))

    def _along(self, key: str, free: set[str], without: str = "") -> list[Curve]:
        """Return curves along a setting through results that differ in ``free`` ones only and have none ``without``."""
        curves = []
        for label, rows in self._alike(free):
            points = {row.run.number(f"vs2_{key}"): row for row in reversed(rows) if row.run.fact(without) is None}
            if key != "gate":  # there, None is one of the values: no gate
                points.pop(None, None)
            values = sorted(points, key=lambda value: (value is None, value or 0.0))
            if len(values) > 1:
                curves.append(Curve(label, tuple((value, points[value]) for value in values)))
        return curves

    def _alike(self, free: set[str]) -> list[tuple[str, list[Row]]]:
        """Return the steered results that agree in method, checkpoint, site and all options but the ``free`` ones.

        One whose options were chosen automatically stands for itself."""
        fixed = sorted(({"method", "checkpoint", "latents", "site"} | self._options) - free)
        alike: dict[tuple[str, ...], list[Row]] = {}
        for row in self.steered:
            if row.run.fact("auto") is not None:
                continue
            alike.setdefault(tuple(str(row.run.setting(key)) for key in fixed), []).append(row)
        return [(_label(rows[0].run, free), rows) for rows in alike.values()]


@dataclass(frozen=True, eq=False)
class Section:
    """One data set."""

    dataset: str
    language: str
    groups: list[Group]
    others: dict[str, list[Run]]
    """Task -> results that have no accuracy."""

    @property
    def title(self) -> str:
        """The data set, and the language where it is not English."""
        return self.dataset if self.language == "en" else f"{self.dataset} ({self.language})"


def summarise(runs: Iterable[Run]) -> list[Section]:
    """Make one section per data set and language, in alphabetical order, English first."""
    sections = []
    data_sets = _by(runs, lambda run: (run.dataset, run.language != "en", run.language))
    for (dataset, _, language), mine in data_sets.items():
        # A linear probe or a multi-label data set has metrics of its own.
        ranked = [run for run in mine if run.task == "zeroshot_classification" and run.number("acc1") is not None]
        rest = [run for run in mine if run not in ranked]
        backbones = _by(ranked, lambda run: (run.parts.backbone, run.pretrained))
        groups = []
        for key, members in backbones.items():
            parts = _by_prompts(members)
            groups += [_group(key[0], key[1], part, alone=len(parts) == 1) for part in parts]
        sections.append(Section(dataset, language, groups, _by(rest, lambda run: run.task)))
    return sections


def _by(runs: Iterable[Run], key: Callable[[Run], Any]) -> dict[Any, list[Run]]:
    found: dict[Any, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (key(run), _natural(run.model), str(run.path))):
        found.setdefault(key(run), []).append(run)
    return found


def _by_prompts(runs: list[Run]) -> list[list[Run]]:
    """Put runs together whose zero-shot predictions are nearly the same.

    Results do not name their prompts: zero-shot's predictions tell, of a plain model or recorded in a steered run. Runs
    of which none are known are with the others if these are all alike, else by themselves.
    """
    parts: list[tuple[Run, list[Run]]] = []
    unknown = []
    for run in sorted(runs, key=lambda run: run.method is not None):
        plain = run if run.method is None else run.plain
        if plain is None or plain.images is None:
            unknown.append(run)
            continue
        place = _alike_in(plain, [other for other, _ in parts])
        if place is None:
            parts.append((plain, [run]))
        else:
            parts[place][1].append(run)
    told = [members for _, members in parts]
    if len(told) == 1:
        return [told[0] + unknown]
    return told + [unknown] * bool(unknown)


def _alike_in(plain: Run, others: list[Run]) -> int | None:
    """Return which of some zero-shot results agrees most with ``plain``; None if none has the same prompts."""
    agreed = [_agreement(plain, other) for other in others]
    most = max((share for share in agreed if share is not None), default=None)
    if most is None:  # with other images, there is no telling
        return 0 if others else None
    return agreed.index(most) if most >= _SAME_PROMPTS else None


def _agreement(plain: Run, other: Run) -> float | None:
    """Return the share of images that two zero-shot results give one class; None if they are not of the same ones."""
    both = Pairing.of(plain, other)
    return None if both is None else float((both.after.prediction == both.prediction).mean())


def _group(backbone: str, pretrained: str, runs: list[Run], alone: bool) -> Group:
    runs = sorted(runs, key=_rank)
    if runs[0].method is not None:  # no plain model was evaluated; a steered run may have recorded it
        runs = [*[run.plain for run in runs if run.plain][:1], *runs]
    zero = runs[0] if runs[0].method is None else None
    labels = [_label(run) for run in runs]
    again = Counter(labels)
    rows = []
    for run, label in zip(runs, labels, strict=True):
        # Two files of one model are told apart by where they lie.
        where = f" ({'/'.join(run.path.parts[-2:])})" if again[label] > 1 else ""
        recorded = run.plain if Pairing.of(run, zero) is None else None
        rows.append(Row(run, label + where, None if run.method is None else recorded or zero))
    return Group(backbone, pretrained, rows, alone)


def _rank(run: Run) -> tuple[bool, bool, int, bool, str, int]:
    """Return what rows are sorted by."""
    labels = _LABELS.index(run.labels) if run.labels in _LABELS else len(_LABELS)
    # Of several zero-shot results, the one that has per-image results is the one to compare with.
    bare = run.method is None and run.images is None
    return run.method is not None, bare, labels, run.method != "vs2", run.method or "", len(run.parts.words)


def _label(run: Run, without: Iterable[str] = ()) -> str:
    """Return the method with its options, but for those named."""
    if run.method is None:
        return "zero-shot"
    kept = (part for part in run.parts.words if part.partition("=")[0] not in without)
    return " ".join([run.method, *(f"@{part}" for part in kept)])


def _natural(text: str) -> list[str | float]:
    """Return what sorts ``n=9`` before ``n=10``.

    >>> _natural("gamma=-1.5")
    ['gamma=', -1.5, '']
    """
    parts = re.split(r"((?<==)-?\d+(?:\.\d+)?|\d+(?:\.\d+)?)", text)
    return [float(part) if number % 2 else part for number, part in enumerate(parts)]
