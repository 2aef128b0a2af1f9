"""TDA against a plain computation of its formulas."""

import numpy as np
import torch
from scipy.special import entr, softmax

from vs2_plugin.logits import tda

from .test_dn import unit


def logits_of(stream, texts):
    """The logits of each image of a stream, from caches that are lists."""
    count = texts.shape[1]
    sure, unsure, found = [[] for _ in range(count)], [[] for _ in range(count)], []
    for x in stream:
        logits = 100 * x @ texts
        shares = softmax(logits)
        entropy, label = entr(shares).sum(), shares.argmax()
        sure[label] = sorted([*sure[label], (entropy, tuple(x))])[:3]
        if 0.2 < entropy / np.log2(count) < 0.5:
            unsure[label] = sorted([*unsure[label], (entropy, tuple(x), tuple(shares > 0.03))])[:2]
        for each, kept in enumerate(sure):
            for _, key in kept:
                logits[each] += 2 * np.exp(-5 * (1 - x @ key))
        for kept in unsure:
            for _, key, possible in kept:
                logits -= 0.4 * np.exp(-(1 - x @ key)) * np.array(possible)
        found.append(logits)
    return np.array(found), unsure


def test_it_is_the_formula():
    random = np.random.default_rng(0)
    texts = unit(random.normal(size=(8, 5)), 0)
    stream = unit(texts.T[random.integers(5, size=60)] + random.normal(size=(60, 8)), 1)
    stream[::2] = unit(stream[::2] + 5 * texts.sum(1), 1)  # unsure ones
    texts = unit(texts + 9 * texts.sum(1, keepdims=True), 0)
    expected, unsure = logits_of(stream, texts)
    assert sum(map(len, unsure)) > 5
    read = tda.Stream(torch.from_numpy(texts).float(), 2.0, 5.0, 0.4, 1.0)
    found = torch.cat([read(x[None]) for x in torch.from_numpy(stream).float()])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-3)


def test_one_class_is_no_trouble():
    read = tda.Stream(torch.ones(1, 1), 2.0, 5.0, 0.4, 1.0)
    assert read(torch.ones(1, 1)).tolist() == [[102.0]]
