"""How well predicted classes fit the neighbourhoods of the images that they are of. No labels are read.

Where steering mends predictions, an image's class says more about the classes of its neighbours. Where it only spreads
predictions over more classes, it does not. Neighbours are taken between the *plain* embeddings, so that steering
cannot bring them nearer.
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
#: Classes up to which pairs are counted in a table of all, of 8 MB at most: of more, only those that occur, by sorting.
_TABLE = 1024
#: How much of a prior is spread evenly, so that an image of a class that should not be there costs a finite amount.
_EVEN = 0.01


def neighbour_graph(embeddings: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """The k images of largest cosine of each image, itself left out: int64 ``[n, min(k, n - 1)]``, best first.

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
        for other in range(one + 1, len(parts)):  # what one is to the other, that is to it
            cosines = part @ parts[other].T
            look(cosines, one, other)
            look(cosines.T.contiguous(), other, one)
    found = []
    for each in best:
        values, columns = (torch.cat(tensors, dim=1) for tensors in zip(*each, strict=True))
        found.append(columns.gather(1, values.topk(k, dim=1).indices))
    return torch.cat(found)


def information(classes: Tensor, graph: Tensor, count: int) -> Tensor:
    """Mutual information of class and neighbour's class, in nats, as its influence function: float64 ``[n]``.

    An image is at one end of its own k edges, and at the other end of those of the images that it is a neighbour of:
    it counts at both. The mean over images is the mean over edges, which is the plug-in mutual information.

    Args:
        classes: int64 ``[n]``.
        graph: int64 ``[n, k]``, as from :func:`neighbour_graph`.
        count: classes are below this.
    """
    edges = _told(classes, graph, count)
    mean = edges.mean()
    parts = (edges - mean) / graph.shape[1]
    return parts.sum(1).index_add(0, graph.flatten(), parts.flatten()) + mean


def _told(classes: Tensor, graph: Tensor, count: int) -> Tensor:
    """What each edge tells: float64 ``[n, k]``. With J the joint distribution of the classes at both ends of an edge
    and m its margin, it is ``log J[a, b] / (m[a] m[b])``."""
    ours, theirs = classes[:, None].expand_as(graph), classes[graph]
    margin = torch.bincount(torch.stack([ours, theirs]).flatten(), minlength=count).double() / (2 * graph.numel())
    # Each edge is counted both ways, which for a pair of equal classes is the same one.
    pairs = torch.minimum(ours, theirs) * count + torch.maximum(ours, theirs)
    joint = _times(pairs, count) * torch.where(ours == theirs, 2, 1) / (2 * graph.numel())
    return (joint / (margin[ours] * margin[theirs])).log()


def _times(pairs: Tensor, count: int) -> Tensor:
    """How often each number, of those below count squared, occurs: float64, of their shape."""
    if count <= _TABLE:
        return torch.bincount(pairs.flatten(), minlength=count * count).take(pairs).double()
    _, place, times = pairs.unique(return_inverse=True, return_counts=True)
    counted: Tensor = times.double()[place]
    return counted


def divergence(classes: Tensor, prior: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the shares of the classes from a prior, in nats: float64 ``[n]``.

    ``Σ_c q_c log(q_c / π_c)``, as its influence function, whose mean it is. Of even shares, it is the logarithm of the
    number of classes less the entropy of the shares.

    Args:
        classes: int64 ``[n]``.
        prior: shares of the classes ``[count]``, with sum 1.
    """
    expected = (1 - _EVEN) * prior.double() + _EVEN / len(prior)
    return (_shares(classes, len(prior)) / expected).log()[classes]


def _shares(classes: Tensor, count: int) -> Tensor:
    return torch.bincount(classes, minlength=count).double() / len(classes)


class Scores(NamedTuple):
    """Of each of several ways to classify the same images. The first way is what the others are compared with.

    An error column says by how many standard errors, over samples of images, a way is above the first.
    """

    information: list[float]
    """Mutual information of an image's class and its neighbours', in nats, less what chance gives."""
    information_errors: list[float]
    entropy: list[float]
    """Of the shares of the classes, in nats: what there is to tell of a neighbour's class."""
    divergence: list[float]
    """Of the shares of the classes from what they should be, in nats."""
    divergence_errors: list[float]


def scores(ways: Sequence[Tensor], graph: Tensor, count: int, prior: Tensor | None = None) -> Scores:
    """Score ways to classify n images, int64 ``[n]`` each.

    What chance gives is the mean information when the same classes are dealt to the images in another order: the
    plug-in estimate is above 0 for any classes, and more so for many.

    Args:
        ways: classes of the images, int64 ``[n]`` each.
        graph: int64 ``[n, k]``, as from :func:`neighbour_graph`.
        count: number of classes.
        prior: what the shares of the classes should be, ``[count]``; by default all equal.
    """
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(graph), generator=generator).to(graph.device) for _ in range(_SHUFFLES)]
    expected = torch.full((count,), 1 / count, dtype=torch.float64) if prior is None else prior
    told = torch.stack([information(way, graph, count) for way in ways])
    chance = [torch.stack([_told(way[order], graph, count).mean() for order in orders]).mean() for way in ways]
    apart = torch.stack([divergence(way, expected.to(graph.device)) for way in ways])
    gained = told.mean(1) - torch.stack(chance)
    columns = (
        *(gained, _errors(gained, told)),
        torch.stack([torch.special.entr(_shares(way, count)).sum() for way in ways]),
        *(apart.mean(1), _errors(apart.mean(1), apart)),
    )
    return Scores(*(column.tolist() for column in columns))


def _errors(estimates: Tensor, influence: Tensor) -> Tensor:
    spread = (influence - influence[0]).std(1) / influence.shape[1] ** 0.5
    # Of a spread of 0, a difference is sure, and none is none.
    errors: Tensor = (estimates - estimates[0]) / spread.clamp_min(1e-9)
    return errors
