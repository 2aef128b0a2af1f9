"""StatA against a plain computation of its formulas."""

import numpy as np
import torch
from scipy.special import log_softmax, softmax

from vs2_plugin.logits.stata import mixture

from .test_dn import unit


def mixed(texts, x, anchor, rounds):
    plain = log_softmax(100 * x @ texts.T, axis=1)
    weights = np.zeros((len(x), len(x)))
    for row, image in enumerate(x):
        near = x @ image
        near[row] = -np.inf
        best = np.argsort(-near)[:3]
        weights[row, best] = np.maximum(near[best], 0)
    z = np.exp(plain)
    means = texts
    variances = tied = np.array([(y[:, None] * (x - t) ** 2).sum(0) / y.sum() for y, t in zip(z.T, texts, strict=True)])
    for _ in range(rounds):
        pairs = list(zip(means, variances, strict=True))
        density = np.stack([-(np.log(v) + (x - m) ** 2 / v).sum(1) / 2 for m, v in pairs], 1)
        for _ in range(5):
            z = softmax(plain + density + (weights + weights.T) @ z, axis=1)
        sums = z.sum(0)[:, None] + anchor
        means = (z.T @ x + anchor * texts) / sums
        own = np.array([(y[:, None] * (x - m) ** 2).sum(0) for y, m in zip(z.T, means, strict=True)])
        variances = (own + anchor * (tied + (means - texts) ** 2)) / sums
    return z


def test_it_is_the_formula():
    random = np.random.default_rng(0)
    texts = unit(random.normal(size=(5, 8)) + 3, 1)
    x = unit(texts[random.integers(5, size=40)] + 0.2 * random.normal(size=(40, 8)) + 0.1, 1)
    found = mixture(torch.from_numpy(texts.T.copy()), torch.from_numpy(x), 1.0, 3).exp()
    expected = mixed(texts, x, 1.0, 3)
    assert np.abs(expected - softmax(100 * x @ texts.T, axis=1)).max() > 0.2
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-9)


def test_a_class_without_images_stays_at_its_text():
    texts = torch.eye(4, 8).T.contiguous()
    x = torch.nn.functional.normalize(texts.T[torch.arange(30) % 2] + 0.05 * torch.randn(30, 8), dim=1)
    logits = mixture(texts, x, 1.0, 10)
    assert logits.isfinite().all() and torch.equal(logits.argmax(1), torch.arange(30) % 2)
