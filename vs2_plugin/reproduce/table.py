"""The table of what was published and what was measured: on the terminal, as Markdown and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from vs2_plugin.reproduce.cells import METRICS, Cell, Table

__all__ = ["Measured", "best", "markdown", "write"]

_STAND_IN = (
    "Stand-in: the tiny CLIP and handwritten digits that come with this package, in place of the paper's models and "
    "data sets. These numbers say nothing about the paper's, which are therefore left out."
)
_UNITS = {"accuracy": "top-1 %", "coverage": "steered %", "fvu": "FVU", "gain": "gain, points"}


@dataclass(frozen=True)
class Measured:
    """A cell with what was found."""

    cell: Cell
    values: Mapping[int, float] = field(default_factory=dict)
    """Seed -> number."""
    problems: tuple[str, ...] = ()
    """Why there is no number, or not for every seed."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else belongs to it in the JSON file: results files, checkpoints, labels."""

    @property
    def mean(self) -> float | None:
        """Over the seeds."""
        return fmean(self.values.values()) if self.values else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds, where there are several."""
        return stdev(self.values.values()) if len(self.values) > 1 else None

    @property
    def difference(self) -> float | None:
        """Measured minus published; to an interval, the distance to its nearer end."""
        published, mean = self.cell.published, self.mean
        if published is None or mean is None:
            return None
        low, high = published if isinstance(published, tuple) else (published, published)
        return mean - min(max(mean, low), high)


def best(cell: Cell, candidates: Sequence[Measured]) -> Measured:
    """A cell that is the best of others. It has a number only if all of them have theirs."""
    if any(one.problems or one.mean is None for one in candidates):
        return Measured(cell, problems=("not all of the rows that it is the best of could be measured",))
    chosen = max(candidates, key=lambda one: one.mean)
    return Measured(cell, chosen.values, (), {**chosen.facts, "chosen": chosen.cell.row})


def markdown(table: Table, cells: Sequence[Measured]) -> str:
    """The table as text: a heading, a line per cell, and what there is to say about them."""
    lines = [f"# {table.title}", ""]
    lines += [table.source, ""] if table.source else []
    titles = ["", "", "of", "published", "measured", "difference"]
    rows = [titles, *(_row(measured) for measured in cells)]
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(titles))]
    for number, row in enumerate(rows):
        padded = [text.ljust(width) if column < 3 else text.rjust(width)
                  for column, (text, width) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
        lines.append(f"| {' | '.join(padded)} |")
        if number == 0:
            marks = ["-" * width if column < 3 else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
            lines.append(f"| {' | '.join(marks)} |")
    notes = list(table.notes)
    if table.stand_in:
        notes = [_STAND_IN]
    transductive = list(dict.fromkeys(f"{m.cell.row} / {m.cell.column}" for m in cells if m.facts.get("transductive")))
    if transductive:
        notes.append(f"Transductive, trained on the images that are evaluated: {', '.join(transductive)}.")
    several = {len(m.values) for m in cells} - {0, 1}
    if several:
        notes.append(f"Mean and standard deviation over the seeds of the SAE ({max(several)}).")
    notes += [
        f"{m.cell.row} / {m.cell.column}: that of {m.facts['chosen']!r}, which is best by the numbers of this table. "
        "So it was chosen on the images that are evaluated, and is an upper bound."
        for m in cells
        if "chosen" in m.facts
    ]
    notes += _not_measured(cells)
    return "\n".join([*lines, *(line for note in notes for line in ("", note))]) + "\n"


def _not_measured(cells: Sequence[Measured]) -> Iterator[str]:
    """A line per reason, with the cells that it concerns."""
    reasons: dict[str, list[Cell]] = {}
    for measured in cells:
        for problem in measured.problems:
            reasons.setdefault(problem, []).append(measured.cell)
    wanted = [measured.cell for measured in cells if measured.cell.model or measured.cell.best_of]
    for problem, concerned in reasons.items():
        count = "1 cell" if len(concerned) == 1 else f"{len(concerned)} cells"
        yield f"Not measured, {count} ({', '.join(_names(concerned, wanted))}): {problem}"


def _names(cells: Sequence[Cell], wanted: Sequence[Cell]) -> list[str]:
    """Cells in words: whole columns and rows by their titles, where these have several cells."""
    if len(cells) == len(wanted) > 1:
        return ["all of the table"]
    names, left = [], list(cells)
    for kind in ("column", "row"):
        for title in dict.fromkeys(getattr(cell, kind) for cell in cells):
            mine, all_of_it = ([c for c in some if getattr(c, kind) == title] for some in (left, wanted))
            if len(mine) == len(all_of_it) > 1:
                names.append(f"{kind} {title!r}")
                left = [cell for cell in left if cell not in mine]
    return names + [f"{cell.row} / {cell.column}" for cell in left]


def _row(measured: Measured) -> list[str]:
    cell = measured.cell
    decimals = METRICS[cell.metric]

    def number(value: float | None, sign: str = "") -> str:
        return "" if value is None else f"{value:{sign}.{decimals}f}"

    published = cell.published
    if isinstance(published, tuple):
        published = " to ".join(number(end) for end in published)
    else:
        published = number(published)
    found = number(measured.mean)
    if measured.spread is not None:
        found += f" +- {number(measured.spread)}"
    texts = [cell.row, cell.column, _UNITS[cell.metric], published, found, number(measured.difference, "+")]
    return [text.replace("|", "\\|") for text in texts]


def write(table: Table, cells: Sequence[Measured], folder: Path) -> list[Path]:
    """Write ``STEM.md`` and ``STEM.json`` into ``folder``."""
    paths = [folder / f"{table.path.stem}{suffix}" for suffix in (".md", ".json")]
    paths[0].write_text(markdown(table, cells), encoding="utf-8")
    content = {
        "title": table.title,
        "source": table.source,
        "stand_in": table.stand_in,
        "cells": [_facts(measured) for measured in cells],
    }
    paths[1].write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return paths


def _facts(measured: Measured) -> dict[str, Any]:
    cell = measured.cell
    sae = cell.sae and {"trained_on": cell.sae.datasets, **dict(cell.sae.flags)}
    numbers = {"measured": measured.mean, "spread": measured.spread, "difference": measured.difference}
    return {
        "row": cell.row,
        "column": cell.column,
        "metric": cell.metric,
        "published": cell.published,
        **{name: None if value is None or not math.isfinite(value) else value for name, value in numbers.items()},
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
