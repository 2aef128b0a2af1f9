"""InMaP against a plain computation of its formulas."""

import numpy as np
import pytest
import torch
from scipy.special import softmax

from vs2_plugin.logits import inmap

from .test_dn import unit


def learned(classifier, unlabeled, steps, rate, sure, sinkhorn):
    targets = softmax(unlabeled @ classifier / 0.01, axis=1)
    for _ in range(sinkhorn):
        targets /= targets.sum(0)
        targets /= targets.sum(1, keepdims=True)
    for row in targets:
        if row.max() > sure:
            row[:] = np.arange(len(row)) == row.argmax()
    weights, before = classifier, np.inf
    for _ in range(steps):
        gradient = unlabeled.T @ (softmax(unlabeled @ weights / 0.04, axis=1) - targets)
        if np.linalg.norm(gradient) > before:
            rate /= 2
        before = np.linalg.norm(gradient)
        weights = unit(weights - rate / (len(unlabeled) * 0.04) * gradient, 0)
    return weights


@pytest.mark.parametrize("sinkhorn", [0, 3])
def test_it_is_the_formula(sinkhorn, monkeypatch):
    monkeypatch.setattr(inmap, "_BATCH", 8)
    random = np.random.default_rng(0)
    classifier, unlabeled = unit(random.normal(size=(8, 5)), 0), unit(random.normal(size=(20, 8)), 1)
    classifier += 0.03 * random.normal(size=classifier.shape)
    classifier = unit(classifier, 0)
    x = unit(random.normal(size=(7, 8)), 1)
    read = inmap.learned(torch.from_numpy(classifier), torch.from_numpy(unlabeled), 30, 10.0, 0.6, sinkhorn)
    weights = learned(classifier, unlabeled, 30, 10.0, 0.6, sinkhorn)
    assert np.abs(weights - classifier).max() > 0.1
    np.testing.assert_allclose(read(torch.from_numpy(x)).numpy(), x @ weights / 0.04, rtol=1e-9)


def test_it_ends_where_nothing_moves_any_more(monkeypatch):
    monkeypatch.setattr(inmap, "_STILL", 0.1)
    taken = []
    monkeypatch.setattr(inmap, "tqdm", lambda steps, *args, **kwargs: (taken.append(step) or step for step in steps))
    classifier = torch.nn.functional.normalize(torch.randn(8, 5, generator=torch.Generator().manual_seed(0)), dim=0)
    inmap.learned(classifier, classifier.T.contiguous(), 100_000, 100.0, 0.6, 0)
    assert 4 <= len(taken) < 1000


def test_without_steps_it_is_the_classes_of_clip():
    classifier = torch.nn.functional.normalize(torch.randn(8, 5), dim=0)
    x = torch.randn(7, 8)
    torch.testing.assert_close(inmap.learned(classifier, x, 0, 10.0, 0.6, 0)(x), 25 * x @ classifier)
