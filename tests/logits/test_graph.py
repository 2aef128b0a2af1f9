"""Nearest embeddings in blocks, and graphs, against plain computations."""

import torch
import torch.nn.functional as F

from vs2_plugin.logits import graph
from vs2_plugin.logits.graph import both_ways, nearest


def test_the_nearest_are_those_of_largest_cosine_whatever_the_blocks(monkeypatch):
    monkeypatch.setattr(graph, "_BATCH", 4)
    x = F.normalize(torch.randn(11, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    products = x @ x.T
    cosines, rows = nearest(x[:7], x, 3)
    assert torch.equal(rows, products[:7].topk(3).indices) and torch.equal(rows[:, 0], torch.arange(7))
    torch.testing.assert_close(cosines, products[:7].topk(3).values)
    _, others = nearest(x, x, 3, own=True)
    assert torch.equal(others, products.fill_diagonal_(-1).topk(3).indices)
    assert nearest(x, x, 50, own=True)[1].shape == (11, 10)


def test_a_graph_has_its_edges_both_ways_and_adds_them_up():
    weights, nodes = torch.tensor([[1.0, 2.0], [4.0, 8.0]]), torch.tensor([[0, 2], [0, 1]])
    expected = torch.tensor([[0.0, 1.0, 4.0], [1.0, 0.0, 10.0], [4.0, 10.0, 0.0]])
    assert torch.equal(both_ways(weights, nodes, first=1).to_dense(), expected)
