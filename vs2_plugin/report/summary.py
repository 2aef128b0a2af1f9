"""Puts results side by side: data sets, backbones, each method against the zero-shot result of its backbone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from vs2_plugin.names import LOCAL, SCHEMES
from vs2_plugin.report.naming import base_of, facts_of, label_of, same_but_for_the_seed, seed_of, written
from vs2_plugin.report.rows import Mean, Pairing, Row
from vs2_plugin.results.images import Images
from vs2_plugin.results.runs import Run
from vs2_plugin.text import printable

__all__ = ["Curve", "Group", "Section", "summarise"]

_STRENGTH = {"gamma", "lam", "alpha"}
#: Kinds of results, in the order in which they stand.
_KINDS = ("", "image", "unlabeled", "stream", "transductive", "train", "oracle")
#: Two zero-shot results that agree on fewer images than this were made with other prompts. Precision and batch size
#: change fewer predictions.
_SAME_PROMPTS = 0.98
#: How far apart zero-shot accuracies of the same prompts may be: autocast moves some images.
_SAME_ACCURACY = 0.005
#: Data set and backbone of the demo, and of tables that are run on the stand-in.
_STAND_IN = ("wds/digits", "tiny-clip")
#: No setting is larger than this, and an axis to it could not be drawn.
_LARGEST = 1e12
#: More rows than this are too many for one figure.
_MANY = 16


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
    """Zero-shot first, then by what they saw and the labels used, vs2 before other methods."""
    alone: bool = True
    """True if all results of the backbone are here: those with other prompts, which have another zero-shot accuracy,
    are in a group of their own."""
    common: str = ""
    """What all of its SAEs have in common, in words."""
    dataset: str = ""

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

    @cached_property
    def kinds(self) -> dict[str, list[Row]]:
        """Kind of result -> the rows, from the largest gain to the largest loss: by what they saw, least first, then
        those that used labels; zero-shot before them all."""
        found: dict[str, list[Row]] = {}
        for row in sorted(self.rows, key=lambda row: (_kind_rank(row.run), _by_change(row))):
            found.setdefault(row.run.kind, []).append(row)
        return found

    @property
    def results(self) -> list[Row]:
        """A row for each result, several seeds of an SAE taken apart."""
        return [one for row in self.rows for one in row.members]

    @property
    def table(self) -> list[Row]:
        """All rows as they stand in a table."""
        return [row for rows in self.kinds.values() for row in rows]

    @property
    def is_stand_in(self) -> bool:
        """Whether it is of the tiny CLIP and the digits that come with the package."""
        name = self.backbone.removeprefix(LOCAL).rstrip("/").rpartition("/")[2]
        return self.backbone.startswith(LOCAL) and (self.dataset, name) == _STAND_IN

    @property
    def main(self) -> list[Row]:
        """The rows without, where there are many, those of a method that curves and grids show."""
        if len(self.rows) <= _MANY:
            return self.table
        shown = {row for curves in self.curves().values() for curve in curves for _, row in curve.points}
        shown |= {row for _, cells in self.grids() for row in cells.values()}
        left_out = shown.difference(self.methods)
        return [row for row in self.table if row not in left_out]

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
            told = [(row.run.number(f"vs2_{key}"), row) for row in reversed(rows) if row.run.fact(without) is None]
            points = {value: row for value, row in told if abs(value or 0.0) < _LARGEST}
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
            settings = (base_of(row.run) if key == "checkpoint" else row.run.setting(key) for key in fixed)
            alike.setdefault(tuple(map(str, settings)), []).append(row)
        return [(label_of(rows[0].run, rows[0].shown, free), rows) for rows in alike.values()]


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
        backbones = _by(ranked, lambda run: (run.parts.backbone, _weights(run)))
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


def _weights(run: Run) -> str:
    """Return the weights' tag, unless the weights come with the backbone's name: it says nothing then."""
    return "" if run.parts.backbone.startswith(SCHEMES) else run.pretrained


def _by_prompts(runs: list[Run]) -> list[list[Run]]:
    """Put runs together whose zero-shot predictions are nearly the same.

    Results do not name their prompts: zero-shot's predictions tell, of a plain model or recorded in a steered run, and
    where none are kept, the plain model's accuracy. Steered runs that recorded none are with the others if these are
    all alike, else with the plain model of their folder, if one alone is there, else by themselves.
    """
    parts: list[tuple[Run, list[Run]]] = []
    unknown = []
    for run in sorted(runs, key=lambda run: run.method is not None):
        plain = run if run.method is None else run.plain
        if plain is None or (plain.images is None and run.method is not None):
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
    return _with_folders(told, unknown)


def _with_folders(told: list[list[Run]], unknown: Sequence[Run]) -> list[list[Run]]:
    """Put runs to the one part that has a plain model in their folder; those that have none are one of their own."""
    homes = [{run.path.parent for run in members if run.method is None} for members in told]
    left: list[Run] = []
    for run in unknown:
        beside = [members for members, home in zip(told, homes, strict=True) if run.path.parent in home]
        (beside[0] if len(beside) == 1 else left).append(run)
    return told + [left] * bool(left)


def _alike_in(plain: Run, others: list[Run]) -> int | None:
    """Return which of some zero-shot results agrees most with ``plain``; None if none has the same prompts."""
    agreed = [_agreement(plain, other) for other in others]
    most = max((share for share in agreed if share is not None), default=None)
    if most is None and all(other.images is not None for other in (plain, *others)):
        return 0 if others else None  # with other images, there is no telling
    if most is None:
        apart = [abs((plain.number("acc1") or 0.0) - (other.number("acc1") or 0.0)) for other in others]
        return apart.index(min(apart)) if apart and min(apart) <= _SAME_ACCURACY else None
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
    entries = _by_seed(runs)
    facts = [facts_of(entry) for entry in entries]
    common = _common(facts)
    rows = []
    for entry, told in zip(entries, facts, strict=True):
        own = {name: value for name, value in told.items() if name not in common}
        shown = own.pop("checkpoint", "")
        first, *others = (
            Row(run, label_of(run, shown), _before(run, zero, runs), written(own), shown) for run in entry
        )
        if not others:
            rows.append(first)
            continue
        own = {name: value for name, value in own.items() if name != "seed"}
        seeds = tuple(replace(row, about=written({**own, "seed": str(seed_of(row.run))})) for row in (first, *others))
        rows.append(Mean(first.run, first.label, first.zero, written(own), shown, seeds))
    return Group(backbone, pretrained, _told_apart(rows), alone, written(common), runs[0].dataset)


def _before(run: Run, zero: Run | None, runs: Sequence[Run]) -> Run | None:
    """Return the zero-shot result that a steered one is compared with: what it recorded itself, else one of the same
    images, as far as these are known, or of the same folder. None where nothing tells which one that is."""
    if run.method is None or run.plain is not None:
        return run.plain
    plain = [other for other in runs if other.method is None]
    same = [other for other in plain if Pairing.of(run, other) is not None]
    beside = [other for other in plain if other.path.parent == run.path.parent]
    alone = [zero] if _are_of_the_same(plain) else []
    return next(iter([*same, *beside, *alone]), None)


def _by_seed(runs: Sequence[Run]) -> list[list[Run]]:
    """Put runs together that differ in the seed of their SAE only, by rising seed, at the place of the first."""
    alike: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        if run.method is not None and seed_of(run) is not None:
            alike.setdefault(same_but_for_the_seed(run), []).append(run)
    seeds = [[seed_of(run) for run in some] for some in alike.values()]
    # The same seed twice is another difference, which nothing tells.
    joined = [some for some, own in zip(alike.values(), seeds, strict=True) if 1 < len(some) == len(set(own))]
    joined = [*filter(_are_of_the_same, joined)]
    first = {some[0]: sorted(some, key=lambda run: seed_of(run) or 0) for some in joined}
    others = {run for some in joined for run in some[1:]}
    return [first.get(run, [run]) for run in runs if run not in others]


def _are_of_the_same(runs: Iterable[Run]) -> bool:
    """Tell whether runs are of the same images in any order, as far as these are known."""
    known = (run.images.digest for run in runs if run.images)
    return len({(len(digests), int(np.bitwise_xor.reduce(digests))) for digests in known}) < 2


def _common(facts: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return the facts that all rows share that tell them at all."""
    found = {}
    for name in ("checkpoint", "k", "expansion", "latents", "seed"):
        values = [told[name] for told in facts if name in told]
        if len(set(values)) == 1:
            found[name] = values[0]
    return found


def _told_apart(rows: list[Row]) -> list[Row]:
    """Return the rows, of which those with one name name their checkpoint too, and where their file lies if need be."""
    for tell in (_checkpoint, _file):
        again = Counter(row.title for row in rows)
        rows = [
            replace(row, about=", ".join(filter(None, (row.about, tell(row))))) if again[row.title] > 1 else row
            for row in rows
        ]
    return rows


def _checkpoint(row: Row) -> str:
    name = row.run.fact("checkpoint")
    return f"checkpoint {printable(name)}" if name else ""


def _file(row: Row) -> str:
    return "/".join(row.run.path.parts[-2:])


def _rank(run: Run) -> tuple[bool, bool, int, bool, str, int]:
    """Return what rows are sorted by."""
    # Of several zero-shot results, the one that has per-image results is the one to compare with.
    bare = run.method is None and run.images is None
    return run.method is not None, bare, _kind_rank(run), run.method != "vs2", run.method or "", len(run.parts.words)


def _kind_rank(run: Run) -> int:
    return _KINDS.index(run.kind) if run.kind in _KINDS else len(_KINDS)


def _by_change(row: Row) -> tuple[bool, float]:
    """Return what rows of a kind are sorted by in a table. Where no change is known, by accuracy."""
    return row.run.method is not None, -(row.top1 if row.change is None else row.change)


def _natural(text: str) -> list[str | float]:
    """Return what sorts ``n=9`` before ``n=10``.

    >>> _natural("gamma=-1.5")
    ['gamma=', -1.5, '']
    """
    parts = re.split(r"((?<==)-?\d+(?:\.\d+)?|\d+(?:\.\d+)?)", text)
    return [float(part) if number % 2 else part for number, part in enumerate(parts)]
