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

__all__ = ["NEIGHBOURS", "Scores", "information", "modularity", "neighbour_graph", "scores"]

#: Neighbours of each image in the graph.
NEIGHBOURS = 10
_BLOCK = 2048
_SHUFFLES = 4


def neighbour_graph(embeddings: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """The k images of largest cosine of each image, itself left out: int64 ``[n, min(k, n - 1)]``, best first.

    Args:
        embeddings: ``[n, e]``, n at least 2; any scale.
        k: neighbours per image.
    """
    unit = F.normalize(embeddings.float(), dim=-1)
    k = min(k, len(unit) - 1)
    found = []
    for start in range(0, len(unit), _BLOCK):
        cosines = unit[start : start + _BLOCK] @ unit.T
        rows = torch.arange(len(cosines), device=unit.device)
        cosines[rows, rows + start] = -torch.inf
        found.append(cosines.topk(k, dim=1).indices)
    return torch.cat(found)


def information(classes: Tensor, graph: Tensor, count: int) -> Tensor:
    """Mutual information of class and neighbour's class, in nats, as its influence function: float64 ``[n]``.

    With J the joint distribution of the classes at both ends of an edge and m its margin, an edge tells
    ``log J[a, b] / (m[a] m[b])``. The mean over images is the mean over edges, which is the plug-in mutual information.

    Args:
        classes: int64 ``[n]``.
        graph: int64 ``[n, k]``, as from :func:`neighbour_graph`.
        count: classes are below this.
    """
    ours, theirs = classes[:, None].expand_as(graph), classes[graph]
    pairs = torch.stack([ours * count + theirs, theirs * count + ours])
    # Only the pairs that occur are counted: a table of all would be of classes squared.
    _, place, times = pairs.unique(return_inverse=True, return_counts=True)
    joint = times.double()[place[0]] / pairs.numel()
    margin = torch.bincount(torch.stack([ours, theirs]).flatten(), minlength=count).double() / pairs.numel()
    return _influence((joint / (margin[ours] * margin[theirs])).log(), graph)


def modularity(classes: Tensor, graph: Tensor, count: int) -> Tensor:
    """Modularity of the classes on the graph, as its influence function: float64 ``[n]``, whose mean it is.

    It is the share of edges within a class less the share by chance, ``Σ_c q_c²``.
    """
    share = torch.bincount(classes, minlength=count).double() / len(classes)
    within = _influence((classes[graph] == classes[:, None]).double(), graph)
    return within - 2 * share[classes] + share.square().sum()


def _influence(edges: Tensor, graph: Tensor) -> Tensor:
    """That of each image on the mean of values of the edges, ``[n, k]``: ``[n]``, with the same mean.

    An image is at one end of its own k edges, and at the other end of those of the images that it is a neighbour of:
    it counts at both.
    """
    mean = edges.mean()
    parts = (edges - mean) / graph.shape[1]
    return parts.sum(1).index_add(0, graph.flatten(), parts.flatten()) + mean


class Scores(NamedTuple):
    """Of each of several ways to classify the same images. The first way is what the others are compared with."""

    information: Tensor
    """float64 ``[ways]``: mutual information of an image's class and its neighbours', in nats, less what chance gives.
    """
    information_errors: Tensor
    """``[ways]``: by how many standard errors, over samples of images, it is above that of the first way."""
    modularity: Tensor
    """float64 ``[ways]``."""
    modularity_errors: Tensor
    """``[ways]``, likewise."""


def scores(ways: Sequence[Tensor], graph: Tensor, count: int) -> Scores:
    """Score ways to classify n images, int64 ``[n]`` each.

    What chance gives is the mean information when the same classes are dealt to the images in another order: the
    plug-in estimate is above 0 for any classes, and more so for many.
    """
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(graph), generator=generator).to(graph.device) for _ in range(_SHUFFLES)]
    told = torch.stack([information(way, graph, count) for way in ways])
    chance = [torch.stack([information(way[order], graph, count).mean() for order in orders]).mean() for way in ways]
    knit = torch.stack([modularity(way, graph, count) for way in ways])
    gained = told.mean(1) - torch.stack(chance)
    return Scores(gained, _errors(gained, told), knit.mean(1), _errors(knit.mean(1), knit))


def _errors(estimates: Tensor, influence: Tensor) -> Tensor:
    spread = (influence - influence[0]).std(1) / influence.shape[1] ** 0.5
    # Of a spread of 0, a difference is sure, and none is none.
    errors: Tensor = (estimates - estimates[0]) / spread.clamp_min(1e-9)
    return errors
