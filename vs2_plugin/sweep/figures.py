"""Figures of a grid: a heat map over two numeric axes, curves over one."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from matplotlib.figure import Figure

from vs2_plugin.files import atomic_file
from vs2_plugin.sweep.grid import Grid, as_number
from vs2_plugin.text import counted

__all__ = ["all_best", "and_others", "draw", "save"]

Key = TypeVar("Key")

_NOTE = "the best point is chosen on these very images: report its accuracy on others"


def draw(
    grid: Grid, values: Mapping[str, float], plain: float, measure: str = "top-1 accuracy"
) -> Iterator[tuple[str, Figure]]:
    """Draw a grid.

    Args:
        grid: the grid.
        values: model string -> its value, in percent.
        plain: the value of the plain model, in percent.
        measure: what the values are.

    Yields:
        The values that tell a figure from the grid's other figures (empty if there are none), and the figure. There is
        none for a grid without axes; with two or more numeric axes, a heat map over the first two for each combination
        of values of the other axes; else one figure of curves.
    """
    table = {point.place: values[point.model] for point in grid.points}
    numeric = [axis for axis, texts in grid.axes.items() if None not in map(as_number, texts)]
    if len(numeric) >= 2:
        for title, rows in _sections(grid, table, numeric[:2]):
            yield title, _heat_map(grid, title, rows, plain, numeric[:2], measure)
    elif grid.axes:
        along = numeric[0] if numeric else next(iter(grid.axes))
        yield "", _curves(grid, along, _sections(grid, table, [along]), plain, measure)


Section = tuple[str, dict[tuple[str, ...], float]]


def _sections(grid: Grid, table: Mapping[tuple[str, ...], float], axes: list[str]) -> list[Section]:
    """Return, for each combination of values of the other axes: its words, and place on ``axes`` -> value."""
    others = {axis: texts for axis, texts in grid.axes.items() if axis not in axes}
    sections = []
    for chosen in product(*others.values()):
        fixed = dict(zip(others, chosen, strict=True))
        words = "@".join(f"{axis}={value}" for axis, value in fixed.items())
        places = {}
        for place in product(*(grid.axes[axis] for axis in axes)):
            at = fixed | dict(zip(axes, place, strict=True))
            places[place] = table[tuple(at[axis] for axis in grid.axes)]
        sections.append((words, places))
    return sections


def all_best(values: Mapping[Key, float]) -> list[Key]:
    """Return the keys of the highest value, in the order of ``values``."""
    highest = max(values.values())
    return [key for key, value in values.items() if value == highest]


def and_others(others: Sequence[Any]) -> str:
    """Return words on the other points that are as good as the best point that is named; empty if there are none."""
    return f" and {counted(len(others), 'other point')}" if others else ""


def _heat_map(
    grid: Grid, title: str, rows: dict[tuple[str, ...], float], plain: float, axes: list[str], measure: str
) -> Figure:
    across, up = (_rising(grid.axes[axis]) for axis in axes)
    values = np.array([[rows[x, y] for x in across] for y in up])
    best, *others = all_best(rows)
    figure = Figure(figsize=(7, 5.6), layout="constrained")
    plot = figure.add_subplot()
    mesh = plot.imshow(values, origin="lower", aspect="auto", cmap="cividis")
    for x, y in (best, *others):
        plot.plot(across.index(x), up.index(y), "*", markersize=14, color="white", markeredgecolor="black")
    for texts, ticks in ((across, plot.set_xticks), (up, plot.set_yticks)):
        shown = range(0, len(texts), -(-len(texts) // 11))
        ticks(shown, [texts[index] for index in shown])
    plot.set_xlabel(axes[0])
    plot.set_ylabel(axes[1])
    bar = figure.colorbar(mesh, label=f"{measure}, %")
    if values.min() <= plain <= values.max():
        bar.ax.axhline(plain, color="red", linewidth=2)
    figure.suptitle(_wrapped(f"{grid.text}{' at ' + title if title else ''}"), fontsize=9)
    plot.set_title(
        f"star: best, {rows[best]:.2f} at {axes[0]}={best[0]}, {axes[1]}={best[1]}{and_others(others)}; "
        f"zero-shot (red): {plain:.2f}\n"
        f"{_NOTE}", fontsize=8,
    )  # fmt: skip
    return figure


def _wrapped(text: str) -> str:
    """Return text in lines that fit a figure's width; a model string has no spaces at which matplotlib would break."""
    return "\n".join(textwrap.wrap(text, 100))


def _rising(texts: Sequence[str]) -> list[str]:
    """Return the values of an axis in the order of drawing: numbers ascending, words as they were given."""
    if None in map(as_number, texts):
        return list(texts)
    return sorted(texts, key=lambda text: as_number(text) or 0.0)


def _curves(grid: Grid, along: str, sections: list[Section], plain: float, measure: str) -> Figure:
    texts = _rising(grid.axes[along])
    numbers = [number for text in texts if (number := as_number(text)) is not None]
    in_words = len(numbers) < len(texts)
    places = dict(zip(texts, map(float, range(len(texts))) if in_words else numbers, strict=True))
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    plot = figure.add_subplot()
    plot.axhline(plain, color="red", linestyle="--", label=f"zero-shot: {plain:.2f}")
    for words, rows in sections:
        values = {text: rows[(text,)] for text in texts}
        best, *others = all_best(values)
        label = f"{words + ': ' if words else ''}best {values[best]:.2f} at {along}={best}{and_others(others)}"
        [line] = plot.plot(list(places.values()), list(values.values()), marker="o", markersize=3, label=label)
        for text in (best, *others):
            plot.plot(places[text], values[text], "*", markersize=12, color=line.get_color())
    if in_words:
        plot.set_xticks(list(places.values()), texts)
    plot.set_xlabel(along)
    plot.set_ylabel(f"{measure}, %")
    plot.grid(alpha=0.3)
    figure.suptitle(_wrapped(grid.text), fontsize=9)
    plot.set_title(_NOTE, fontsize=8)
    figure.legend(loc="outside lower center", fontsize=7, ncols=2)
    return figure


def save(figure: Figure, path: Path, software: str) -> Path:
    """Write a figure to a PNG file that names the ``software``; return the file."""
    with atomic_file(path) as scratch:
        figure.savefig(scratch, format="png", dpi=150, metadata={"Software": software})
    return path
