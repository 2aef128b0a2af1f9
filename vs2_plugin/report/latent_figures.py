"""The figures of ``vs2 latents``: how often latents are active, how strongly, and how pure their top images are."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vs2_plugin.report.drawing import INK, LINES, PLAIN, Picture, new_figure, picture

__all__ = ["draw_latents"]

_BINS = 40
_FREQUENCY = (
    "Latents by log10 of their activation frequency, the share of training images in which they are active. Dead "
    "latents are not in it. The dashed line is k/n, where all would be if they were equally active; left of the "
    "first dotted line, at a tenth of it, they are called rare here, right of the second, at a tenth of the images, "
    "dense."
)
_STRENGTH = "Latents by their mean activation over the images in which they are active. Dead latents are not in it."
_PURITY = (
    "Latents by how many of their {top} top-activating images have the most frequent zero-shot class among them; only "
    "latents with {top} such images. The line is chance: as many sets of {top} images drawn at random from the "
    "gallery. Zero-shot classes are CLIP's own guesses: a pure latent agrees with them, right or wrong."
)


def draw_latents(
    frequencies: np.ndarray, means: np.ndarray, even: float, dense: float, pure: np.ndarray, chance: np.ndarray
) -> list[Picture]:
    """Draw the figures of one SAE.

    Args:
        frequencies: ``[n]``, 0 for dead latents.
        means: ``[n]``, mean activation where active.
        even: k/n.
        dense: the frequency above which latents are called dense.
        pure: how many of its top images have their most frequent class, for each latent that has all top images.
        chance: the probability of each such number, 0 to top, for images drawn at random, ``[top + 1]``.
    """
    alive = frequencies > 0
    top = len(chance) - 1
    pictures = [
        picture("frequency", "Activation frequency", _FREQUENCY, _frequency, frequencies[alive], even, dense),
        picture("strength", "Mean activation", _STRENGTH, _strength, means[alive]),
    ]
    if len(pure):
        pictures.append(picture("purity", "Purity", _PURITY.format(top=top), _purity, pure, chance))
    return pictures


def _axes(height: float, xlabel: str) -> tuple[Figure, Axes]:
    figure = new_figure(height)
    return figure, figure.add_subplot(xlabel=xlabel, ylabel="latents")


def _frequency(frequencies: np.ndarray, even: float, dense: float) -> Figure:
    figure, axes = _axes(2.8, "log10 of the activation frequency")
    axes.hist(np.log10(frequencies), bins=_BINS, color=LINES[0])
    axes.axvline(np.log10(even), color=INK, linestyle="--", linewidth=1)
    for apart in (even / 10, dense):
        axes.axvline(np.log10(apart), color=PLAIN, linestyle=":", linewidth=1.2)
    return figure


def _strength(means: np.ndarray) -> Figure:
    figure, axes = _axes(2.8, "mean activation")
    axes.hist(means, bins=_BINS, color=LINES[0])
    return figure


def _purity(pure: np.ndarray, chance: np.ndarray) -> Figure:
    top = len(chance) - 1
    figure, axes = _axes(3.0, f"of {top} top images, those of the most frequent class")
    numbers = np.arange(1, top + 1)
    axes.bar(numbers, np.bincount(pure, minlength=top + 1)[1:], color=LINES[0], label="latents")
    axes.plot(numbers, len(pure) * chance[1:], color=LINES[1], marker="o", markersize=4, label="chance")
    axes.set_xticks(numbers)
    figure.legend(loc="outside lower center", ncols=2)
    return figure
