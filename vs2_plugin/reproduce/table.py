"""Writes tables of published and measured numbers: as text for the terminal, as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from vs2_plugin.files import atomic_file
from vs2_plugin.reproduce.cells import METRICS, Cell, Table

__all__ = ["STAND_IN", "UNITS", "Measured", "best", "markdown", "notes", "write"]

#: A note on tables that were measured on the stand-in.
STAND_IN = (
    "Stand-in: the tiny CLIP and handwritten digits that come with this package, in place of the paper's models and "
    "data sets. These numbers say nothing about the paper's, which are therefore left out."
)
#: Metric of a cell -> its unit.
UNITS = {"accuracy": "top-1 %", "coverage": "steered %", "fvu": "FVU", "gain": "gain, points"}


@dataclass(frozen=True)
class Measured:
    """A cell with its measured numbers."""

    cell: Cell
    values: Mapping[int, float] = field(default_factory=dict)
    """Seed -> measured number."""
    problems: tuple[str, ...] = ()
    """Reasons why numbers are missing, for some seeds or all."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Other entries of the JSON file: results files, checkpoints, and so on."""

    @property
    def mean(self) -> float | None:
        """Mean over the seeds; None without numbers."""
        return fmean(self.values.values()) if self.values else None

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over the seeds; None for fewer than two."""
        return stdev(self.values.values()) if len(self.values) > 1 else None

    @property
    def difference(self) -> float | None:
        """Measured minus published; for an interval, minus its nearer end, and 0 inside it."""
        if not self.cell.ends or self.mean is None:
            return None
        return self.mean - min(max(self.mean, self.cell.ends[0]), self.cell.ends[-1])


def best(cell: Cell, candidates: Sequence[Measured]) -> Measured:
    """Return a ``best_of`` cell with the best number of the candidates, or a problem unless all have theirs."""
    means = [candidate.mean for candidate in candidates if candidate.mean is not None and not candidate.problems]
    if len(means) < len(candidates):
        return Measured(cell, problems=("not all of the rows it is the best of could be measured",))
    chosen = candidates[means.index(max(means))]
    return Measured(cell, chosen.values, (), {**chosen.facts, "chosen": chosen.cell.row})


def markdown(table: Table, cells: Sequence[Measured]) -> str:
    """Return the table as Markdown: a heading, a line per cell, and notes."""
    above = table.source or (f"**{STAND_IN}**" if table.stand_in else "")
    lines = _lines([_head(table), *(_row(table, measured) for measured in cells)])
    below = (line for note in notes(table, cells) for line in ("", note))
    return "\n".join([f"# {table.title}", "", *([above, ""] if above else []), *lines, *below]) + "\n"


def _lines(rows: list[list[str]]) -> Iterator[str]:
    """Yield the lines of the table; the first three columns are text, the others numbers."""
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, [*("-" * width for width in widths[:3]), *("-" * (width - 1) + ":" for width in widths[3:])])
    for row in rows:
        words = [text.ljust(width) for text, width in zip(row[:3], widths[:3], strict=True)]
        numbers = [text.rjust(width) for text, width in zip(row[3:], widths[3:], strict=True)]
        yield f"| {' | '.join(words + numbers)} |"


def notes(table: Table, cells: Sequence[Measured]) -> Iterator[str]:
    """Yield the notes on a table and its cells."""
    yield from () if table.stand_in else table.notes
    transductive = dict.fromkeys(measured.cell.title for measured in cells if measured.facts.get("transductive"))
    if transductive:
        yield f"Transductive, trained on the images that are evaluated: {', '.join(transductive)}."
    seeds = max((len(measured.values) for measured in cells), default=0)
    if seeds > 1:
        yield f"Mean and standard deviation over the seeds of the SAE ({seeds})."
    for measured in cells:
        if "chosen" in measured.facts:
            yield (
                f"{measured.cell.title}: that of {measured.facts['chosen']!r}, the best by the numbers of this table. "
                "It was therefore chosen on the images that are evaluated, and is an upper bound."
            )
    yield from _not_measured(cells)


def _not_measured(cells: Sequence[Measured]) -> Iterator[str]:
    """Yield a line per problem, with the cells that have it."""
    reasons: dict[str, list[Cell]] = {}
    for measured in cells:
        for problem in measured.problems:
            reasons.setdefault(problem, []).append(measured.cell)
    wanted = [measured.cell for measured in cells if measured.cell.is_wanted]
    for problem, concerned in reasons.items():
        count = "1 cell" if len(concerned) == 1 else f"{len(concerned)} cells"
        yield f"Not measured, {count} ({', '.join(_names(concerned, wanted))}): {problem}"


def _names(cells: Sequence[Cell], wanted: Sequence[Cell]) -> list[str]:
    """Return the cells' names; whole columns and rows of several cells are named by their titles."""
    if len(cells) == len(wanted) > 1:
        return ["all of the table"]
    names, left = [], list(cells)
    for kind in ("column", "row"):
        for title in dict.fromkeys(getattr(cell, kind) for cell in cells):
            mine = [cell for cell in left if getattr(cell, kind) == title]
            if len(mine) == sum(getattr(cell, kind) == title for cell in wanted) > 1:
                names.append(f"{kind} {title!r}")
                left = [cell for cell in left if cell not in mine]
    return names + [cell.title for cell in left]


def _head(table: Table) -> list[str]:
    if table.stand_in:  # its columns still have the names of the replaced models
        return ["", "in place of", "of", "measured"]
    return ["", "", "of", "published", "measured", "difference"]


def _row(table: Table, measured: Measured) -> list[str]:
    cell = measured.cell
    decimals = METRICS[cell.metric]

    def number(value: float | None, sign: str = "") -> str:
        return "" if value is None else f"{value:{sign}.{decimals}f}"

    published = " to ".join(map(number, cell.ends))
    mean = number(measured.mean)
    if measured.spread is not None:
        mean += f" +- {number(measured.spread)}"
    texts = [cell.row, cell.column, UNITS[cell.metric]]
    texts += [mean] if table.stand_in else [published, mean, number(measured.difference, "+")]
    return [text.replace("|", "\\|") for text in texts]


def write(table: Table, cells: Sequence[Measured], folder: Path) -> None:
    """Write ``STEM.md`` and ``STEM.json`` into ``folder``."""
    content = {
        "title": table.title,
        "source": table.source,
        "stand_in": table.stand_in,
        "cells": [_json(measured) for measured in cells],
    }
    for suffix, text in ((".md", markdown(table, cells)), (".json", json.dumps(content, indent=1) + "\n")):
        with atomic_file(folder / f"{table.path.stem}{suffix}") as scratch:
            scratch.write_text(text, encoding="utf-8")


def _json(measured: Measured) -> dict[str, Any]:
    cell = measured.cell
    sae = cell.sae and {"trained_on": cell.sae.datasets, **dict(cell.sae.flags)}
    numbers = {"measured": measured.mean, "spread": measured.spread, "difference": measured.difference}
    return {
        "row": cell.row,
        "column": cell.column,
        "metric": cell.metric,
        "published": cell.published,
        **numbers,
        "values": {str(seed): value for seed, value in measured.values.items()},
        "model": cell.model,
        **({"best_of": cell.best_of} if cell.best_of else {}),
        "backbone": cell.backbone,
        "weights": cell.weights,
        "dataset": cell.dataset,
        "prompts": cell.prompts or "harness",
        "sae": sae,
        **measured.facts,
        "problem": "; ".join(measured.problems) or None,
    }
