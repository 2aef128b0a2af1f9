"""Tables of the study, from the lines that its scripts write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

#: Column -> its title, and how a figure is written.
COLUMNS = {
    "explained": ("explained", "{:.3f}"), "l0": ("L0", "{:.1f}"), "dead": ("dead", "{:.2f}"),
    "dense": ("dense", "{:.2f}"), "ms": ("MS", "{:.3f}"), "probe_1": ("probe 1", "{:.3f}"),
    "probe_5": ("probe 5", "{:.3f}"), "collinear": ("collinear", "{:.2f}"), "stability": ("stability", "{:.3f}"),
    "stability_random": ("random", "{:.3f}"), "stable": ("found again", "{:.2f}"), "kept": ("kept", "{:.3f}"),
    "recovered": ("recovered", "{:.3f}"), **{f"{method} {strength}": (f"{method} {strength}", "{:+.1f}")
    for method in ("VS2", "vs2s", "PASS") for strength in ("1.05", "best", "auto")},
}  # fmt: skip


def gains(line: dict[str, Any]) -> dict[str, Any]:
    """Return a line with what steering gained, in points: at the default strength, at the best one in hindsight, and at
    the one that unlabeled images tell; of centring too."""
    zero, found = line["zero_shot"], dict(line)
    along = "PASS" if line.get("training") == "PASS" else "VS2"
    for key, method in {"vs2": along, "vs2s": "vs2s", "centring": "centring"}.items():
        values = {name.rpartition("_")[2]: value for name, value in line.items() if name.startswith(f"{key}_")}
        told = {"1.05": values["1.05"], "auto": values.pop("auto"), "best": max(zero, *values.values())}
        found |= {f"{method} {strength}": 100 * (value - zero) for strength, value in told.items()}
    return found


def write(lines: Sequence[dict[str, Any]], path: Path, by: str) -> None:
    """Write a Markdown table: for each value of ``by``, mean and, in brackets, standard deviation over seeds."""
    told = []
    for data in dict.fromkeys(line["data"] for line in lines):
        own = [gains(line) for line in lines if line["data"] == data]
        told += [f"{data}, {len(own)} SAEs; zero-shot {100 * own[0]['zero_shot']:.1f} %", ""]
        told += ["| " + " | ".join([by, *(title for title, _ in COLUMNS.values())]) + " |"]
        told += ["|---|" + "---:|" * len(COLUMNS)]
        for value in dict.fromkeys(line[by] for line in own):
            group = [line for line in own if line[by] == value]
            cells = [_cell([line[key] for line in group if key in line], form) for key, (_, form) in COLUMNS.items()]
            told.append("| " + " | ".join([str(value), *cells]) + " |")
        told.append("")
    path.write_text("\n".join(told))


def _cell(values: Sequence[float], form: str) -> str:
    if not values:
        return ""
    spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
    plain = form.replace("+", "")
    return form.format(np.mean(values)) + (f" ({plain.format(spread)})" if spread > 1e-9 else "")
