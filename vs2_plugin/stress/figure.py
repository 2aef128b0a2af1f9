"""The figure of a stress test: the change of accuracy from zero-shot along each axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vs2_plugin.names import split
from vs2_plugin.stress.outcomes import ALL, AXES, Mean, Outcome, means
from vs2_plugin.sweep.figures import save

__all__ = ["draw"]

_STYLES = {"image": ":", "unlabeled": "-", "stream": "--", "transductive": "-."}


def draw(outcomes: Sequence[Outcome], path: Path) -> Path:
    """Draw the outcomes to a PNG file.

    Each panel begins with all test images; error bars are the range over draws.
    """
    mean_of = means(outcomes)
    axes = [axis for axis in AXES if any(key[1] == axis for key in mean_of)]
    figure = Figure(figsize=(3.4 * len(axes) + 0.6, 4.4), layout="constrained")
    panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
    shown: dict[str, Any] = {}
    for panel, axis in zip(panels, axes, strict=True):
        shown |= _panel(panel, axis, mean_of)
    panels[0].set_ylabel("top-1 accuracy less zero-shot's, points\n(bars: lowest to highest draw)")
    figure.legend(handles=[*shown.values()], labels=[*shown], loc="outside lower center", fontsize=8, ncols=3)
    return save(figure, path, "vs2 stress")


def _panel(panel: Axes, axis: str, found: Mapping[tuple[str, str, str], Mean]) -> dict[str, Any]:
    """Draw one axis. Return label -> handle for the legend."""
    values = [(ALL, ""), *dict.fromkeys((kind, value) for _, kind, value in found if kind == axis)]
    models = [model for model in dict.fromkeys(key[0] for key in found) if split(model).label != "zero-shot"]
    panel.axhline(0, color="black", linewidth=0.8)
    shown: dict[str, Any] = {}
    for number, model in enumerate(models):
        candidates = [(place, found.get((model, *at))) for place, at in enumerate(values)]
        line = [(place, mean) for place, mean in candidates if mean is not None]
        if len(line) < 2:  # the model has no outcomes here: only streams have an order
            continue
        heights = np.array([100 * mean.change for _, mean in line])
        low, high = 100 * np.array([mean.range for _, mean in line]).T
        bars = [(heights - low).clip(0), (high - heights).clip(0)]  # rounding may put the mean outside equal draws
        protocol = line[0][1].outcomes[0].protocol
        shown[f"{split(model).label} ({protocol})"] = panel.errorbar(
            [place + 0.05 * (number - len(models) / 2) for place, _ in line], heights, bars, fmt="o",
            linestyle=_STYLES.get(protocol, "-"), color=f"C{number % 10}", markersize=4, capsize=2,
            linewidth=1.2,
        )  # fmt: skip
    panel.set_xticks(range(len(values)), ["all", *(value for _, value in values[1:])])
    panel.set_xlim(-0.5, len(values) - 0.5)
    panel.set_xlabel(AXES[axis])
    panel.grid(alpha=0.3)
    return shown
