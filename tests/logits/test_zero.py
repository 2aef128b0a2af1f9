"""ZERO against a plain count of votes."""

import numpy as np
import pytest
import torch
from scipy.special import entr, softmax

from vs2_plugin.logits.zero import voted

from .test_dn import unit


def test_it_is_the_vote_of_the_most_confident_views():
    random = np.random.default_rng(0)
    texts = unit(random.normal(size=(8, 5)), 0)
    x = unit(random.normal(size=(50, 12, 8)), 2)
    found = voted(torch.from_numpy(texts), 0.34)(torch.from_numpy(x)).double().exp().numpy()
    ties = 0
    for views, given in zip(x, found, strict=True):
        shares = softmax(100 * views @ texts, axis=1)
        order = np.argsort(entr(shares).sum(1))
        classes = shares.argmax(1)[order]
        votes = np.bincount(classes[:4], minlength=5)
        first = [*np.flatnonzero(votes == votes.max())]
        ties += len(first) > 1
        won = next((label for label in classes[4:] if label in first), first[0]) if len(first) > 1 else first[0]
        small = (np.arange(5) == won) + shares[order[:4]].mean(0)
        np.testing.assert_allclose(given, votes + 0.01 * small, rtol=1e-5, atol=1e-9)
        assert given.argmax() == won
    assert ties > 3


def test_the_share_of_views_is_taken_as_it_is_written():
    texts = torch.eye(3)
    for keep, count in ((0.29, 29), (0.57, 57), (0.299, 29), (1.0, 100)):
        votes = voted(texts, keep)(torch.rand(1, 100, 3)).exp().sum()
        assert votes == pytest.approx(count + 0.02, abs=1e-3)


def test_one_view_votes_at_least_and_logits_are_finite():
    texts = torch.eye(3)
    logits = voted(texts, 0.01)(torch.tensor([[[1.0, 0, 0], [0.6, 0.8, 0]]]))
    assert logits.argmax() == 0 and logits.isfinite().all() and logits.exp().sum() == pytest.approx(1.02)
