"""The figures of ``vs2 latents`` (frequency and strength of latents, and purity of their top images) and of ``vs2 sae``
(similarity of the images that activate a latent, and stability across seeds)."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vs2_plugin.report.drawing import INK, LINES, PLAIN, Picture, new_figure, picture

__all__ = ["draw_agreement", "draw_latents", "draw_sae"]

_BINS = 40
_ACTIVE = (
    "Latents by log10 of their activation frequency, the share of training images in which they are active. Dead "
    "latents are left out. The dashed line is k/n, where all would be if they were equally active; left of the first "
    "dotted line, at a tenth of k/n, latents are called rare here; right of the second, at a tenth of the images, "
    "dense."
)
_STRENGTH = "Latents by their mean activation over the images in which they are active. Dead latents are left out."
_PURITY = (
    "Latents by how many of their {top} top-activating images have the most frequent zero-shot class among them; only "
    "latents with {top} such images. The line is chance: as many sets of {top} images drawn at random from the "
    "gallery. Zero-shot classes are CLIP's own guesses: a pure latent agrees with them, right or wrong."
)
_SHARE = (
    "Latents by log10 of the share of images in which they are active. Dead latents are left out. Right of the dashed "
    "line, at a tenth of the images, they are called dense."
)
_MEANING = (
    "Latents by their monosemanticity score, and the same with the images shuffled. Where the two coincide, "
    "the images that activate a latent are no more alike than any others."
)
_AGREEMENT = (
    "Latents by the cosine of their direction with the one assigned to them in another SAE, over all pairs, "
    "and the same with a random dictionary in its place. Right of the dashed line they count as found again."
)


def draw_latents(
    frequencies: np.ndarray, means: np.ndarray, even: float, dense: float, pure: np.ndarray, chance: np.ndarray
) -> list[Picture]:
    """Draw the figures of ``vs2 latents`` for one SAE.

    Args:
        frequencies: activation frequency ``[n]``, 0 for dead latents.
        means: ``[n]``, mean activation where active.
        even: k/n.
        dense: the frequency above which latents are called dense.
        pure: for each latent with all top images, how many of these have the most frequent class among them.
        chance: the probability of each such number, 0 to top, for images drawn at random, ``[top + 1]``.
    """
    alive = frequencies > 0
    top = len(chance) - 1
    pictures = [
        picture("frequency", "Activation frequency", _ACTIVE, _frequency, frequencies[alive], even, even / 10, dense),
        picture("strength", "Mean activation", _STRENGTH, _strength, means[alive]),
    ]
    if len(pure):
        pictures.append(picture("purity", "Purity", _PURITY.format(top=top), _purity, pure, chance))
    return pictures


def draw_sae(frequencies: np.ndarray, dense: float, scores: np.ndarray, shuffled: np.ndarray) -> list[Picture]:
    """Draw the figures of ``vs2 sae`` for one SAE.

    Args:
        frequencies: activation frequency ``[n]``, 0 for dead latents.
        dense: the frequency above which latents are called dense.
        scores: monosemanticity scores of the latents that have one.
        shuffled: the scores with the images shuffled.
    """
    alive = frequencies[frequencies > 0]
    pictures = []
    if len(alive):
        pictures.append(picture("frequency", "Activation frequency", _SHARE, _frequency, alive, dense))
    if len(scores):
        pictures.append(
            picture("meaning", "Monosemanticity", _MEANING, _two, scores, shuffled, "MS", "shuffled images", None)
        )
    return pictures


def draw_agreement(cosines: np.ndarray, random: np.ndarray, stable: float) -> Picture:
    """Draw the cosines of assigned directions; from a cosine of ``stable`` on, a direction counts as found again."""
    words = "cosine with the assigned direction", "random dictionary", stable
    return picture("agreement", "Stability across seeds", _AGREEMENT, _two, cosines, random, *words)


def _axes(height: float, xlabel: str) -> tuple[Figure, Axes]:
    figure = new_figure(height)
    return figure, figure.add_subplot(xlabel=xlabel, ylabel="latents")


def _frequency(frequencies: np.ndarray, dashed: float, *dotted: float) -> Figure:
    figure, axes = _axes(2.8, "log10 of the activation frequency")
    axes.hist(np.log10(frequencies), bins=_BINS, color=LINES[0])
    axes.axvline(np.log10(dashed), color=INK, linestyle="--", linewidth=1)
    for line in dotted:
        axes.axvline(np.log10(line), color=PLAIN, linestyle=":", linewidth=1.2)
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


def _two(found: np.ndarray, chance: np.ndarray, xlabel: str, name: str, line: float | None) -> Figure:
    figure, axes = _axes(3.0, xlabel)
    both = np.concatenate([found, chance])
    bins = np.linspace(both.min(), both.max() + 1e-6, _BINS + 1).tolist()
    axes.hist(found, bins=bins, color=LINES[0], label="latents")
    axes.hist(chance, bins=bins, color=LINES[1], histtype="step", linewidth=1.5, label=name)
    if line is not None:
        axes.axvline(line, color=INK, linestyle="--", linewidth=1)
    figure.legend(loc="outside lower center", ncols=2)
    return figure
