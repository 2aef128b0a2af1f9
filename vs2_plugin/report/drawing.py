"""The style of all figures: matplotlib draws them as PNG files, and as SVG that takes its colours from the page."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure

__all__ = ["COLOURS", "FAINT", "INK", "LINES", "PAPER", "PLAIN", "Picture", "new_figure", "picture"]

#: CSS variable -> its colour on white (after Okabe and Ito, for colour-blind readers). The page sets other colours for
#: a dark background. Figures use these values for nothing else, since the SVG text gets the variables in their place.
COLOURS = {
    "--paper": "#fefefe",
    "--ink": "#1c2733",
    "--faint": "#d5dae1",
    "--plain": "#616c79",
    "--one": "#0072b2",
    "--two": "#b54e00",
    "--three": "#008a63",
    "--four": "#a8498b",
    "--five": "#8a6d00",
    "--six": "#3d5a98",
}
PAPER, INK, FAINT, PLAIN, *LINES = COLOURS.values()
_WIDTH = 4.2  # inches: at 360 CSS pixels the letters stay readable
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.edgecolor": PLAIN,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "text.parse_math": False,  # a model's name may hold a dollar
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.5,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "path",
    "savefig.dpi": 200,
}


@dataclass(frozen=True)
class Picture:
    """A figure that has been drawn."""

    name: str
    title: str
    caption: str
    svg: str
    """For the page: colours are CSS variables."""
    png: bytes


def picture(name: str, title: str, caption: str, plot: Callable[..., Figure], *args: object) -> Picture:
    """Return the figure that ``plot(*args)`` draws, in the common style."""
    # Neither depends on the user's own matplotlib settings nor changes them.
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # names in letters that the font lacks
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE | {"svg.hashsalt": name})
        return Picture(name, title, caption, *_render(plot(*args)))


def new_figure(height: float) -> Figure:
    """Return an empty figure, ``height`` inches high."""
    return Figure(figsize=(_WIDTH, height))


def _render(figure: Figure) -> tuple[str, bytes]:
    """Return the figure as SVG for the page, and as PNG on white."""
    png, svg = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", facecolor=PAPER, metadata={"Software": "vs2 report"})
    figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    text = svg.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # these ids repeat in every figure; ids in use have a hash
    text = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', text, count=1)
    for variable, colour in COLOURS.items():
        text = text.replace(colour, f"var({variable})")
    return text, png.getvalue()
