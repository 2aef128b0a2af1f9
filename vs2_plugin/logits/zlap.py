"""ZLaP: classes spread from texts over a graph of images (arXiv 2404.04072)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vs2_plugin.logits.graph import both_ways, nearest
from vs2_plugin.steering.batch import Batch

__all__ = ["propagated", "spread"]

#: Classes at a time, and the largest remainder of the series that is left out.
_BATCH, _REST = 128, 1e-8
#: The score of a class without any path to an image.
_NONE = 1e-30


def propagated(
    classifier: Tensor, unlabeled: Tensor, edges: int, power: float, damping: float
) -> Callable[[Tensor, Batch], Tensor]:
    """Return the function from embeddings ``[batch, e]`` and their batch to logits ``[batch, classes]``: logarithms of
    the scores, which are taken to be in proportion to probabilities.

    An image has edges to the nearest images, weighted by the cosine, and to the nearest texts, weighted by the cosine
    to the power of gamma. The scores of images of the graph (``batch.rows``) are :func:`spread` from the texts; those
    of another image are the weighted sums of the scores of the nodes that its edges lead to.

    Args:
        classifier: ``[e, classes]``, of unit norm.
        unlabeled: the images of the graph, ``[m, e]``, of unit norm.
        edges: number of an image's edges to images, itself included, and to texts, each.
        power: gamma.
        damping: a.
    """
    texts = classifier.T.contiguous()

    def joined(x: Tensor, own: bool) -> tuple[Tensor, Tensor]:
        near, rows = nearest(x, unlabeled, edges - own, own)
        like, classes = nearest(x, texts, edges)
        weights = torch.cat([near.clamp_min(0), like.clamp_min(0) ** power], dim=1)
        return weights, torch.cat([rows + len(texts), classes], dim=1)

    scores = spread(*joined(unlabeled, own=True), len(texts), damping)

    def read(x: Tensor, batch: Batch) -> Tensor:
        if batch.rows is not None:
            return scores[len(texts) + batch.rows].clamp_min(_NONE).log()
        totals = torch.zeros(len(x), len(texts), device=x.device)
        for weight, nodes in zip(*(part.T for part in joined(x, own=False)), strict=True):
            totals += weight[:, None] * scores[nodes]
        return totals.clamp_min(_NONE).log()

    return read


def spread(weights: Tensor, nodes: Tensor, texts: int, damping: float) -> Tensor:
    """Return the scores ``[texts + m, texts]`` of all nodes: the columns of ``(1 - a D^-1/2 W D^-1/2)^-1`` for the
    texts, which are the first nodes, as a series of powers.

    Args:
        weights: the weights ``[m, edges]`` of the edges of m images.
        nodes: the nodes that the edges lead to, int64 ``[m, edges]``.
        texts: the number of texts.
        damping: a, below 1.
    """
    graph = both_ways(weights, nodes, texts)
    degrees = graph @ torch.ones(len(graph), 1, device=weights.device)
    scale = torch.where(degrees > 0, degrees.rsqrt(), degrees)
    terms = math.ceil(math.log(_REST) / math.log(damping)) if damping > 0 else 0
    scores = torch.zeros(len(graph), texts, device=weights.device)
    for classes in torch.arange(texts, device=weights.device).split(_BATCH):
        start = torch.zeros(len(graph), len(classes), device=weights.device)
        start[classes, classes - classes[0]] = 1
        series = start
        for _ in range(terms):
            series = start + damping * scale * (graph @ (scale * series))
        scores[:, classes] = series
    return scores
