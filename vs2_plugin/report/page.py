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

#: A note on results of the model and images that come with the package.
STAND_IN = (
    "The tiny CLIP and the handwritten digits that come with this package: they show that the machinery works, and say "
    "nothing about other CLIPs or about photographs."
)
#: Stands near the beginning of every file that a report writes; files with it may be overwritten.
MARK = "vs2 report"
_SHOWN_CLASSES = 8
#: Of a kind with more than _MANY_ROWS rows, _SHOWN_ROWS are shown; the others are folded.
_MANY_ROWS, _SHOWN_ROWS = 20, 12


@dataclass(frozen=True)
class Column:
    """A column of the main table."""

    title: str
    cells: list[str]
    """A text per row; empty where there is no value."""
    meaning: str
    bars: tuple[float, ...] = ()
    """Length of the bar beside each cell; empty for a column without bars."""


def write(runs: Iterable[Run], folder: Path) -> list[Path]:
    """Write ``index.html``, ``report.md``, ``report.json`` and the figures into ``folder``, and return their paths.

    Raises:
        DataError: a file of such a name exists that no report wrote, or the folder cannot be written to.
    """
    runs = list(runs)
    sections = summarise(runs)
    files: dict[str, bytes] = {}
    pictures: dict[Group, list[tuple[Picture, str]]] = {}
    for section in sections:
        for group in section.groups:
            names = (group.backbone, group.pretrained, group.prompts) if len(section.groups) > 1 else ()
            for picture in draw(group):
                name = _unused(_slug(section.title, *names, picture.name), files)
                pictures.setdefault(group, []).append((picture, name))
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
        "pictures": pictures.__getitem__,
        "by_kind": by_kind,
    }
    page = {name: render(name, MARK, context) for name in ("index.html", "report.md")}
    page["report.json"] = json.dumps(
        {"by": MARK, "notes": notes(runs), "rows": list(figures_of(sections))}, indent=1
    ).encode() + b"\n"
    return save(folder, page | files, MARK)


def notes(runs: Sequence[Run]) -> list[str]:
    """Return a sentence for each reason to doubt results."""
    sentences = []
    changed = ", ".join(sorted(str(run.path) for run in runs if run.changed))
    if changed:
        sentences.append(f"Changed after they were written, according to the digest in them: {changed}.")
    useless = {run.model: run.fact("sae_warning") for run in runs if run.fact("sae_warning")}
    return sentences + [f"The SAE of {model} is useless: {warning}." for model, warning in sorted(useless.items())]


def figures_of(sections: Iterable[Section]) -> Iterator[dict[str, Any]]:
    """Yield the report's figures of each result as plain JSON values; accuracies and ECE are shares."""
    for section in sections:
        for row in (member for group in section.groups for member in group.results):
            figures = {
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
            yield {**about, **{name: value for name, value in figures.items() if value is not None}}


def columns(rows: Sequence[Row]) -> list[Column]:
    """Return the columns of the main table that have any values, but for the first two."""
    candidates = [*_changes(rows), *_metrics(rows), *_costs(rows)]
    return [column for column in candidates if any(column.cells)]


def _between(bounds: Iterable[Interval | None], sign: bool = False) -> list[str]:
    return [f"{fixed(b.low, 1, sign)} to {fixed(b.high, 1, sign)}" if b else "" for b in bounds]


def _changes(rows: Sequence[Row]) -> list[Column]:
    """Return the most important columns, the first of the table: a phone shows only a few without scrolling."""
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
        Column("coverage %", metric("vs2_coverage", 1), "share of images that the gate of the last site let through"),
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
    """Group figures by title: those of several rows share the part of the title before the colon."""
    groups: dict[str, list[tuple[Picture, str]]] = {}
    for picture, name in pictures:
        groups.setdefault(picture.title.partition(":")[0], []).append((picture, name))
    return {group[0][0].title if len(group) == 1 else f"{kind} ({len(group)})": group for kind, group in groups.items()}


def parts(group: Group) -> tuple[dict[str, list[Row]], dict[str, list[Row]]]:
    """Return the rows of the table by their kind, and the folded rows: where a kind has many, those that gain least."""
    folded = {kind: rows[_SHOWN_ROWS:] for kind, rows in group.kinds.items() if len(rows) > _MANY_ROWS}
    return {kind: rows[:_SHOWN_ROWS] if kind in folded else rows for kind, rows in group.kinds.items()}, folded


def gains_and_losses(row: Row) -> list[tuple[str, ClassChange, str]]:
    """Return class name, change, and most frequent confusion mended or made, of the largest gains and losses."""
    if row.pairing is None:
        return []
    name = row.pairing.after.name

    def confusion(change: ClassChange) -> str:
        most = change.mended_from if change.change > 0 else change.broken_to
        if most is None:
            return ""
        label, times = most
        of = change.mended if change.change > 0 else change.broken
        return f"{'was' if change.change > 0 else 'became'} {name(label)} ({times} of {of})"

    gains = [change for change in row.classes if change.change > 0][:_SHOWN_CLASSES]
    losses = [change for change in row.classes if change.change < 0][-_SHOWN_CLASSES:]
    return [(name(change.label), change, confusion(change)) for change in (*gains, *losses)]


def metric_names(runs: Sequence[Run]) -> list[str]:
    """Return the names of the metrics that are a number in any result, without those that steered models add."""
    names = dict.fromkeys(name for run in runs for name in run.metrics)
    return [name for name in names if not name.startswith("vs2_") and any(run.number(name) is not None for run in runs)]


#: Makes the commands write per-image results.
_PER_IMAGE = "VS2_PER_IMAGE=1 "


def hints(group: Group, section: Section) -> list[tuple[str, str]]:
    """Return what the report cannot show for lack of data, with the command that creates the data."""
    missing = []

    def want(what: str, *models: str, before: str = "", tool: str = "clip_benchmark eval") -> None:
        words = (*tool.split(), "--model", *models, "--pretrained", group.pretrained, "--dataset", section.dataset)
        missing.append((what, before + shlex.join(words)))

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
    return missing


def _want_images(group: Group, want: Callable[..., None]) -> None:
    """Call ``want`` for rows without per-image results, and for rows whose images cannot be paired with zero-shot's."""
    rows = group.results
    bare = [row for row in rows if row.run.images is None]
    if bare:
        whose = "" if len(bare) == len(rows) else f" of {_some(bare)}"
        complete = all("vs2_ece" in row.run.metrics for row in bare)  # the rest is in the metrics
        what = "classes" if complete else "images mended and broken, classes, calibration, time and memory"
        want(
            f"Intervals, accuracy by FVU, {what}{whose}: there are no per-image results.",
            *(row.run.model for row in bare),
            before=_PER_IMAGE,
        )
    unpaired = [row for row in rows if row.is_of_other_images]
    if unpaired:
        want(
            f"Comparison image by image of {_some(unpaired)}: zero-shot was evaluated on other images, or with other "
            "class names.",
            group.backbone,
            *(row.run.model for row in unpaired),
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
