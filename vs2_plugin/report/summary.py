"""Groups results by data set and backbone, and compares each method with the zero-shot result of its backbone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from vs2_plugin.names import LOCAL, SCHEMES
from vs2_plugin.report.naming import base_of, facts_of, label_of, same_but_for_the_seed, seed_of, written
from vs2_plugin.report.rows import Pairing, Row
from vs2_plugin.results.images import Images
from vs2_plugin.results.runs import Run
from vs2_plugin.text import printable

__all__ = ["Curve", "Group", "Section", "summarise"]

_STRENGTH = {"gamma", "lam", "alpha"}
#: Kinds of results, in the order of the report.
_KINDS = ("", "image", "unlabeled", "stream", "transductive", "train", "oracle")
#: Two zero-shot results that agree on fewer images than this were made with other prompts. Precision and batch size
#: change fewer predictions.
_SAME_PROMPTS = 0.98
#: How far apart zero-shot accuracies of the same prompts may be: autocast changes some predictions.
_SAME_ACCURACY = 0.005
#: Data set and backbone of the demo, and of the paper's tables when they run on the stand-in.
_STAND_IN = ("wds/digits", "tiny-clip")
#: Larger values are no valid settings, and matplotlib could not draw an axis up to them.
_LARGEST = 1e12
#: The largest number of rows in one figure.
_MANY = 16

#: Where a result stands in a figure: along a curve, or on a grid.
Place = tuple[float | None, ...]

T = TypeVar("T")
K = TypeVar("K")


@dataclass(frozen=True, eq=False)
class Curve:
    """Results that differ in one setting only."""

    label: str
    points: tuple[tuple[float | None, Row], ...]
    """Value and result, by rising value; the value None (no gate) is last."""


@dataclass(frozen=True, eq=False)
class Group:
    """The results of one backbone on one data set, with the same prompts as far as results show them."""

    backbone: str
    pretrained: str
    rows: list[Row]
    """Zero-shot first, then by the images and labels that methods use, vs2 before other methods."""
    alone: bool = True
    """Whether this group has all results of the backbone: results with other prompts, and so another zero-shot
    accuracy, are in a separate group."""
    common: str = ""
    """The facts that all SAEs of the group have in common, in words."""
    dataset: str = ""

    @property
    def prompts(self) -> str:
        """A name for these results that tells them from those with other prompts; empty if there are none."""
        return "" if self.alone or self.zero is None else f"zero-shot {100 * self.zero.top1:.2f} %"

    @property
    def title(self) -> str:
        """The backbone, its weights, and the name of its prompts."""
        split = self.zero and self.zero.run.fact("split")
        parts = (self.prompts, split and f"split {printable(split)}") if self.prompts else ()
        return ", ".join(filter(None, (self.backbone, self.pretrained, *parts)))

    @property
    def zero(self) -> Row | None:
        """The zero-shot result; None if the group has none."""
        return next((row for row in self.rows if row.run.method is None), None)

    @property
    def images(self) -> Images | None:
        """Per-image results of the first row that has any."""
        return next((row.run.images for row in self.rows if row.run.images), None)

    @property
    def steered(self) -> list[Row]:
        """All rows but zero-shot."""
        return [row for row in self.rows if row.run.method is not None]

    @property
    def methods(self) -> list[Row]:
        """The first row of each method: these have figures of their own."""
        return list({row.run.method: row for row in reversed(self.steered)}.values())[::-1]

    @cached_property
    def kinds(self) -> dict[str, list[Row]]:
        """Kind of result -> its rows, from the largest gain to the largest loss. Zero-shot is first, then kinds without
        labels, from the fewest to the most images seen, then kinds with labels."""
        rows: dict[str, list[Row]] = {}
        for row in sorted(self.rows, key=lambda row: (_kind_rank(row.run), _by_change(row))):
            rows.setdefault(row.run.kind, []).append(row)
        return rows

    @property
    def results(self) -> list[Row]:
        """One row per result: the seeds of an SAE are separate rows."""
        return [member for row in self.rows for member in row.members]

    @property
    def table(self) -> list[Row]:
        """All rows in the order of the table."""
        return [row for rows in self.kinds.values() for row in rows]

    @property
    def is_stand_in(self) -> bool:
        """Whether the group is of the tiny CLIP and the digits that come with the package."""
        name = self.backbone.removeprefix(LOCAL).rstrip("/").rpartition("/")[2]
        return self.backbone.startswith(LOCAL) and (self.dataset, name) == _STAND_IN

    @property
    def main(self) -> list[Row]:
        """The rows of the accuracy figure: all or, where there are many, without most of those in curves and grids."""
        if len(self.rows) <= _MANY:
            return self.table
        shown = {row for curves in self.curves().values() for curve in curves for _, row in curve.points}
        shown |= {row for _, cells in self.grids() for row in cells.values()}
        left_out = shown.difference(self.methods)
        return [row for row in self.table if row not in left_out]

    def curves(self) -> dict[str, list[Curve]]:
        """Return setting -> its curves. Results that tell alpha are drawn along ``alpha``, not gamma or lam."""
        by_key = {"alpha": self._along("alpha", _STRENGTH)}
        by_key["gamma"] = self._along("gamma", {"gamma"}, without="alpha")
        by_key["k"] = self._along("k", {"k", "checkpoint"})  # an SAE of another k is another checkpoint
        for key in sorted(self._options - _STRENGTH - {"k"}):
            by_key[key] = self._along(key, {key})
        return {key: curves for key, curves in by_key.items() if curves}

    def grids(self) -> list[tuple[str, dict[Any, Row]]]:
        """Return label and results by (gamma, lam) of results that differ in these only, with several values each."""

        def place(row: Row) -> Place | None:
            pair = tuple(row.run.number(f"vs2_{name}") for name in ("gamma", "lam"))
            return None if None in pair else pair

        grids = self._alike(_STRENGTH, place)
        return [grid for grid in grids if all(len({pair[axis] for pair in grid[1]}) > 1 for axis in (0, 1))]

    @property
    def _options(self) -> set[str]:
        return set().union(*(row.run.parts.given for row in self.steered))

    def _along(self, key: str, free: set[str], without: str = "") -> list[Curve]:
        """Return curves along ``key`` of results that differ only in settings ``free`` and lack fact ``without``."""

        def place(row: Row) -> Place | None:
            value = row.run.number(f"vs2_{key}")
            if row.run.fact(without) is not None or (value is None and key != "gate"):  # no gate is a value, too
                return None
            return (value,) if abs(value or 0.0) < _LARGEST else None

        curves = []
        for label, rows in self._alike(free, place):
            points = sorted(rows.items(), key=lambda item: (item[0][0] is None, item[0][0] or 0.0))
            if len(points) > 1:
                curves.append(Curve(label, tuple((value, row) for (value,), row in points)))
        return curves

    def _alike(self, free: set[str], place: Callable[[Row], Place | None]) -> list[tuple[str, dict[Place, Row]]]:
        """Return label and rows, by ``place``, of the steered results that agree in method, checkpoint, seeds of the
        SAE, site and all options but the ``free`` ones. Where two folders have a result at one place, they are apart.

        Results without a place, or whose options were chosen automatically, are left out. Of several in one folder at
        one place, the first in the table is taken."""
        fixed = sorted(({"method", "checkpoint", "latents", "site", "split"} | self._options) - free)

        def settings(row: Row) -> tuple[str, ...]:
            return tuple(str(base_of(row.run) if name == "checkpoint" else row.run.setting(name)) for name in fixed)

        found = []
        drawn = (row for row in self.steered if row.run.fact("auto") is None and place(row) is not None)
        for rows in _grouped(drawn, settings).values():
            label = label_of(rows[0].run, rows[0].shown, free)
            for about, mine in _parts_of(rows, place):
                points = {at: row for row in reversed(mine) if (at := place(row)) is not None}
                found.append((", ".join(filter(None, (label, *about))), points))
        return found


@dataclass(frozen=True, eq=False)
class Section:
    """One data set."""

    dataset: str
    language: str
    groups: list[Group]
    others: dict[str, list[Run]]
    """Task -> results without top-1 accuracy."""

    @property
    def title(self) -> str:
        """The data set, and the language unless it is English."""
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
    return _grouped(sorted(runs, key=lambda run: (key(run), _natural(run.model), str(run.path))), key)


def _grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Return key -> items, both in the order of their first appearance."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _weights(run: Run) -> str:
    """Return the weights' tag; empty where the backbone's name already determines the weights."""
    return "" if run.parts.backbone.startswith(SCHEMES) else run.pretrained


def _by_prompts(runs: list[Run]) -> list[list[Run]]:
    """Group runs whose zero-shot predictions are nearly the same, and so their prompts.

    Results do not name their prompts. So the zero-shot predictions of a plain model, or those recorded in a steered
    run, are compared; where there are none, the plain models' accuracies. Steered runs without zero-shot predictions
    join the others if these form one group, else the plain model in their folder if there is exactly one, else a group
    of their own.
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
    groups = [members for _, members in parts]
    if len(groups) == 1:
        return [groups[0] + unknown]
    return _with_folders(groups, unknown)


def _with_folders(told: list[list[Run]], unknown: Sequence[Run]) -> list[list[Run]]:
    """Add runs to the group with a plain model in their folder; those without exactly one form another group."""
    homes = [{run.path.parent for run in members if run.method is None} for members in told]
    left: list[Run] = []
    for run in unknown:
        beside = [members for members, home in zip(told, homes, strict=True) if run.path.parent in home]
        (beside[0] if len(beside) == 1 else left).append(run)
    return told + [left] * bool(left)


def _alike_in(plain: Run, others: list[Run]) -> int | None:
    """Return the index of the zero-shot result that agrees most with ``plain``; None if none has the same prompts."""
    agreed = [_agreement(plain, other) for other in others]
    most = max((share for share in agreed if share is not None), default=None)
    if most is None and all(other.images is not None for other in (plain, *others)):
        return 0 if others else None  # results of other images cannot be compared
    if most is None:
        apart = [abs((plain.number("acc1") or 0.0) - (other.number("acc1") or 0.0)) for other in others]
        return apart.index(min(apart)) if apart and min(apart) <= _SAME_ACCURACY else None
    return agreed.index(most) if most >= _SAME_PROMPTS else None


def _agreement(plain: Run, other: Run) -> float | None:
    """Return the share of images with equal predictions in two zero-shot results; None if the images differ."""
    both = Pairing.of(plain, other)
    return None if both is None else float((both.after.prediction == both.prediction).mean())


def _group(backbone: str, pretrained: str, runs: list[Run], alone: bool) -> Group:
    runs = sorted(runs, key=_rank)
    if runs[0].method is not None:  # no plain model was evaluated; a steered run may have recorded it
        runs = [*[run.plain for run in runs if run.plain][:1], *runs]
    entries = _by_seed(runs)
    facts = [facts_of(entry) for entry in entries]
    common = _common(facts)
    rows = []
    for entry, texts in zip(entries, facts, strict=True):
        own = {name: value for name, value in texts.items() if name not in common}
        shown = own.pop("checkpoint", "")
        first, *others = (
            Row(run, label_of(run, shown), _before(run, runs), written(own), shown) for run in entry
        )
        if not others:
            rows.append(first)
            continue
        own = {name: value for name, value in own.items() if name != "seed"}
        seeds = tuple(replace(row, about=written({**own, "seed": str(seed_of(row.run))})) for row in (first, *others))
        rows.append(replace(first, about=written(own), seeds=seeds))
    return Group(backbone, pretrained, _told_apart(rows), alone, written(common), runs[0].dataset)


def _before(run: Run, runs: Sequence[Run]) -> Run | None:
    """Return the zero-shot result that a steered run is compared with: the one that the run recorded itself, else one
    of the same images, else one of the same split: in the same folder, or any if all may be of the same images."""
    if run.method is None or run.plain is not None:
        return run.plain
    same = [other for other in runs if other.method is None and Pairing.of(run, other) is not None]
    plain = [other for other in runs if other.method is None and other.fact("split") == run.fact("split")]
    beside = [other for other in plain if other.path.parent == run.path.parent]
    alone = plain[:1] if _are_of_the_same(plain) else []
    return next(iter([*same, *beside, *alone]), None)


def _by_seed(runs: Sequence[Run]) -> list[list[Run]]:
    """Group runs that differ in the seed of their SAE only, by rising seed, at the place of the first run."""
    alike: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        if run.method is not None and seed_of(run) is not None:
            alike.setdefault(same_but_for_the_seed(run), []).append(run)
    seeds = [[seed_of(run) for run in group] for group in alike.values()]
    # Runs with the same seed differ in something unknown: they are not averaged.
    joined = [group for group, own in zip(alike.values(), seeds, strict=True) if 1 < len(group) == len(set(own))]
    joined = [*filter(_are_of_the_same, joined)]
    first = {group[0]: sorted(group, key=lambda run: seed_of(run) or 0) for group in joined}
    others = {run for group in joined for run in group[1:]}
    return [first.get(run, [run]) for run in runs if run not in others]


def _parts_of(rows: Sequence[Row], place: Callable[[Row], Place | None]) -> Iterator[tuple[list[str], list[Row]]]:
    """Yield rows of the same seeds of the SAE and of the same state of its checkpoint, and of one folder where two
    folders have a row at the same place, each with words that tell them from the others."""
    seeds = _grouped(rows, _seeds)
    states = _grouped(rows, lambda row: (_seeds(row), _state(row)))
    for (numbers, state), same in states.items():
        about = [written({"seed": numbers})] if len(seeds) > 1 and numbers else []
        about += [f"checkpoint's digest {state}"] if state and len(states) > len(seeds) else []
        places = {(place(row), row.run.path.parent) for row in same}
        if len({at for at, _ in places}) == len(places):
            yield about, same
            continue
        for folder, mine in _grouped(same, lambda row: row.run.path.parent).items():
            yield [*about, "/".join(folder.parts[-2:])], mine


def _state(row: Row) -> str:
    """Return the beginning of the digest of the checkpoint, which differs once it was trained again."""
    return printable(row.run.fact("checkpoint_digest") or "")[:8]


def _seeds(row: Row) -> str:
    numbers = (seed_of(member.run) for member in row.members)
    return ", ".join(str(number) for number in numbers if number is not None)


def _are_of_the_same(runs: Iterable[Run]) -> bool:
    """Return whether all runs with per-image results are of the same images, in any order."""
    images = (run.images.digest for run in runs if run.images)
    return len({(len(digests), int(np.bitwise_xor.reduce(digests))) for digests in images}) < 2


def _common(facts: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return the facts that are equal in all rows that have them."""
    common = {}
    for name in ("checkpoint", "k", "expansion", "latents", "seed"):
        values = [texts[name] for texts in facts if name in texts]
        if len(set(values)) == 1:
            common[name] = values[0]
    return common


def _told_apart(rows: list[Row]) -> list[Row]:
    """Return the rows with unique titles: equal titles get the checkpoint added and, if still equal, the file."""
    for tell in (_checkpoint, _file):
        counts = Counter(row.title for row in rows)
        rows = [
            replace(row, about=", ".join(filter(None, (row.about, tell(row))))) if counts[row.title] > 1 else row
            for row in rows
        ]
    return rows


def _checkpoint(row: Row) -> str:
    name = row.run.fact("checkpoint")
    return f"checkpoint {printable(name)}" if name else ""


def _file(row: Row) -> str:
    return "/".join(row.run.path.parts[-2:])


def _rank(run: Run) -> tuple[bool, bool, int, bool, str, int]:
    """Return the sort key of runs."""
    # A zero-shot result with per-image results comes first: the others are compared with it.
    bare = run.method is None and run.images is None
    return run.method is not None, bare, _kind_rank(run), run.method != "vs2", run.method or "", len(run.parts.words)


def _kind_rank(run: Run) -> int:
    return _KINDS.index(run.kind) if run.kind in _KINDS else len(_KINDS)


def _by_change(row: Row) -> tuple[bool, float]:
    """Return the sort key of rows in a table: the change or, where it is unknown, the accuracy, largest first."""
    return row.run.method is not None, -(row.top1 if row.change is None else row.change)


def _natural(text: str) -> list[str | float]:
    """Return a sort key by which ``n=9`` is before ``n=10``.

    >>> _natural("gamma=-1.5")
    ['gamma=', -1.5, '']
    """
    parts = re.split(r"((?<==)-?\d+(?:\.\d+)?|\d+(?:\.\d+)?)", text)
    return [float(part) if number % 2 else part for number, part in enumerate(parts)]
