"""Writes the report: a page, a Markdown table and the figures."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vs2_plugin.report.drawing import Picture
from vs2_plugin.report.figures import draw
from vs2_plugin.report.naming import seed_of
from vs2_plugin.report.rendering import fixed, render, save
from vs2_plugin.report.rows import Row
from vs2_plugin.report.summary import Group, Section, summarise
from vs2_plugin.report.verdict import verdict
from vs2_plugin.results.runs import Run
from vs2_plugin.results.statistics import ClassChange, Interval

__all__ = ["Column", "columns", "hints", "notes", "write"]

#: What is said of results of the models and images that come with the package.
STAND_IN = (
    "The tiny CLIP and the handwritten digits that come with this package: they show that the machinery works, and say "
    "nothing about other CLIPs or about photographs."
)
#: Stands in every file that a report writes, near the beginning.
MARK = "vs2 report"
_SHOWN_CLASSES = 8
#: Of more rows of a kind, so many are shown at once; the others open by a click.
_MANY_ROWS, _SHOWN_ROWS = 20, 12


@dataclass(frozen=True)
class Column:
    """A column of the main table."""

    title: str
    cells: list[str]
    """In the order of the rows; empty where there is nothing to say."""
    meaning: str
    bars: tuple[float, ...] = ()
    """Beside each cell, a bar as long as this; none for a column without bars."""


def write(runs: Iterable[Run], folder: Path) -> list[Path]:
    """Write ``index.html``, ``report.md``, ``report.json`` and the figures into ``folder``, and return their paths.

    Raises:
        DataError: a file of that name is there that no report wrote, or the folder cannot be written to.
    """
    runs = list(runs)
    sections = summarise(runs)
    files: dict[str, bytes] = {}
    named: dict[Group, list[tuple[Picture, str]]] = {}
    for section in sections:
        for group in section.groups:
            whose = (group.backbone, group.pretrained, group.prompts) if len(section.groups) > 1 else ()
            for picture in draw(group):
                name = _unused(_slug(section.title, *whose, picture.name), files)
                named.setdefault(group, []).append((picture, name))
                files[name] = picture.png
    context = {
        "notes": notes(runs),
        "sections": sections,
        "columns": columns,
        "parts": parts,
        "verdict": verdict,
        "seed_of": seed_of,
        "stand_in": STAND_IN,
        "hints": hints,
        "gains_and_losses": gains_and_losses,
        "metric_names": metric_names,
        "pictures": named.__getitem__,
        "by_kind": by_kind,
    }
    page = {name: render(name, MARK, context) for name in ("index.html", "report.md")}
    page["report.json"] = json.dumps(
        {"by": MARK, "notes": notes(runs), "rows": list(figures_of(sections))}, indent=1
    ).encode() + b"\n"
    return save(folder, page | files, MARK)


def notes(runs: Sequence[Run]) -> list[str]:
    """Return in sentences what makes results doubtful."""
    found = []
    changed = ", ".join(sorted(str(run.path) for run in runs if run.changed))
    if changed:
        found.append(f"Changed after they were written, according to the digest in them: {changed}.")
    useless = {run.model: run.fact("sae_warning") for run in runs if run.fact("sae_warning")}
    return found + [f"The SAE of {model} is useless: {warning}." for model, warning in sorted(useless.items())]


def figures_of(sections: Iterable[Section]) -> Iterator[dict[str, Any]]:
    """Yield what the report has computed of each result, as plain JSON values; accuracies and ECE as shares."""
    for section in sections:
        for row in (one for group in section.groups for one in group.results):
            found = {
                "acc1": row.top1,
                "interval": row.interval,
                "change": row.change,
                "change_interval": row.change_interval,
                "mended": row.mended,
                "broken": row.broken,
                "ece": row.ece,
                "ece_before": row.ece_before,
                "seconds": row.run.seconds,
                "peak_memory": row.run.peak_memory,
            }
            about = {name: getattr(row.run, name) for name in ("dataset", "model", "pretrained", "language")}
            about |= {"changed": True} if row.run.changed else {}
            yield {**about, **{name: value for name, value in found.items() if value is not None}}


def columns(rows: Sequence[Row]) -> list[Column]:
    """Return the columns of the main table that have something to say, but for the first two."""
    found = [*_changes(rows), *_metrics(rows), *_costs(rows)]
    return [column for column in found if any(column.cells)]


def _between(bounds: Iterable[Interval | None], sign: bool = False) -> list[str]:
    return [f"{fixed(b.low, 1, sign)} to {fixed(b.high, 1, sign)}" if b else "" for b in bounds]


def _changes(rows: Sequence[Row]) -> list[Column]:
    """Return the columns that say most. On a phone only the first ones are seen at once."""
    several = any(row.spread is not None for row in rows)
    over = "; of several seeds of the SAE, the mean +- standard deviation" if several else ""
    these = "; of several seeds, of their mean, which says nothing about other SAEs" if several else ""
    means = "; of several seeds, of their mean, by percentile bootstrap" if several else ""
    changes = [fixed(row.change, sign=True) for row in rows]
    spreads = ["" if row.spread is None else f" +- {fixed(row.spread, 1)}" for row in rows]
    return [
        Column(
            "change, points", [change and change + spread for change, spread in zip(changes, spreads, strict=True)],
            f"of top-1 over zero-shot{over}", tuple(row.change or 0.0 for row in rows),
        ),
        Column("top-1 %", [fixed(row.top1) for row in rows], "share of test images classified correctly"),
        Column(
            "interval of the change", _between((row.change_interval for row in rows), sign=True),
            f"95 %, paired: percentile bootstrap over images that both models classified{these}",
        ),
        Column("95 % interval", _between(row.interval for row in rows), f"of top-1: Wilson's, over images{means}"),
    ]  # fmt: skip


def _metrics(rows: Sequence[Row]) -> list[Column]:
    def metric(name: str, digits: int = 2) -> list[str]:
        return [fixed(row.number(name), digits) for row in rows]

    return [
        Column("top-5 %", metric("acc5"), "share of images with the true class among the first five"),
        Column("recall %", metric("mean_per_class_recall"), "accuracy per class, averaged over the classes"),
        Column("mended", [fixed(row.mended, 0, scale=1) for row in rows], "images that only zero-shot got wrong"),
        Column("broken", [fixed(row.broken, 0, scale=1) for row in rows], "images that only zero-shot got right"),
        Column("coverage %", metric("vs2_coverage", 1), "share of images that the gate let through"),
    ]


def _costs(rows: Sequence[Row]) -> list[Column]:
    return [
        Column(
            "ECE, points", [fixed(row.ece) for row in rows],
            "expected calibration error, 15 equal bins; left out where all confidences are 1, as with votes",
        ),
        Column(
            "seconds", [fixed(row.seconds, 1, scale=1) for row in rows],
            "wall clock of the run, loading included; the first one of a command also pays for what is loaded once",
        ),
        Column(
            "peak memory, GB", [fixed(row.peak_memory, 2, scale=1e-9) for row in rows],
            "of the whole process during the run, including what libraries keep from earlier runs of the same command; "
            "on a GPU, of the device",
        ),
    ]  # fmt: skip


def by_kind(pictures: Iterable[tuple[Picture, str]]) -> dict[str, list[tuple[Picture, str]]]:
    """Return title and figures, those of several rows under one title: what stands before a colon."""
    found: dict[str, list[tuple[Picture, str]]] = {}
    for picture, name in pictures:
        found.setdefault(picture.title.partition(":")[0], []).append((picture, name))
    return {some[0][0].title if len(some) == 1 else f"{kind} ({len(some)})": some for kind, some in found.items()}


def parts(group: Group) -> tuple[dict[str, list[Row]], dict[str, list[Row]]]:
    """Return the rows of the table by their kind, and those that are folded: of many of a kind, those that gain least.
    """
    folded = {kind: rows[_SHOWN_ROWS:] for kind, rows in group.kinds.items() if len(rows) > _MANY_ROWS}
    return {kind: rows[:_SHOWN_ROWS] if kind in folded else rows for kind, rows in group.kinds.items()}, folded


def gains_and_losses(row: Row) -> list[tuple[str, ClassChange, str]]:
    """Return class name, change, and the confusion mended or made, of the largest gains and losses."""
    if row.pairing is None:
        return []
    name = row.pairing.after.name

    def confusion(change: ClassChange) -> str:
        found = change.mended_from if change.change > 0 else change.broken_to
        if found is None:
            return ""
        label, times = found
        of = change.mended if change.change > 0 else change.broken
        return f"{'was' if change.change > 0 else 'became'} {name(label)} ({times} of {of})"

    gains = [change for change in row.classes if change.change > 0][:_SHOWN_CLASSES]
    losses = [change for change in row.classes if change.change < 0][-_SHOWN_CLASSES:]
    return [(name(change.label), change, confusion(change)) for change in (*gains, *losses)]


def metric_names(runs: Sequence[Run]) -> list[str]:
    """Return the names of the numbers that any result holds, but for what steered models say of themselves."""
    names = dict.fromkeys(name for run in runs for name in run.metrics)
    return [name for name in names if not name.startswith("vs2_") and any(run.number(name) is not None for run in runs)]


#: What asks the commands for per-image results.
_PER_IMAGE = "VS2_PER_IMAGE=1 "


def hints(group: Group, section: Section) -> list[tuple[str, str]]:
    """Return what is not shown for lack of data, and the commands that get it."""
    wanted = []

    def want(what: str, *models: str, before: str = "", tool: str = "clip_benchmark eval") -> None:
        words = (*tool.split(), "--model", *models, "--pretrained", group.pretrained, "--dataset", section.dataset)
        wanted.append((what, before + shlex.join(words)))

    if group.zero is None:
        want("Changes over zero-shot: there is no result of the plain model.", group.backbone)
    elif "acc5" not in group.zero.run.metrics:
        want(
            "Top-5 accuracy, time and memory of zero-shot: what is shown of it was recorded in a steered run.",
            group.backbone,
            before=_PER_IMAGE,
        )
    _want_images(group, want)
    if "gate" not in group.curves():
        models = [f"vs2:{group.backbone}@gate={q}" for q in (0.9, 0.95, 0.99)]
        want("Coverage against q: needs results that differ in the gate only.", *models)
    if not group.grids():
        model = f"vs2:{group.backbone}@gamma=1:3:0.25@lam=0:10:1"
        want("The heat map of gamma and lambda: needs results that differ in these two only.", model, tool="vs2 sweep")
    return wanted


def _want_images(group: Group, want: Callable[..., None]) -> None:
    """Want per-image results of the rows that have none, or none that can be paired with zero-shot's."""
    rows = group.results
    bare = [row for row in rows if row.run.images is None]
    if bare:
        whose = "" if len(bare) == len(rows) else f" of {_some(bare)}"
        told = all("vs2_ece" in row.run.metrics for row in bare)  # the metrics themselves say the rest
        what = "classes" if told else "images mended and broken, classes, calibration, time and memory"
        want(
            f"Intervals, accuracy by FVU, {what}{whose}: there are no per-image results.",
            *(row.run.model for row in bare),
            before=_PER_IMAGE,
        )
    elsewhere = [row for row in rows if row.is_of_other_images]
    if elsewhere:
        want(
            f"Comparison image by image of {_some(elsewhere)}: zero-shot was evaluated on other images, or with other "
            "class names.",
            group.backbone,
            *(row.run.model for row in elsewhere),
            before=_PER_IMAGE,
        )


def _some(rows: list[Row]) -> str:
    names = [row.title for row in rows]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _slug(*words: str) -> str:
    """Return a file name that is safe everywhere.

    >>> _slug("wds/digits", "local-dir:tiny-clip", "")
    'wds-digits-local-dir-tiny-clip'
    """
    return re.sub(r"[^A-Za-z0-9_]+", "-", " ".join(word for word in words if word)).strip("-")[:80] or "data"


def _unused(stem: str, files: Container[str]) -> str:
    names = (f"{stem}{'-' if number else ''}{number or ''}.png" for number in itertools.count())
    return next(name for name in names if name not in files)
