"""The tables as one page that opens from disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from vs2_plugin.report.rendering import render, save
from vs2_plugin.reproduce.cells import METRICS, Table
from vs2_plugin.reproduce.table import STAND_IN, UNITS, Measured, notes

__all__ = ["write_page"]

_MARK = "vs2 reproduce"


@dataclass(frozen=True)
class _Shown:
    """A table as the page shows it."""

    table: Table
    sentences: list[str]
    """What it comes to."""
    columns: list[str]
    rows: dict[str, list[Measured | None]]
    """Row -> its cells, a place for each column."""
    units: list[str]
    """Of the cells; if there is one only, no cell names it."""
    notes: list[str]


def write_page(tables: Sequence[tuple[Table, Sequence[Measured]]], folder: Path) -> Path:
    """Write ``index.html`` into ``folder`` and return its path.

    Raises:
        DataError: a file of that name is there that no reproduction wrote, or the folder cannot be written to.
    """
    context = {
        "tables": [_shown(table, cells) for table, cells in tables],
        "stand_in": STAND_IN,
        "units": UNITS,
        "decimals": METRICS,
    }
    [path] = save(folder, {"index.html": render("tables.html", _MARK, context)}, _MARK)
    return path


def _shown(table: Table, cells: Sequence[Measured]) -> _Shown:
    columns = list(dict.fromkeys(one.cell.column for one in cells))
    rows: dict[str, list[Measured | None]] = {one.cell.row: [None] * len(columns) for one in cells}
    for one in cells:
        rows[one.cell.row][columns.index(one.cell.column)] = one
    units = list(dict.fromkeys(UNITS[one.cell.metric] for one in cells))
    return _Shown(table, list(_told(cells)), columns, rows, units, list(notes(table, cells)))


def _told(cells: Sequence[Measured]) -> Iterator[str]:
    """Yield in sentences how many cells were measured, and how far they are from what was published."""
    wanted = [one for one in cells if one.cell.is_wanted]
    yield f"{sum(one.mean is not None for one in wanted)} of {len(wanted)} cells were measured."
    for metric, decimals in METRICS.items():
        apart = [(one.difference, one) for one in wanted if one.cell.metric == metric and one.difference is not None]
        if apart:
            mean = fmean(difference for difference, _ in apart)
            most, where = max(apart, key=lambda pair: abs(pair[0]))
            yield (
                f"Measured minus published, {UNITS[metric]}: {mean:+.{decimals}f} on average over {len(apart)}, at "
                f"most {most:+.{decimals}f} ({where.cell.title})."
            )
