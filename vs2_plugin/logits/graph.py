"""Nearest neighbours among embeddings, and graphs of neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["both_ways", "nearest"]

#: Queries per matrix product.
_BATCH = 1024


def nearest(queries: Tensor, keys: Tensor, k: int, own: bool = False) -> tuple[Tensor, Tensor]:
    """Return the cosines and row numbers, ``[n, min(k, m)]`` each, of the keys of largest cosine, best first.

    Args:
        queries: ``[n, e]``, of unit norm.
        keys: ``[m, e]``, of unit norm.
        k: the number of neighbours.
        own: whether queries and keys are the same, so that none is its own neighbour: at most m - 1 then.
    """
    k = min(k, len(keys) - own)
    cosines, rows = [], []
    for start in range(0, len(queries), _BATCH):
        products = queries[start : start + _BATCH] @ keys.T
        if own:
            products.diagonal(start).fill_(-torch.inf)
        best = products.topk(k, dim=1)
        cosines.append(best.values)
        rows.append(best.indices)
    return torch.cat(cosines), torch.cat(rows)


def both_ways(weights: Tensor, nodes: Tensor, first: int = 0) -> Tensor:
    """Return the symmetric sparse matrix of edges ``[first + n, first + n]``; weights of coinciding edges are added.

    Args:
        weights: the weights ``[n, k]`` of k edges from each of n nodes.
        nodes: the nodes that the edges lead to, int64 ``[n, k]``.
        first: the number of the first of the n nodes.
    """
    ends = torch.arange(first, first + len(nodes), device=nodes.device)[:, None].expand_as(nodes)
    both = torch.stack([torch.cat([ends, nodes]).flatten(), torch.cat([nodes, ends]).flatten()])
    total = first + len(nodes)
    with torch.sparse.check_sparse_tensor_invariants(enable=False):  # torch warns unless this is set
        return torch.sparse_coo_tensor(both, weights.repeat(2, 1).flatten(), (total, total)).coalesce()
