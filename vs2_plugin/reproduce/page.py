"""Writes the tables as one page that opens from disk."""

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
    """A summary of the table."""
    columns: list[str]
    rows: dict[str, list[Measured | None]]
    """Row -> its cells, one per column; None where there is no cell."""
    units: list[str]
    """Units of the cells; a single unit is not repeated in each cell."""
    notes: list[str]


def write_page(tables: Sequence[tuple[Table, Sequence[Measured]]], folder: Path) -> Path:
    """Write ``index.html`` into ``folder`` and return its path.

    Raises:
        DataError: such a file exists that no reproduction wrote, or the folder cannot be written to.
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
    columns = list(dict.fromkeys(measured.cell.column for measured in cells))
    rows: dict[str, list[Measured | None]] = {measured.cell.row: [None] * len(columns) for measured in cells}
    for measured in cells:
        rows[measured.cell.row][columns.index(measured.cell.column)] = measured
    units = list(dict.fromkeys(UNITS[measured.cell.metric] for measured in cells))
    return _Shown(table, list(_told(cells)), columns, rows, units, list(notes(table, cells)))


def _told(cells: Sequence[Measured]) -> Iterator[str]:
    """Yield sentences on how many cells were measured, and on their differences to the published numbers."""
    wanted = [one for one in cells if one.cell.is_wanted]
    yield f"{sum(one.mean is not None for one in wanted)} of {len(wanted)} cells were measured."
    for metric, decimals in METRICS.items():
        gaps = [(one.difference, one) for one in wanted if one.cell.metric == metric and one.difference is not None]
        if gaps:
            mean = fmean(difference for difference, _ in gaps)
            most, where = max(gaps, key=lambda pair: abs(pair[0]))
            yield (
                f"Measured minus published, {UNITS[metric]}: {mean:+.{decimals}f} on average over {len(gaps)}, at "
                f"most {most:+.{decimals}f} ({where.cell.title})."
            )
