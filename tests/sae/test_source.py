"""How activations are read."""

import numpy as np
import pytest
import torch

from vs2_plugin.sae import source as module
from vs2_plugin.sae.source import Source, ahead


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_parts_are_given_in_order_each_after_the_next_was_asked_for(count, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "on_disk", lambda array: True)
    monkeypatch.setattr(module, "ask_for", lambda array, rows: asked.append(int(rows[0])))
    given = []
    source = Source(np.zeros((count + 1, 2), np.float32), "cpu")
    for part in ahead((np.array([number]) for number in range(count)), [source]):
        given.append(int(part[0]))
        assert asked[: len(given)] == given  # its own, and perhaps the next one's already
    assert given == asked == list(range(count))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_mean_and_variance_are_those_of_float64_far_from_the_origin(dtype):
    rows = (np.random.default_rng(0).standard_normal((700, 5)) + 300).astype(dtype)
    source = Source(rows, "cpu")
    exact = rows.astype(np.float64)
    torch.testing.assert_close(source.mean, torch.from_numpy(exact.mean(0)).float())
    assert source.variance == pytest.approx(((exact - exact.mean(0)) ** 2).sum(1).mean(), rel=1e-9)
    assert torch.equal(source.read(np.array([3, 1])), torch.from_numpy(exact[[3, 1]]).float())


def test_the_moments_of_what_a_device_holds_are_summed_there_in_larger_parts(monkeypatch):
    monkeypatch.setattr(module, "_SUMMED", 300)
    rows = torch.from_numpy(np.random.default_rng(0).standard_normal((700, 5))).half() + 300
    monkeypatch.setattr(module, "_on_gpu", lambda given, device: torch.from_numpy(given))
    source = Source(rows.numpy(), "cpu")
    torch.testing.assert_close(source.mean, rows.double().mean(0).float(), rtol=1e-7, atol=0)
    assert source.variance == pytest.approx(float((rows.double() - rows.double().mean(0)).square().sum(1).mean()))
