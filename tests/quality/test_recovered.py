"""What the reconstruction keeps of predictions, by NumPy."""

import numpy as np
import pytest
import torch

from vs2_plugin.quality.recovered import Recovered, recovered
from vs2_plugin.sae.source import Source


def test_shares_are_those_of_a_plain_computation(make_sae):
    rng = np.random.default_rng(0)
    sae, x = make_sae(k=20), rng.normal(size=(80, 32)).astype(np.float32)
    project, classifier, labels = rng.normal(size=(32, 6)), rng.normal(size=(6, 5)), rng.integers(0, 5, 80)
    numbers = np.arange(10, 80)

    def classes(rows):
        embedded = rows @ project
        return (embedded / np.linalg.norm(embedded, axis=1, keepdims=True) @ classifier).argmax(1)

    code = np.maximum((x - sae.b_dec.numpy()) @ sae.encoder.weight.numpy().T + sae.encoder.bias.numpy(), 0)
    code[code < np.sort(code, axis=1)[:, -20:-19]] = 0
    rebuilt = classes((code @ sae.W_dec.numpy() + sae.b_dec.numpy())[10:])
    plain, constant, truth = classes(x[10:]), classes(x.mean(0)[None])[0], labels[10:]

    def embed(rows):
        return rows @ torch.from_numpy(project).float()

    found = recovered(sae, Source(x, "cpu"), numbers, embed, torch.from_numpy(classifier).float(), truth)
    expected = [(rebuilt == plain).mean(), (plain == constant).mean()]
    expected += [(way == truth).mean() for way in (plain, rebuilt, constant)]
    assert found == pytest.approx(expected)
    assert recovered(sae, Source(x, "cpu"), numbers, embed, torch.from_numpy(classifier).float())[2:] == (None,) * 3


def test_what_is_recovered_is_above_the_constant_activation():
    assert Recovered(1, 0, 0.75, 0.5, 0.25).share == 0.5
    assert Recovered(1, 0, 0.2, 0.5, 0.25).share is None and Recovered(1, 0, 0.25, 0.5, 0.25).share is None
    assert Recovered(1, 0).share is None
