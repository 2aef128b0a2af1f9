"""The figures of the report."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vs2_plugin.report.drawing import FAINT, INK, LINES, PAPER, PLAIN, Picture, new_figure, picture
from vs2_plugin.report.rows import Pairing, Row
from vs2_plugin.report.summary import Curve, Group
from vs2_plugin.results.statistics import Array, Calibration, Interval, share_interval

__all__ = ["draw"]

_MARKERS = "osD^vP"
#: Line styles, for figures with more lines than colours.
_STYLES = ("-", "--", ":")
#: Kind of result -> colour, marker, fill, text of the legend.
_KINDS = {
    "": (PLAIN, "s", "full", "zero-shot"),
    "image": (LINES[5], "o", "none", "no labels, the image alone"),
    "unlabeled": (LINES[0], "o", "full", "no labels, unlabeled images"),
    "stream": (LINES[4], "P", "full", "no labels, a stream"),
    "transductive": (LINES[2], "P", "none", "no labels, all test images"),
    "train": (LINES[1], "D", "none", "training labels used"),
    "oracle": (LINES[3], "^", "none", "oracle: true labels used"),
    "?": (LINES[2], "v", "none", "labels not stated"),
}


def draw(group: Group) -> list[Picture]:
    """Draw all figures that the results of one backbone have the data for."""
    pictures = []

    def add(name: str, title: str, caption: str, plot: Callable[..., Figure], *args: object) -> None:
        pictures.append(picture(name, title, caption, plot, *args))

    zero = group.zero
    fewer = "" if len(group.main) == len(group.rows) else " Left out: results that the curves show."
    add("accuracy", "Top-1 accuracy", _ACCURACY + fewer, _accuracy, group.main)
    curves = group.curves()
    if "gate" in curves:
        add("gate", "Coverage and accuracy against q", _GATE, _gate, curves.pop("gate"), zero)
    for label, cells in group.grids():
        add(f"gamma-lambda-{label}", f"gamma and lambda: {label}", _GRID, _grid, cells)
    for key, lines in curves.items():
        add(f"against-{key}", f"Top-1 accuracy against {key}", _CURVE.get(key, _ALONG), _curve, key, lines, zero)
    caption = _FVU
    firsts = [row.members[0] for row in group.methods]
    for row in firsts:
        if row.bins:
            add(f"fvu-{row.run.method}", f"Accuracy by FVU: {row.title}", caption, _fvu, row, row.pairing)
            caption = _AGAIN
    caption = _RELIABLE
    for row in firsts:
        before, after = row.calibration_before, row.calibration
        if before is not None and after is not None:
            title = f"Calibration: {row.title}"
            add(f"calibration-{row.run.method}", title, caption, _reliability, row.label, before, after)
            caption = _AGAIN
    return pictures


_ACCURACY = (
    "Dots: share of test images classified correctly; lines: 95 % confidence intervals, where there are per-image "
    "results. The dashed line is zero-shot CLIP. The axis need not start at zero. The intervals show how "
    "much other test images of the same kind could change, but not how much another training of the SAE could. Whether "
    "a method differs from zero-shot is better seen from the interval of the change in the table."
)
_GATE = (
    "Results that differ only in the gate: images are steered where their FVU is within the q-quantile of held-out "
    "training activations. Above: share of the test images that it let through, of several sites at the last. Below: "
    "top-1 accuracy; the dashed line is zero-shot CLIP. The values of q are evenly spaced here."
)
_GRID = "Top-1 accuracy in percent, of results that differ only in gamma and lambda. Empty: not evaluated."
_ALONG = "Results that differ only in this setting. The dashed line is zero-shot CLIP."
_CURVE = {
    "alpha": "Results that differ only in strength: only alpha = lambda (gamma - 1) matters of gamma and "
    "lambda. The dashed line is zero-shot CLIP.",
    "k": "Results of SAEs with equally many latents that differ in k, the number of active ones; of several with the "
    "same k, the first in the table. The dashed line is zero-shot CLIP.",
    "n": "Results that differ only in N, the number of neighbours retrieved. The dashed line is zero-shot CLIP.",
}
_FVU = (
    "The test images in bins of about equal size by their FVU, the share of an activation's variance that the SAE does "
    "not explain: small on the left. Accuracy of both models on the same images, with 95 % confidence intervals. The "
    "dotted line, if any, is the gate: images to its right were not steered at that site."
)
_AGAIN = "Read like the first of these figures."
_RELIABLE = (
    "Above: accuracy against mean confidence in 15 equal bins of confidence; on the diagonal, confidence is right on "
    "average, below it too high. Below: share of the images in each bin. ECE, the expected calibration error, is the "
    "distance from the diagonal, averaged over images. Larger dots stand for more images."
)


def _zero_line(axes: Axes, zero: Row | None) -> None:
    if zero is not None:
        axes.axhline(100 * zero.top1, color=PLAIN, linestyle="--", linewidth=1.2, label="zero-shot")


def _spread(values: list[float], intervals: Sequence[Interval | None]) -> Array | None:
    """Return error bars ``[2, n]`` in points; None where there is no interval."""
    if not any(intervals):
        return None
    bounds = np.array([ends or (value, value) for value, ends in zip(values, intervals, strict=True)])
    return np.asarray(100 * np.abs(bounds.T - np.array(values)))


def _accuracy(rows: list[Row]) -> Figure:
    names = [textwrap.fill(row.title, 42) for row in rows]
    lines = np.array([name.count("\n") + 1 for name in names])
    # Names stand above the dots, not beside them, so that a phone's screen has room for both.
    heights = 0.17 * lines + 0.22
    places = np.cumsum(heights) - 0.1
    figure = new_figure(heights.sum() + 0.95)
    axes = figure.add_subplot()
    shown: dict[str, Any] = {}
    for row, name, place in zip(rows, names, places, strict=True):
        colour, marker, fill, words = _KINDS.get(row.run.kind, _KINDS["?"])
        spread = _spread([row.top1], [row.interval])
        shown[words] = axes.errorbar(
            100 * row.top1, place, xerr=spread, color=colour, marker=marker, fillstyle=fill, linestyle="", capsize=2.5
        )
        axes.text(
            0.01, place - 0.13, name, transform=axes.get_yaxis_transform(), verticalalignment="baseline",
            linespacing=1.15,
            bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.5},  # hides the dashed line behind the name
        )  # fmt: skip
        axes.axhline(place + 0.1, color=FAINT, linewidth=0.6)
        axes.annotate(
            f"{100 * row.top1:.2f}", (1, place), xycoords=axes.get_yaxis_transform(), xytext=(3, 0),
            textcoords="offset points", verticalalignment="center", annotation_clip=False,
        )  # fmt: skip
    if rows[0].run.method is None:
        axes.axvline(100 * rows[0].top1, color=PLAIN, linestyle="--", linewidth=1.0, zorder=0)
    axes.set_ylim(places[-1] + 0.1, 0)
    axes.margins(x=0.08)
    axes.grid(axis="y", visible=False)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("top-1 accuracy, %")
    figure.legend(list(shown.values()), list(shown), loc="outside lower center", ncols=2)
    return figure


def _lines(
    axes: Axes,
    curves: list[Curve],
    place: Callable[[float | None], float],
    value: Callable[[Row], float | None],
    spread: bool,
) -> None:
    for number, curve in enumerate(curves):
        points = [(place(x), row, share) for x, row in curve.points if (share := value(row)) is not None]
        intervals = [row.interval if spread else None for _, row, _ in points]
        axes.errorbar(
            [x for x, _, _ in points],
            [100 * share for _, _, share in points],
            yerr=_spread([share for _, _, share in points], intervals),
            color=LINES[number % len(LINES)],
            marker=_MARKERS[number % len(_MARKERS)],
            linestyle=_STYLES[number // len(LINES) % len(_STYLES)],
            capsize=2,
            elinewidth=0.8,
            label=_short(curve.label),
        )


def _short(label: str) -> str:
    return textwrap.shorten(label, 44, placeholder="...")


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3 if max(map(len, labels)) < 14 else 1)


def _curve(key: str, curves: list[Curve], zero: Row | None) -> Figure:
    figure = new_figure(3.0 + 0.22 * max(0, len(curves) - 4))  # the legend has a line for each curve
    axes = figure.add_subplot()
    _zero_line(axes, zero)
    _lines(axes, curves, lambda x: x or 0.0, lambda row: row.top1, spread=True)
    axes.set_xlabel(
        {"alpha": "alpha = lambda (gamma - 1)", "n": "N, neighbours", "k": "k, active latents"}.get(key, key)
    )
    axes.set_ylabel("top-1 accuracy, %")
    _legend(figure, axes)
    return figure


def _gate(curves: list[Curve], zero: Row | None) -> Figure:
    values = {x for curve in curves for x, _ in curve.points}
    ticks = sorted(values, key=lambda q: (q is None, q or 0.0))
    figure = new_figure(4.0)
    above, below = figure.subplots(2, sharex=True)
    _lines(above, curves, ticks.index, lambda row: row.number("vs2_coverage"), spread=False)
    _zero_line(below, zero)
    _lines(below, curves, ticks.index, lambda row: row.top1, spread=True)
    above.set_ylim(-4, 104)
    above.set_ylabel("coverage, %")
    below.set_ylabel("top-1 accuracy, %")
    below.set_xticks(range(len(ticks)), ["no gate" if tick is None else f"{tick:g}" for tick in ticks])
    below.margins(x=0.08)
    below.set_xlabel("q of the gate")
    _legend(figure, below)
    return figure


def _grid(cells: dict[tuple[float, float], Row]) -> Figure:
    gammas, lams = (sorted({key[axis] for key in cells}) for axis in (0, 1))
    values = np.full((len(lams), len(gammas)), np.nan)
    for (gamma, lam), row in cells.items():
        values[lams.index(lam), gammas.index(gamma)] = 100 * row.top1
    figure = new_figure(1.1 + 0.38 * max(len(lams), 4))
    axes = figure.add_subplot()
    axes.grid(visible=False)
    mesh = axes.pcolormesh(values, cmap="cividis")
    for (y, x), value in np.ndenumerate(values):
        if np.isfinite(value) and len(gammas) <= 8:
            dark = np.asarray(mesh.norm(value)) < 0.42
            axes.text(
                x + 0.5, y + 0.5, f"{value:.1f}", color="white" if dark else "black",
                horizontalalignment="center", verticalalignment="center", fontsize=8,
            )  # fmt: skip
    axes.set_xticks(np.arange(len(gammas)) + 0.5, [f"{gamma:g}" for gamma in gammas])
    axes.set_yticks(np.arange(len(lams)) + 0.5, [f"{lam:g}" for lam in lams])
    axes.set_xlabel("gamma")
    axes.set_ylabel("lambda")
    bar = figure.colorbar(mesh, ax=axes, label="top-1 accuracy, %")
    bar.outline.set_visible(False)
    return figure


def _fvu(row: Row, both: Pairing) -> Figure:
    figure = new_figure(3.0)
    axes = figure.add_subplot()
    edges = [row.bins[0].low, *(part.high for part in row.bins)]
    series = (
        ("zero-shot", both.was_correct, PLAIN, "s", -0.07),
        (row.label, both.after.correct, LINES[0], "o", 0.07),
    )
    for label, correct, colour, marker, shift in series:
        shares = [float(correct[part.images].mean()) for part in row.bins]
        intervals = [share_interval(correct[part.images]) for part in row.bins]
        axes.errorbar(
            np.arange(len(shares)) + 0.5 + shift, 100 * np.array(shares), yerr=_spread(shares, intervals),
            color=colour, marker=marker, capsize=2, elinewidth=0.8, label=_short(label),
        )  # fmt: skip
    threshold = row.run.number("vs2_gate_threshold")
    if threshold is not None and edges[0] < threshold < edges[-1]:
        axes.axvline(np.interp(threshold, edges, range(len(edges))), color=INK, linestyle=":")
    # Every other label only, so that labels do not overlap.
    axes.set_xticks(range(len(edges)), ["" if number % 2 else f"{edge:.2g}" for number, edge in enumerate(edges)])
    axes.set_xlabel("FVU of the image (edges of the bins)")
    axes.set_ylabel("top-1 accuracy, %")
    _legend(figure, axes)
    return figure


def _reliability(label: str, before: Calibration, after: Calibration) -> Figure:
    figure = new_figure(4.4)
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    above.plot((0, 100), (0, 100), color=INK, linewidth=0.8, linestyle=":")
    for name, fit, colour, marker in (("zero-shot", before, PLAIN, "s"), (label, after, LINES[0], "o")):
        filled = fit.share > 0
        text = f"{_short(name)}: ECE {100 * fit.ece:.1f} points"
        places = 100 * fit.confidence[filled], 100 * fit.accuracy[filled]
        above.plot(*places, color=colour, marker=marker, markersize=3, linewidth=0.8, label=text)
        above.scatter(*places, 100 * fit.share[filled], color=colour, marker=marker, clip_on=False, zorder=3)
        below.stairs(100 * fit.share, np.linspace(0, 100, len(fit.share) + 1), color=colour, linewidth=1.4)
    above.set_xlim(0, 100)
    above.set_ylim(0, 100)
    above.set_ylabel("accuracy, %")
    below.set_ylabel("images, %")
    below.set_xlabel("confidence (largest probability), %")
    figure.align_ylabels()
    _legend(figure, above)
    return figure
