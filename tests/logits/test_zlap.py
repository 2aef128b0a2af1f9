"""ZLaP against a plain computation of its formulas."""

import numpy as np
import pytest
import torch

from vs2_plugin.logits import zlap
from vs2_plugin.steering.batch import Batch

from .test_dn import unit


def joined(x, images, texts, own):
    """Weights of the edges of each row of x, as a matrix over texts and images."""
    found = np.zeros((len(x), len(texts) + len(images)))
    for row, image in enumerate(x):
        near, like = images @ image, texts @ image
        if own:
            near[row] = -np.inf
        for place in np.argsort(-near)[: 3 - own]:
            found[row, len(texts) + place] = max(near[place], 0)
        for place in np.argsort(-like)[:3]:
            found[row, place] = max(like[place], 0) ** 2
    return found


@pytest.mark.parametrize("damping", [0.0, 0.4, 0.95])
def test_it_is_the_formula(damping, monkeypatch):
    monkeypatch.setattr(zlap, "_BATCH", 2)
    random = np.random.default_rng(0)
    texts, images = unit(random.normal(size=(5, 8)), 1), unit(random.normal(size=(20, 8)) + 0.3, 1)
    x = unit(random.normal(size=(7, 8)) + 0.3, 1)
    graph = np.zeros((25, 25))
    graph[5:] = joined(images, images, texts, own=True)
    graph += graph.T
    scale = np.diag(graph.sum(1) ** -0.5)
    scores = np.linalg.inv(np.eye(25) - damping * scale @ graph @ scale)[:, :5]

    read = zlap.propagated(*map(torch.from_numpy, (texts.T.astype("f4"), images.astype("f4"))), 3, 2.0, damping)
    rows = torch.arange(20)
    within = read(torch.from_numpy(images).float()[rows], Batch(rows=rows)).exp()
    np.testing.assert_allclose(within.numpy(), scores[5:], rtol=1e-3, atol=1e-6)
    others = read(torch.from_numpy(x).float(), Batch()).exp()
    np.testing.assert_allclose(others.numpy(), joined(x, images, texts, own=False) @ scores, rtol=1e-3, atol=1e-6)


def test_what_no_path_leads_to_has_a_score_too():
    texts = torch.eye(4)
    images = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]])
    read = zlap.propagated(texts, images, 2, 5.0, 0.3)
    logits = read(-images, Batch())
    assert logits.isfinite().all()
