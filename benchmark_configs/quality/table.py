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
    "gain": ("VS2, points", "{:+.1f}"), "best": ("best VS2", "{:+.1f}"), "above": ("over centring", "{:+.1f}"),
}  # fmt: skip


def gains(line: dict[str, Any]) -> dict[str, Any]:
    """Return a line with what steering gained, in points: at the default strength, at the best one in hindsight, and
    over the best that centring gives."""
    best, centred = (
        max(value for key, value in line.items() if key.startswith(which)) for which in ("vs2_", "centring_")
    )
    zero = line["zero_shot"]
    best, centred = max(best, zero), max(centred, zero)
    return {
        **line, "gain": 100 * (line["vs2_1.05"] - zero), "best": 100 * (best - zero),
        "above": 100 * (best - centred), "above_default": 100 * (line["vs2_1.05"] - line["centring_1.05"]),
    }  # fmt: skip


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
            cells = [_cell([line[key] for line in group], form) for key, (_, form) in COLUMNS.items()]
            told.append("| " + " | ".join([str(value), *cells]) + " |")
        told.append("")
    path.write_text("\n".join(told))


def _cell(values: Sequence[float], form: str) -> str:
    spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
    plain = form.replace("+", "")
    return form.format(np.mean(values)) + (f" ({plain.format(spread)})" if spread > 1e-9 else "")
