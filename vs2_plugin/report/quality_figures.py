"""The figures of ``vs2 sae``: how often latents are active, how alike their images are, what other seeds find again."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from vs2_plugin.report.drawing import INK, LINES, Picture, new_figure, picture

__all__ = ["draw_agreement", "draw_sae"]

_BINS = 40
_FREQUENCY = (
    "Latents by log10 of the share of images in which they are active. Dead latents are not in it. Right of the dashed "
    "line, at a tenth of the images, they are called dense."
)
_MEANING = (
    "Latents by their monosemanticity score, and the same with the images shuffled. Where the two lie on each other, "
    "the images that activate a latent are no more alike than any others."
)
_AGREEMENT = (
    "Latents by the cosine of their direction with the one that they are assigned to in another SAE, over all pairs, "
    "and the same with a random dictionary in its place. Right of the dashed line they count as found again."
)


def draw_sae(frequencies: np.ndarray, dense: float, scores: np.ndarray, shuffled: np.ndarray) -> list[Picture]:
    """Draw the figures of one SAE.

    Args:
        frequencies: ``[n]``, 0 for dead latents.
        dense: where latents are called dense.
        scores: of the latents that have one.
        shuffled: the same with the images shuffled.
    """
    alive = frequencies[frequencies > 0]
    pictures = []
    if len(alive):
        pictures.append(picture("frequency", "Activation frequency", _FREQUENCY, _frequency, alive, dense))
    if len(scores):
        pictures.append(
            picture("meaning", "Monosemanticity", _MEANING, _two, scores, shuffled, "MS", "shuffled images", None)
        )
    return pictures


def draw_agreement(cosines: np.ndarray, random: np.ndarray, stable: float) -> Picture:
    """Draw the cosines of assigned directions; ``stable`` is where they count as found again."""
    words = "cosine with the assigned direction", "random dictionary", stable
    return picture("agreement", "Stability across seeds", _AGREEMENT, _two, cosines, random, *words)


def _frequency(alive: np.ndarray, dense: float) -> Figure:
    figure = new_figure(2.8)
    axes = figure.add_subplot(xlabel="log10 of the activation frequency", ylabel="latents")
    axes.hist(np.log10(alive), bins=_BINS, color=LINES[0])
    axes.axvline(np.log10(dense), color=INK, linestyle="--", linewidth=1)
    return figure


def _two(found: np.ndarray, chance: np.ndarray, xlabel: str, name: str, line: float | None) -> Figure:
    figure = new_figure(3.0)
    axes = figure.add_subplot(xlabel=xlabel, ylabel="latents")
    both = np.concatenate([found, chance])
    bins = np.linspace(both.min(), both.max() + 1e-6, _BINS + 1).tolist()
    axes.hist(found, bins=bins, color=LINES[0], label="latents")
    axes.hist(chance, bins=bins, color=LINES[1], histtype="step", linewidth=1.5, label=name)
    if line is not None:
        axes.axvline(line, color=INK, linestyle="--", linewidth=1)
    figure.legend(loc="outside lower center", ncols=2)
    return figure
