"""The files of a sweep: one results file per point, in clip_benchmark's own format, and one table."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vs2_plugin.errors import DataError
from vs2_plugin.files import atomic_file

__all__ = ["Result", "headline", "read_result", "write_result", "write_table"]

#: What clip_benchmark dumps: ``dataset``, ``model``, ``pretrained``, ``task``, ``metrics`` and ``language``.
Result = dict[str, Any]
_FIELDS = ("dataset", "model", "pretrained", "task", "language")


def write_result(path: Path, result: Result) -> None:
    """Write a results file, whole or not at all."""
    with atomic_file(path) as scratch:
        scratch.write_text(json.dumps(result))


def read_result(path: Path) -> Result:
    """Read a results file. Raises DataError for any other file."""
    try:
        result = json.loads(path.read_text())
        headline(result)
        if all(name in result for name in _FIELDS):
            return result
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise DataError(f"{path} is no results file of clip_benchmark; remove it, or leave --skip_existing away")


def headline(result: Result) -> float:
    """The number that a sweep is about: top-1 accuracy, or mean average precision for images with several labels."""
    metrics = result["metrics"]
    return metrics["acc1"] if "acc1" in metrics else metrics["mean_average_precision"]


def write_table(path: Path, results: Sequence[Result]) -> None:
    """Write a CSV with the columns of ``clip_benchmark build``, a row per result."""
    rows = [
        {name: result[name] for name in _FIELDS}
        | {"model_fullname": f"{result['model']} {result['pretrained']}"}
        | result["metrics"]
        for result in results
    ]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
