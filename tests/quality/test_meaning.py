"""Monosemanticity by its sum over pairs, and probes by sorting and counting."""

import numpy as np
import pytest
from scipy.sparse import csr_array

from vs2_plugin.quality.meaning import monosemanticity, sparse_probes


def by_pairs(code, embeddings):
    """MS as it is defined: over all pairs of images."""
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    scores = []
    for a in np.abs(code).T:
        a = (a - a.min()) / (a.max() - a.min()) if a.max() > a.min() else np.zeros_like(a)
        pairs = [(i, j) for i in range(len(a)) for j in range(i) if a[i] * a[j] > 0]
        weights = [a[i] * a[j] for i, j in pairs]
        agree = [a[i] * a[j] * (unit[i] @ unit[j]) for i, j in pairs]
        scores.append(sum(agree) / sum(weights) if pairs else np.nan)
    return np.array(scores)


def random_code(signed=False, count=30, latents=12, seed=0):
    rng = np.random.default_rng(seed)
    code = rng.exponential(size=(count, latents)) * (rng.random((count, latents)) < 0.3)
    code[:, 0] = 0
    code[:, 1] = 0
    code[4, 1] = 1.0  # one image only
    code[:, 3] = np.where(np.arange(count) == 4, 1e-5, np.arange(count) == 5)  # one image by far
    code[:, 2] = 1 + rng.random(count)  # always active
    code[:, 4] = 2  # always the same
    return (code * rng.choice([-1, 1], size=code.shape) if signed else code).astype(np.float32)


@pytest.mark.parametrize("signed", [False, True])
def test_monosemanticity_is_the_sum_over_pairs(signed):
    code, embeddings = random_code(signed), np.random.default_rng(1).normal(size=(30, 100)) + 0.3
    found = monosemanticity(csr_array(code), embeddings, seed=5)
    np.testing.assert_allclose(found.scores, by_pairs(code, embeddings), rtol=1e-5)
    assert np.isnan(found.scores[[0, 1, 4]]).all() and np.isfinite(found.scores).sum() == 9
    order = np.random.default_rng(5).permutation(30)
    np.testing.assert_allclose(found.shuffled, by_pairs(code, embeddings[order]), rtol=1e-5)


def test_latents_of_one_kind_of_image_score_1_and_shuffled_ones_do_not():
    kinds = np.arange(40) % 4
    found = monosemanticity(csr_array(np.eye(4, dtype=np.float32)[kinds]), np.eye(4)[kinds])
    np.testing.assert_allclose(found.scores, 1, rtol=1e-6)
    assert (found.shuffled < 0.5).all()


def auc(scores, mine):
    """Share of pairs of one of the class and one of the rest that are in the right order; of equals, half."""
    differences = scores[mine][:, None] - scores[~mine][None]
    return ((differences > 0) + 0.5 * (differences == 0)).mean()


def test_probes_are_those_of_a_dense_computation():
    rng = np.random.default_rng(3)
    labels = np.repeat([0, 1, 2], [40, 30, 20])
    rng.shuffle(labels)
    code = rng.exponential(size=(90, 15)) * (rng.random((90, 15)) < 0.4)
    code[:, 4] += (labels == 1) * rng.random(90)
    code[:, 7] -= (labels == 2) * rng.random(90)
    held = np.arange(90) % 3 == 0
    found = sparse_probes(csr_array(code), labels, ~held, held, (1, 3))
    expected = {1: [], 3: []}
    for label in (0, 1, 2):
        mine = labels[~held] == label
        apart = code[~held][mine].mean(0) - code[~held][~mine].mean(0)
        best = np.argsort(-np.abs(apart))[:3]
        expected[1].append(auc(np.sign(apart[best[0]]) * code[held][:, best[0]], labels[held] == label))
        weight = np.where(mine, 1 / mine.sum(), 1 / (~mine).sum())
        design = np.column_stack([code[~held][:, best], np.ones(60)])
        normal = design.T @ (design * weight[:, None])
        weights = np.linalg.solve(normal, design.T @ (weight * mine))[:-1]
        expected[3].append(auc(code[held][:, best] @ weights, labels[held] == label))
    for size, values in expected.items():
        assert found[size].classes == 3 and found[size].auc == pytest.approx(np.mean(values), abs=1e-9)


def test_classes_of_too_few_images_are_not_probed():
    def probed(fitted, held, **least):
        labels = np.repeat([0, 1, 0, 1], [*fitted, *held])
        first = np.arange(len(labels)) < sum(fitted)
        return [probe.classes for probe in sparse_probes(csr_array(np.eye(9)), labels, first, ~first, **least).values()]

    assert probed([5, 2], [1, 1]) == [1, 1] and probed([4, 3], [1, 1]) == []
    assert probed([4, 3], [1, 1], least=4) == [1, 1] and probed([4, 3], [1, 1], least=3) == [2, 2]
    for fitted, held in ([7, 0], [1, 1]), ([5, 2], [0, 2]), ([5, 2], [2, 0]):  # no rest, or none to test on
        assert probed(fitted, held) == []
