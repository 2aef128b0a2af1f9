"""The table of a classification: its columns, the rows finished so far, and its file formats.

While images are classified, rows are saved in a folder beside the table, so that an interrupted run can continue:

<OUT>.part/
  settings.json     the settings that the rows depend on
  rows.jsonl        a row per line, after a digest of its text, in the order of the images
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from vs2_plugin.errors import SettingError
from vs2_plugin.files import alone, atomic_file, naming
from vs2_plugin.model.predictions import Predictions

__all__ = ["Part", "Row", "columns", "require_format", "rows_of", "write_table"]

#: A row of the table, or a part of one: column -> value.
Row = dict[str, Any]
#: Best classes of an image that the table holds.
_TOP = 5
#: Rows of a Parquet file that are held in memory at a time.
_GROUP = 10_000
#: Bytes of a line before a row's text.
_LEAD = 17


def columns(classes: int) -> dict[str, type]:
    """Return the columns of a table, name -> type, for that number of classes."""
    further = {f"{name}_{place}": kind for place in range(2, min(_TOP, classes) + 1) for name, kind in _BEST.items()}
    return {"path": str, **_BEST, **further, **_REST}


_BEST: dict[str, type] = {"class": str, "probability": float}
_REST: dict[str, type] = {
    "plain_class": str,
    "plain_probability": float,
    "changed": bool,
    "fvu": float,
    "steered": bool,
    "error": str,
}


def rows_of(paths: Sequence[str], errors: Sequence[str], found: Predictions | None) -> Iterator[Row]:
    """Yield the row of each image of a batch.

    Args:
        paths: paths of all images of the batch.
        errors: for each image why it could not be read; empty if it could.
        found: predictions of the images that could be read; None if there are none.
    """
    predicted = iter([] if found is None else zip(found.rows(), found.top(_TOP), strict=True))
    for path, error in zip(paths, errors, strict=True):
        if error:
            yield {"path": path, "error": error}
            continue
        row, best = next(predicted)
        values: Row = {"path": path}
        for place, (name, chance) in enumerate(best, 1):
            suffix = "" if place == 1 else f"_{place}"
            values |= {f"class{suffix}": name, f"probability{suffix}": _digits(chance)}
        values |= {name: row[name] for name in _REST if name != "error"}
        values |= {
            "plain_probability": _digits(row["plain_probability"]),
            "fvu": None if math.isnan(row["fvu"]) else _digits(row["fvu"]),  # NaN: there is no SAE
        }
        yield values


def _digits(value: float) -> float:
    """Return a number rounded to nine digits, which identify a float32."""
    return float(f"{value:.9g}")


def _line(text: bytes) -> bytes:
    """Return the line that holds the text of a row: the beginning of its SHA-256, a space, and the text."""
    return hashlib.sha256(text).hexdigest()[: _LEAD - 1].encode() + b" " + text + b"\n"


class Part:
    """The rows finished so far, in the folder ``<OUT>.part``. To be used within :meth:`opened`."""

    def __init__(self, out: Path) -> None:
        self._folder = out.with_name(f"{out.name}.part")
        self._settings, self._rows = self._folder / "settings.json", self._folder / "rows.jsonl"

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Lock the table against other processes within a ``with`` block. Raises DataError if one holds the lock."""
        with alone(self._rows, seconds=0):
            yield

    def settle(self, settings: Mapping[str, Any], paths: Sequence[str], batch_size: int) -> tuple[int, list[str]]:
        """Keep the rows of whole batches if they were made with the same settings, else remove all rows.

        Args:
            settings: everything that rows depend on, as JSON values.
            paths: paths of the images.
            batch_size: images that are classified together.

        Returns:
            The number of rows kept, and the names of the settings that differ.
        """
        settings = json.loads(json.dumps(settings))
        before: dict[str, Any] | None = None
        with suppress(OSError, ValueError, RecursionError):
            before = json.loads(self._settings.read_text(encoding="utf-8"))
        if before != settings:
            self._rows.unlink(missing_ok=True)
            with atomic_file(self._settings) as scratch:
                scratch.write_text(json.dumps(settings), encoding="utf-8")
        former = before if isinstance(before, dict) else settings
        different = [name for name in settings if former.get(name) != settings[name]]
        return self._keep_whole(paths, batch_size), different

    def _keep_whole(self, paths: Sequence[str], batch_size: int) -> int:
        """Remove the rows after the last whole batch, and return the number of rows left."""
        self._rows.touch()
        whole = end = position = 0
        with open(self._rows, "r+b") as file:
            for count, (line, path) in enumerate(zip(file, paths, strict=False), 1):
                text = line[_LEAD:-1]
                if line != _line(text) or json.loads(text)["path"] != path:
                    break
                position += len(line)
                if count % batch_size == 0 or count == len(paths):
                    whole, end = count, position
            file.truncate(end)
        return whole

    def append(self, rows: Iterable[Row]) -> None:
        """Append the rows of a batch."""
        lines = b"".join(_line(json.dumps(row).encode()) for row in rows)
        with naming(self._rows), open(self._rows, "ab") as file:
            file.write(lines)

    def rows(self) -> Iterator[Row]:
        """Yield all rows finished so far."""
        with open(self._rows, "rb") as file:
            yield from (json.loads(line[_LEAD:]) for line in file)

    def remove(self) -> None:
        """Remove the folder, once the table is written."""
        shutil.rmtree(self._folder, ignore_errors=True)


def require_format(out: Path) -> None:
    """Raise SettingError for a Parquet table if pyarrow is not installed."""
    if out.suffix.lower() == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise SettingError(
            f"--out {str(out)!r}: a .parquet file needs pyarrow, which is not installed; run: pip install "
            "pyarrow, or name a .csv or .jsonl file"
        )


def write_table(out: Path, columns: Mapping[str, type], rows: Iterable[Row]) -> None:
    """Write a table in the format of its file name extension.

    Raises:
        OSError: the file cannot be written.
    """
    write = {".csv": _write_csv, ".jsonl": _write_jsonl, ".parquet": _write_parquet}[out.suffix.lower()]
    with atomic_file(out) as scratch:
        write(scratch, columns, rows)


def _write_csv(path: Path, columns: Mapping[str, type], rows: Iterable[Row]) -> None:
    # Bytes of a path or a class that are no UTF-8 are written unchanged.
    with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        table = csv.DictWriter(file, list(columns), lineterminator="\n")
        table.writeheader()
        for row in rows:
            table.writerow({name: _word(value) for name, value in row.items()})


def _word(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else value


def _write_jsonl(path: Path, columns: Mapping[str, type], rows: Iterable[Row]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({name: row.get(name) for name in columns}) + "\n")


def _write_parquet(path: Path, columns: Mapping[str, type], rows: Iterable[Row]) -> None:
    import pyarrow
    from pyarrow import parquet

    kinds = {str: pyarrow.string(), float: pyarrow.float32(), bool: pyarrow.bool_()}
    schema = pyarrow.schema([(name, kinds[kind]) for name, kind in columns.items()])
    remaining = iter(rows)
    with parquet.ParquetWriter(path, schema) as file:
        while group := list(islice(remaining, _GROUP)):
            table = [{name: _utf8(value) for name, value in row.items()} for row in group]
            file.write_table(pyarrow.Table.from_pylist(table, schema=schema))


def _utf8(value: Any) -> Any:
    """Return a value of a row; bytes of a path or a class that are no UTF-8, which Parquet cannot hold, replaced."""
    return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace") if isinstance(value, str) else value
