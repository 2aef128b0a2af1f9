"""Distribution normalisation against a plain computation of its formula."""

import numpy as np
import torch

from vs2_plugin.logits.dn import normalised


def unit(values, axis):
    return values / np.linalg.norm(values, axis=axis, keepdims=True)


def test_it_is_the_formula():
    random = np.random.default_rng(0)
    classifier, unlabeled = unit(random.normal(size=(8, 5)), 0), unit(random.normal(size=(20, 8)) + 1, 1)
    x = unit(random.normal(size=(7, 8)), 1)
    images = unit(x - 0.3 * unlabeled.mean(0), 1)
    texts = unit(classifier - 0.3 * classifier.mean(1, keepdims=True), 0)
    read = normalised(torch.from_numpy(classifier), torch.from_numpy(unlabeled), 0.3)
    np.testing.assert_allclose(read(torch.from_numpy(x)).numpy(), 100 * images @ texts)


def test_without_a_weight_it_is_clip():
    classifier = torch.nn.functional.normalize(torch.randn(8, 5), dim=0)
    x = torch.nn.functional.normalize(torch.randn(7, 8), dim=1)
    torch.testing.assert_close(normalised(classifier, torch.randn(20, 8), 0.0)(x), 100 * x @ classifier)
