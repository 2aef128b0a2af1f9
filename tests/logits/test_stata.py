"""StatA against a plain computation of its formulas."""

import numpy as np
import torch
from scipy.special import log_softmax, softmax
from torch.nn.functional import normalize

from vs2_plugin.logits.stata import mixture

from .test_dn import unit


def mixed(texts, x, anchor, density, rounds):
    classes, width = texts.shape
    plain = log_softmax(100 * x @ texts.T, axis=1)
    weights = np.zeros((len(x), len(x)))
    for row, image in enumerate(x):
        near = x @ image
        near[row] = -np.inf
        best = np.argsort(-near)[:3]
        weights[row, best] = np.maximum(near[best], 0)
    z = np.exp(plain)
    tied = sum(z[row, c] * (x[row] - texts[c]) ** 2 for row in range(len(x)) for c in range(classes)) / len(x)
    means, variances = texts.copy(), np.tile(tied, (classes, 1))
    for _ in range(rounds):
        pairs = list(zip(means, variances, strict=True))
        likely = np.stack([-(np.log(v) + (x - m) ** 2 / v).sum(1) / 2 for m, v in pairs], 1)
        for _ in range(5):
            z = softmax(plain + density / width * likely + (weights + weights.T) / 2 @ z, axis=1)
        for c in range(classes):
            trust = (z.argmax(1) == c).sum() / ((z.argmax(1) == c).sum() + anchor)
            means[c] = trust * np.average(x, axis=0, weights=z[:, c]) + (1 - trust) * texts[c]
            own = np.average((x - means[c]) ** 2, axis=0, weights=z[:, c])
            variances[c] = trust * own + (1 - trust) * (tied + (means[c] - texts[c]) ** 2)
    return z


def test_it_is_the_formula():
    random = np.random.default_rng(0)
    texts = unit(random.normal(size=(5, 8)) + 3, 1)
    x = unit(texts[random.integers(5, size=40)] + 0.2 * random.normal(size=(40, 8)) + 0.1, 1)
    found = mixture(torch.from_numpy(texts.T.copy()), torch.from_numpy(x), 1.0, 4.0, 3).exp()
    expected = mixed(texts, x, 1.0, 4.0, 3)
    assert np.abs(expected - softmax(100 * x @ texts.T, axis=1)).max() > 0.2
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-9)


def far_from_texts(of, width=256):
    """Texts ``[width, 20]``, and images ``[n, width]`` near each other and far from them, as a CLIP has them."""
    axes = torch.eye(width)
    texts = normalize(axes[2:22] / 2 + axes[0], dim=1)
    noise = 0.02 * torch.randn(len(of), width, generator=torch.Generator().manual_seed(0))
    return texts.T.contiguous(), normalize(0.4 * texts[of] + axes[1] + noise, dim=1)


def test_a_class_of_many_images_does_not_swallow_those_of_one():
    of = torch.cat([torch.zeros(20, dtype=torch.int64), torch.arange(1, 9)])
    texts, x = far_from_texts(of)
    assert torch.equal((x @ texts).argmax(1), of)
    assert torch.equal(mixture(texts, x, 1.0, 10.0, 10).argmax(1), of)
    summed = mixture(texts, x, 1.0, float(x.shape[1]), 10).argmax(1)
    assert (summed == 0).sum() > 20


def test_a_rounding_stays_a_rounding():
    texts, x = far_from_texts(torch.arange(8))
    rounded = normalize(x + 1e-6 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)), dim=1)
    change = mixture(texts, x, 1.0, 10.0, 10) - mixture(texts, rounded, 1.0, 10.0, 10)
    assert change.abs().max() < 0.01


def test_a_class_without_images_stays_at_its_text():
    texts = torch.eye(4, 8).T.contiguous()
    x = normalize(texts.T[torch.arange(30) % 2] + 0.05 * torch.randn(30, 8), dim=1)
    logits = mixture(texts, x, 1.0, 10.0, 10)
    assert logits.isfinite().all() and torch.equal(logits.argmax(1), torch.arange(30) % 2)
