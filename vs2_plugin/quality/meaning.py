"""Whether latents stand for something: images that activate one are alike, and classes are read off a few of them."""

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

_COLUMNS = 64  # of the embeddings, at a time: their double-precision copy stays small
_LEAST = 2  # images in which a latent has to be active, for there to be a pair
_CLASSES = 200  # that are probed, at most


class Monosemanticity(NamedTuple):
    """The score MS of each latent (arXiv 2504.02821); NaN where fewer than two images activate it."""

    scores: np.ndarray
    """``[n]``."""
    shuffled: np.ndarray
    """``[n]``: the same with the images' embeddings dealt out in another order."""


def monosemanticity(code: csr_array, embeddings: np.ndarray, seed: int = 0) -> Monosemanticity:
    """Score how alike the images are that activate a latent.

    ``MS = Σ_{i<j} a_i a_j cos(z_i, z_j) / Σ_{i<j} a_i a_j``, with a the latent's activations, scaled to 0 to 1 over all
    images (the magnitudes of signed ones), and z the images' embeddings. Sums over pairs follow from sums over images:
    ``2 Σ_{i<j} a_i a_j cos(z_i, z_j) = ‖Σ a_i ẑ_i‖² - Σ a_i²``.

    Args:
        code: ``[count, n]``.
        embeddings: ``[count, e]``, of the same images.
        seed: of the other order.
    """
    scaled = _scaled(code)
    squares = np.asarray(scaled.power(2).sum(0))
    pairs = np.asarray(scaled.sum(0)) ** 2 - squares
    by_latent = csr_array(scaled.T)
    # In single precision it takes an eighth of the time; squares that outweigh the pairs would leave it few digits.
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
    there = (np.diff(csc_array(scaled).indptr) >= _LEAST) & (pairs > 0)
    scores = np.where(there, (sums - squares) / np.where(there, pairs, 1), np.nan)
    return Monosemanticity(*scores)


def _squared_norms(matrix: csr_array, rows: np.ndarray) -> np.ndarray:
    """Return those of the rows of a product, float64 ``[m]``, on all cores and in the precision of ``rows``."""
    places = torch.from_numpy(matrix.indices).long(), torch.from_numpy(matrix.indptr[:-1]).long()
    weights = torch.from_numpy(matrix.data.astype(rows.dtype))
    bags = F.embedding_bag(places[0], torch.from_numpy(rows), places[1], mode="sum", per_sample_weights=weights)
    return bags.double().square().sum(1).numpy()


def _scaled(code: csr_array) -> csr_array:
    """Return the activations of each latent, scaled to 0 to 1 over all images: float64 ``[count, n]``."""
    columns = csc_array(abs(code).astype(np.float64))
    columns.sort_indices()
    for latent in np.flatnonzero(np.diff(columns.indptr) == code.shape[0]):  # never 0: there is a least to subtract
        own = slice(columns.indptr[latent], columns.indptr[latent + 1])
        columns.data[own] -= columns.data[own].min()
    most = columns.max(axis=0).toarray().ravel()
    columns.data /= np.repeat(np.where(most > 0, most, 1), np.diff(columns.indptr))
    columns.eliminate_zeros()
    return csr_array(columns)


class Probe(NamedTuple):
    """How well classes are told from the rest."""

    auc: float
    """Area under the ROC curve, mean over classes: 0.5 by chance."""
    classes: int
    """How many were probed."""


def sparse_probes(
    features: csr_array, labels: np.ndarray, fitted: np.ndarray, held: np.ndarray, sizes: Sequence[int] = (1, 5),
    least: int = 5,
) -> dict[int, Probe]:  # fmt: skip
    """Probe each class with a few features (arXiv 2305.01610): those whose means differ most between the class and the
    rest on the images that the probe is fitted on.

    One feature is a score by itself; several are added up with the weights of a least-squares fit in which class and
    rest count the same. At most 200 classes are probed, evenly spread, those with ``least`` images to fit on or more.

    Args:
        features: ``[count, n]``.
        labels: int64 ``[count]``.
        fitted: bool ``[count]``: the images that probes are fitted on.
        held: bool ``[count]``: those that tell how good they are.
        sizes: numbers of features.
        least: images of a class that a probe is fitted on.

    Returns:
        Of each size; none where no class can be probed.
    """
    classes, seen, known = _probed(labels, fitted, held, least)
    if not len(classes):
        return {}
    columns, tests = csc_array(features[fitted]), csc_array(features[held])
    total = np.asarray(columns.sum(0))
    found: dict[int, list[float]] = {size: [] for size in sizes}
    for label in classes:
        mine, theirs = seen == label, known == label
        own = np.asarray(columns.T @ mine.astype(np.float64))
        apart = own / mine.sum() - (total - own) / (~mine).sum()
        best = np.argsort(-abs(apart), kind="stable")[: max(sizes)]
        fit, test = (matrix[:, best].toarray().astype(np.float64) for matrix in (columns, tests))
        for size in sizes:
            weights = np.sign(apart[best[:1]]) if size == 1 else _least_squares(fit[:, :size], mine)
            found[size].append(_auc(test[:, : len(weights)] @ weights, theirs))
    return {size: Probe(float(np.mean(values)), len(classes)) for size, values in found.items()}


def _probed(
    labels: np.ndarray, fitted: np.ndarray, held: np.ndarray, least: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the classes that can be probed, and the labels of the images to fit on and to test on."""
    seen, known = labels[fitted], labels[held]
    names, counts = np.unique(seen, return_counts=True)
    enough = names[(counts >= least) & (counts < len(seen))]
    classes = [label for label in enough if 0 < (known == label).sum() < len(known)]
    return np.asarray(classes)[spread(len(classes), _CLASSES).numpy()] if classes else np.empty(0), seen, known


def _least_squares(rows: np.ndarray, mine: np.ndarray) -> np.ndarray:
    """Return the weights ``[size]`` of features for the one class."""
    importance = np.sqrt(np.where(mine, 0.5 / mine.sum(), 0.5 / (~mine).sum()))
    design = np.column_stack([rows, np.ones(len(rows))]) * importance[:, None]
    return np.asarray(np.linalg.lstsq(design, mine * importance, rcond=None)[0][:-1])


def _auc(scores: np.ndarray, mine: np.ndarray) -> float:
    ones = int(mine.sum())
    ranks = rankdata(scores)[mine].sum()
    return float((ranks - ones * (ones + 1) / 2) / (ones * (len(mine) - ones)))
