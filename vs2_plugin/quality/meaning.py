"""Measures whether latents have a meaning: how alike their images are, and how well a few latents detect a class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csc_array, csr_array
from scipy.stats import rankdata

from vs2_plugin.arrays import spread

__all__ = ["Monosemanticity", "Probe", "monosemanticity", "sparse_probes"]

_COLUMNS = 64  # columns of the embeddings at a time, so that their double-precision copy stays small
_CLASSES = 200  # most classes that are probed


class Monosemanticity(NamedTuple):
    """The score MS of each latent (arXiv 2504.02821); NaN where fewer than two images activate it."""

    scores: np.ndarray
    """``[n]``: the scores."""
    shuffled: np.ndarray
    """``[n]``: the scores after the images' embeddings were shuffled."""


def monosemanticity(code: csr_array, embeddings: np.ndarray, seed: int = 0) -> Monosemanticity:
    """Score for each latent how alike the images are that activate it.

    ``MS = Σ_{i<j} a_i a_j cos(z_i, z_j) / Σ_{i<j} a_i a_j``, with a the latent's activations, scaled to 0 to 1 over all
    images (magnitudes of signed ones), and z the images' embeddings. Sums over pairs follow from sums over images:
    ``2 Σ_{i<j} a_i a_j cos(z_i, z_j) = ‖Σ a_i ẑ_i‖² - Σ a_i²``.

    Args:
        code: sparse codes ``[count, n]``.
        embeddings: embeddings ``[count, e]`` of the same images.
        seed: seed of the shuffling.
    """
    scaled = _scaled(code)
    squares = np.asarray(scaled.power(2).sum(0))
    pairs = np.asarray(scaled.sum(0)) ** 2 - squares
    by_latent = csr_array(scaled.T)
    # Single precision takes an eighth of the time, but has too few digits where the squares outweigh the pairs.
    parts = [(which, csr_array(by_latent[which]), dtype)
             for which, dtype in ((pairs >= squares, np.float32), (pairs < squares, np.float64))]  # fmt: skip
    norms = np.sqrt(np.einsum("ij,ij->i", embeddings, embeddings, dtype=np.float64))
    norms[norms == 0] = 1
    order = np.random.default_rng(seed).permutation(len(norms))
    sums = np.zeros((2, code.shape[1]))
    for start in range(0, embeddings.shape[1], _COLUMNS):
        part = np.asarray(embeddings[:, start : start + _COLUMNS], np.float64) / norms[:, None]
        for number, rows in enumerate((part, part[order])):
            for which, matrix, dtype in parts:
                sums[number, which] += _squared_norms(matrix, rows.astype(dtype))
    scored = pairs > 0
    scores = np.where(scored, (sums - squares) / np.where(scored, pairs, 1), np.nan)
    return Monosemanticity(*scores)


def _squared_norms(matrix: csr_array, rows: np.ndarray) -> np.ndarray:
    """Return the squared norms of the rows of ``matrix @ rows``: float64 ``[m]``, computed in the dtype of ``rows``."""
    places = torch.from_numpy(matrix.indices).long(), torch.from_numpy(matrix.indptr[:-1]).long()
    weights = torch.from_numpy(matrix.data.astype(rows.dtype))
    bags = F.embedding_bag(places[0], torch.from_numpy(rows), places[1], mode="sum", per_sample_weights=weights)
    return bags.double().square().sum(1).numpy()


def _scaled(code: csr_array) -> csr_array:
    """Return the magnitudes of each latent's activations, scaled to 0 to 1 over all images: float64 ``[count, n]``."""
    columns = csc_array(abs(code).astype(np.float64))
    for latent in np.flatnonzero(np.diff(columns.indptr) == code.shape[0]):  # active in all images: minimum not 0
        own = slice(columns.indptr[latent], columns.indptr[latent + 1])
        columns.data[own] -= columns.data[own].min()
    most = columns.max(axis=0).toarray().ravel()
    columns.data /= np.repeat(np.where(most > 0, most, 1), np.diff(columns.indptr))
    return csr_array(columns)


class Probe(NamedTuple):
    """How well probes tell classes from the rest."""

    auc: float
    """Area under the ROC curve, mean over classes: 0.5 by chance."""
    classes: int
    """Number of classes that were probed."""


def sparse_probes(
    features: csr_array, labels: np.ndarray, fitted: np.ndarray, held: np.ndarray, sizes: Sequence[int] = (1, 5),
    least: int = 5,
) -> dict[int, Probe]:  # fmt: skip
    """Probe each class with a few features (arXiv 2305.01610): those whose means differ most between the class and the
    rest on the images that the probe is fitted on.

    A single feature is used as the score; several are summed with the weights of a least-squares fit in which class
    and rest have equal weight. At most 200 classes are probed, evenly spread over those with enough images.

    Args:
        features: features of the images, ``[count, n]``.
        labels: classes of the images, int64 ``[count]``.
        fitted: bool ``[count]``: the images that probes are fitted on.
        held: bool ``[count]``: the images that probes are tested on.
        sizes: numbers of features per probe.
        least: fewest images of a class to fit a probe on.

    Returns:
        The result for each size; empty where no class can be probed.
    """
    classes, seen, unseen = _probed(labels, fitted, held, least)
    if not len(classes):
        return {}
    columns, tests = csc_array(features[fitted]), csc_array(features[held])
    total = np.asarray(columns.sum(0))
    aucs: dict[int, list[float]] = {size: [] for size in sizes}
    for label in classes:
        mine, theirs = seen == label, unseen == label
        own = np.asarray(columns.T @ mine.astype(np.float64))
        apart = own / mine.sum() - (total - own) / (~mine).sum()
        best = np.argsort(-abs(apart), kind="stable")[: max(sizes)]
        fit, test = (matrix[:, best].toarray().astype(np.float64) for matrix in (columns, tests))
        for size in sizes:
            weights = np.sign(apart[best[:1]]) if size == 1 else _least_squares(fit[:, :size], mine)
            aucs[size].append(_auc(test[:, : len(weights)] @ weights, theirs))
    return {size: Probe(float(np.mean(values)), len(classes)) for size, values in aucs.items()}


def _probed(
    labels: np.ndarray, fitted: np.ndarray, held: np.ndarray, least: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the classes to probe, the labels of the images to fit on, and the labels of the images to test on."""
    seen, unseen = labels[fitted], labels[held]
    names, counts = np.unique(seen, return_counts=True)
    enough = names[(counts >= least) & (counts < len(seen))]
    classes = [label for label in enough if 0 < (unseen == label).sum() < len(unseen)]
    return np.asarray(classes)[spread(len(classes), _CLASSES).numpy()] if classes else np.empty(0), seen, unseen


def _least_squares(rows: np.ndarray, mine: np.ndarray) -> np.ndarray:
    """Return the weights ``[size]`` of the features in a fit of the class; ``mine`` marks the images of the class."""
    importance = np.sqrt(np.where(mine, 0.5 / mine.sum(), 0.5 / (~mine).sum()))
    design = np.column_stack([rows, np.ones(len(rows))]) * importance[:, None]
    return np.asarray(np.linalg.lstsq(design, mine * importance, rcond=None)[0][:-1])


def _auc(scores: np.ndarray, mine: np.ndarray) -> float:
    ones = int(mine.sum())
    ranks = rankdata(scores)[mine].sum()
    return float((ranks - ones * (ones + 1) / 2) / (ones * (len(mine) - ones)))
