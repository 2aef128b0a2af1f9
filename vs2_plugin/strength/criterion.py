"""Measures how well predicted classes fit the neighbourhoods of their images. No labels are read.

Where steering corrects predictions, an image's class says more about the classes of its neighbours. Where steering only
spreads predictions over more classes, it does not. Neighbours are found in the *plain* embeddings, so that steering
cannot bring images nearer to each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["NEIGHBOURS", "Scores", "divergence", "information", "neighbour_graph", "scores"]

#: Neighbours of each image in the graph.
NEIGHBOURS = 10
_BLOCK = 2048
_SHUFFLES = 4
#: Up to this many classes, pairs are counted in a table of all pairs, at most 8 MB; with more classes, by sorting.
_TABLE = 1024
#: Share of a prior that is spread evenly, so that the divergence stays finite for classes of probability 0.
_EVEN = 0.01


def neighbour_graph(embeddings: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """Return the k other images of largest cosine of each image: int64 ``[n, min(k, n - 1)]``, best first.

    Args:
        embeddings: ``[n, e]``, n at least 2; any scale.
        k: neighbours per image.
    """
    parts = F.normalize(embeddings.float(), dim=-1).split(_BLOCK)
    k = min(k, len(embeddings) - 1)
    best: list[list[tuple[Tensor, Tensor]]] = [[] for _ in parts]

    def look(cosines: Tensor, ours: int, theirs: int) -> None:
        values, columns = cosines.topk(min(k, cosines.shape[1]), dim=1)
        best[ours].append((values, columns + theirs * _BLOCK))

    for one, part in enumerate(parts):
        look((part @ part.T).fill_diagonal_(-torch.inf), one, one)
        for other in range(one + 1, len(parts)):  # cosines are symmetric
            cosines = part @ parts[other].T
            look(cosines, one, other)
            look(cosines.T.contiguous(), other, one)
    neighbours = []
    for each in best:
        values, columns = (torch.cat(tensors, dim=1) for tensors in zip(*each, strict=True))
        neighbours.append(columns.gather(1, values.topk(k, dim=1).indices))
    return torch.cat(neighbours)


def information(classes: Tensor, graph: Tensor, count: int) -> Tensor:
    """Return the influence function of the mutual information of class and neighbour's class, in nats: float64 ``[n]``.

    An image is at one end of its own k edges, and at the other end of the edges of images that it is a neighbour of: it
    counts at both. The mean over images is the mean over edges, which is the plug-in mutual information.

    Args:
        classes: int64 ``[n]``.
        graph: int64 ``[n, k]``, as from :func:`neighbour_graph`.
        count: number of classes.
    """
    edges = _told(classes, graph, count)
    mean = edges.mean()
    parts = (edges - mean) / graph.shape[1]
    return parts.sum(1).index_add(0, graph.flatten(), parts.flatten()) + mean


def _told(classes: Tensor, graph: Tensor, count: int) -> Tensor:
    """Return the pointwise mutual information of each edge: ``log J[a, b] / (m[a] m[b])``, float64 ``[n, k]``, with J
    the joint distribution of the classes at both ends of an edge and m its margin."""
    ours, theirs = classes[:, None].expand_as(graph), classes[graph]
    margin = torch.bincount(torch.stack([ours, theirs]).flatten(), minlength=count).double() / (2 * graph.numel())
    # Each edge counts in both directions, which coincide for equal classes: hence the factor 2.
    pairs = torch.minimum(ours, theirs) * count + torch.maximum(ours, theirs)
    joint = _times(pairs, count) * torch.where(ours == theirs, 2, 1) / (2 * graph.numel())
    return (joint / (margin[ours] * margin[theirs])).log()


def _times(pairs: Tensor, count: int) -> Tensor:
    """Return how often each number in ``pairs`` (all below count squared) occurs: float64 of the same shape."""
    if count <= _TABLE:
        return torch.bincount(pairs.flatten(), minlength=count * count).take(pairs).double()
    _, place, times = pairs.unique(return_inverse=True, return_counts=True)
    counted: Tensor = times.double()[place]
    return counted


def divergence(classes: Tensor, prior: Tensor) -> Tensor:
    """Return the KL divergence of the shares of the classes from a prior, in nats, per image: float64 ``[n]``.

    The mean over images is the divergence ``Σ_c q_c log(q_c / π_c)``; the values are its influence function. For an
    even prior, the divergence is the logarithm of the number of classes less the entropy of the shares.

    Args:
        classes: int64 ``[n]``.
        prior: shares of the classes ``[count]``, with sum 1.
    """
    expected = (1 - _EVEN) * prior.double() + _EVEN / len(prior)
    return (_shares(classes, len(prior)) / expected).log()[classes]


def _shares(classes: Tensor, count: int) -> Tensor:
    return torch.bincount(classes, minlength=count).double() / len(classes)


class Scores(NamedTuple):
    """Scores of several ways to classify the same images, a value per way; the first way is the baseline.

    A column ``…_errors`` gives the difference to the baseline in standard errors, over samples of images.
    """

    information: list[float]
    """Mutual information of an image's class and its neighbours' classes, in nats, less its value by chance."""
    information_errors: list[float]
    entropy: list[float]
    """Entropy of the shares of the classes, in nats: the largest possible information."""
    divergence: list[float]
    """Divergence of the shares of the classes from the prior, in nats."""
    divergence_errors: list[float]


def scores(ways: Sequence[Tensor], graph: Tensor, count: int, prior: Tensor | None = None) -> Scores:
    """Score ways to classify the same n images.

    The information by chance is the mean information with the classes shuffled over the images: the plug-in estimate is
    above 0 for any classes, and larger for many classes.

    Args:
        ways: classes of the images, int64 ``[n]`` per way.
        graph: int64 ``[n, k]``, as from :func:`neighbour_graph`.
        count: number of classes.
        prior: expected shares of the classes, ``[count]``; by default all equal.
    """
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(graph), generator=generator).to(graph.device) for _ in range(_SHUFFLES)]
    expected = torch.full((count,), 1 / count, dtype=torch.float64) if prior is None else prior
    influence = torch.stack([information(way, graph, count) for way in ways])
    chance = [torch.stack([_told(way[order], graph, count).mean() for order in orders]).mean() for way in ways]
    diverged = torch.stack([divergence(way, expected.to(graph.device)) for way in ways])
    gained = influence.mean(1) - torch.stack(chance)
    columns = (
        *(gained, _errors(gained, influence)),
        torch.stack([torch.special.entr(_shares(way, count)).sum() for way in ways]),
        *(diverged.mean(1), _errors(diverged.mean(1), diverged)),
    )
    return Scores(*(column.tolist() for column in columns))


def _errors(estimates: Tensor, influence: Tensor) -> Tensor:
    spread = (influence - influence[0]).std(1) / influence.shape[1] ** 0.5
    # With a spread of 0, any difference is significant, and no difference gives 0.
    errors: Tensor = (estimates - estimates[0]) / spread.clamp_min(1e-9)
    return errors
