"""Directions: cosines by NumPy, assignments by trying all of them."""

from itertools import permutations

import numpy as np
import pytest
import torch

from vs2_plugin.quality import dictionary
from vs2_plugin.quality.dictionary import agreement, nearest_cosines


def directions(count, seed=0, width=8):
    found = np.random.default_rng(seed).normal(size=(count, width)) + 0.3
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@pytest.mark.parametrize("signed", [True, False])
def test_nearest_cosines_are_those_of_the_whole_matrix(signed, monkeypatch):
    monkeypatch.setattr(dictionary, "_BLOCK", 60)  # three rows at a time
    unit = directions(20)
    cosines = unit @ unit.T
    cosines = cosines if signed else np.abs(cosines)
    np.fill_diagonal(cosines, -2)
    np.testing.assert_allclose(nearest_cosines(torch.from_numpy(unit), signed), cosines.max(1), rtol=1e-5)


@pytest.mark.parametrize("signed", [True, False])
def test_directions_are_assigned_so_that_the_sum_is_the_largest(signed):
    one, other = directions(4, 1), -directions(6, 2)
    cosines = one @ other.T if signed else np.abs(one @ other.T)
    best = max(cosines[range(4), order].sum() for order in permutations(range(6), 4))
    found = agreement(torch.from_numpy(one), torch.from_numpy(other), signed)
    assert found.cosines.sum() == pytest.approx(best, rel=1e-5)
    assert len(found.cosines) == len(found.random) == 4


def test_the_same_dictionary_in_another_order_agrees_and_a_random_one_does_not():
    one = directions(200, width=32)
    found = agreement(torch.from_numpy(one), torch.from_numpy(np.random.default_rng(9).permutation(one)))
    np.testing.assert_allclose(found.cosines, 1, rtol=1e-5)
    assert found.random.mean() < 0.7


def test_a_random_dictionary_has_the_mean_and_covariance():
    one = torch.from_numpy(np.random.default_rng(0).normal(size=(4000, 6)) * np.linspace(0.3, 1, 6) + 1)
    one = one / one.norm(dim=1, keepdim=True)
    drawn = dictionary._random_like(one)
    assert torch.equal(drawn, dictionary._random_like(one))
    np.testing.assert_allclose(drawn.norm(dim=1), 1, rtol=1e-5)
    np.testing.assert_allclose(drawn.mean(0), one.mean(0), atol=0.03)
    np.testing.assert_allclose(np.cov(drawn.numpy().T), np.cov(one.numpy().T), atol=0.03)


def test_a_large_dictionary_is_stood_for_by_some_directions(monkeypatch):
    monkeypatch.setattr(dictionary, "_ENTRIES", 200)
    monkeypatch.setattr(dictionary, "_LOOKED_AT", 200)
    one = torch.from_numpy(directions(20))
    assert len(agreement(one, one).cosines) == 10 and len(nearest_cosines(one)) == 10
    np.testing.assert_allclose(agreement(one, one).cosines, 1, rtol=1e-5)
