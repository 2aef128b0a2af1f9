"""The statistics against plain loops, resampled indices and SciPy."""

import numpy as np
import pytest
import scipy.stats

from vs2_plugin.results.statistics import (
    by_fvu,
    calibration,
    calibration_of_bins,
    class_changes,
    interval,
    pair,
    share_interval,
)


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.97])
def test_interval_is_scipys_percentile_bootstrap(rng, share):
    correct = rng.random(500) < share
    expected = scipy.stats.bootstrap(
        (correct.astype(float),), np.mean, n_resamples=20_000, method="percentile", rng=rng
    ).confidence_interval
    assert interval(correct) == pytest.approx((expected.low, expected.high), abs=0.003)


def test_interval_of_a_paired_difference_is_that_of_resampled_images(rng):
    before = rng.random(400) < 0.5
    after = np.where(rng.random(400) < 0.8, before, ~before)
    draws = rng.integers(0, 400, (20_000, 400))
    expected = np.quantile(after[draws].mean(1) - before[draws].mean(1), [0.025, 0.975])
    found = interval(after.astype(int) - before)
    assert found == pytest.approx(expected, abs=0.004)
    # Pairing is worth it: independent intervals of this size would be wider.
    alone = interval(after)
    assert found.high - found.low < alone.high - alone.low


def test_interval_of_values_that_are_all_different(rng):
    values = rng.normal(size=300)
    expected = scipy.stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=rng)
    assert interval(values) == pytest.approx(tuple(expected.confidence_interval), abs=0.01)


def test_interval_is_the_same_every_time_and_shrinks_to_a_point_where_nothing_varies():
    correct = np.arange(100) < 30
    assert interval(correct) == interval(correct[::-1])
    assert interval(np.ones(10)) == (1, 1)


@pytest.mark.parametrize(("right", "of"), [(0, 1), (0, 20), (20, 20), (1, 3), (470, 500)])
def test_interval_of_a_share_is_scipys_by_wilson(right, of):
    expected = scipy.stats.binomtest(right, of).proportion_ci(0.95, method="wilson")
    assert share_interval(np.arange(of) < right) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_pair_matches_images_whatever_their_order_and_repetitions(rng):
    digest = rng.integers(0, 20, 200).astype(np.uint64) + np.uint64(2**63)  # every image about ten times
    target = rng.integers(0, 3, 200)
    there = rng.permutation(200)
    order = pair(digest, target, digest[there], target[there])
    assert sorted(order) == list(range(200))
    assert (digest[there][order] == digest).all() and (target[there][order] == target).all()


def test_pair_refuses_other_images():
    digest, target = np.arange(5, dtype=np.uint64), np.zeros(5, int)
    assert pair(digest, target, digest[:4], target[:4]) is None
    assert pair(digest, target, digest + np.uint64(1), target) is None
    assert pair(digest, target, digest, target + 1) is None
    repeated = np.array([0, 0, 1], np.uint64), np.array([0, 1, 1], np.uint64)
    assert pair(repeated[0], target[:3], repeated[1], target[:3]) is None


def test_calibration_is_that_of_plain_loops(rng):
    confidence = rng.random(1000).astype(np.float32)
    confidence[:3] = 1.0
    correct = rng.random(1000) < confidence
    ece, n = 0.0, len(confidence)
    for b in range(15):
        mine = [i for i in range(n) if b / 15 < confidence[i] <= (b + 1) / 15]
        if mine:
            accuracy = sum(bool(correct[i]) for i in mine) / len(mine)
            mean = sum(float(confidence[i]) for i in mine) / len(mine)
            ece += len(mine) / n * abs(accuracy - mean)
    found = calibration(confidence, correct)
    assert found.ece == pytest.approx(ece, abs=1e-9)
    assert found.share.sum() == pytest.approx(1)


def test_calibration_of_confident_and_always_wrong_is_one_and_empty_bins_are_nan():
    found = calibration(np.ones(10, np.float32), np.zeros(10, bool))
    assert found.ece == 1 and found.share[-1] == 1 and np.isnan(found.accuracy[:-1]).all()
    assert calibration(np.zeros(4), np.zeros(4, bool)).share[0] == 1


def test_class_changes_are_those_of_plain_loops(rng):
    target, before, after = (rng.integers(0, 5, 300) for _ in range(3))
    found = {change.label: change for change in class_changes(target, before, after)}
    for label in range(5):
        mine = [i for i in range(300) if target[i] == label]
        mended = [int(before[i]) for i in mine if before[i] != label and after[i] == label]
        broken = [int(after[i]) for i in mine if before[i] == label and after[i] != label]
        change = found[label]
        assert (change.images, change.mended, change.broken) == (len(mine), len(mended), len(broken))
        assert change.mended_from[1] == max(map(mended.count, mended)) == mended.count(change.mended_from[0])
        assert change.broken_to[1] == max(map(broken.count, broken)) == broken.count(change.broken_to[0])
        assert change.change == pytest.approx((len(mended) - len(broken)) / len(mine))
    ordered = [change.change for change in class_changes(target, before, after)]
    assert ordered == sorted(ordered, reverse=True)
    assert all(type(label) is int for label in found)  # which JSON knows


def test_a_class_that_nothing_happened_to_and_a_class_without_images():
    (change,) = class_changes(np.array([2, 2]), np.array([2, 0]), np.array([2, 0]))
    assert change.label == 2 and change.change == 0 and change.mended_from is None and change.broken_to is None


def test_bins_of_fvu_hold_every_image_once_and_equally_many(rng):
    fvu = rng.gamma(2, size=1000)
    bins = by_fvu(fvu)
    held = np.array([found.images for found in bins])
    assert len(bins) == 10 and (held.sum(0) == 1).all() and (held.sum(1) == 100).all()
    for found in bins:
        assert found.low <= fvu[found.images].min() and fvu[found.images].max() <= found.high


def test_equal_fvu_share_a_bin_and_few_images_make_few_bins():
    assert by_fvu(np.full(100, 0.2)) == []
    halves = by_fvu(np.repeat([0.1, 0.5], 100))
    assert all(len(set(np.repeat([0.1, 0.5], 100)[found.images])) == 1 for found in halves)
    assert sum(found.images.sum() for found in halves) == 200
    assert len(by_fvu(np.arange(45.0))) == 2
    assert len(by_fvu(np.arange(5.0))) == 1


def test_calibration_of_bins_is_that_of_the_images_in_them():
    rng = np.random.default_rng(5)
    confidence, correct = rng.uniform(0.3, 1, 400), rng.random(400) < 0.6
    whole = calibration(confidence, correct)
    full = np.flatnonzero(whole.share)
    rows = [[round(400 * whole.share[i]), whole.confidence[i], whole.accuracy[i]] for i in full]
    found = calibration_of_bins(rows, whole.ece)
    assert found.ece == whole.ece
    for name in ("share", "confidence", "accuracy"):
        np.testing.assert_allclose(getattr(found, name), getattr(whole, name))


@pytest.mark.parametrize("rows", [[], [[0, 0.5, 0.5]], [[np.inf, 0.5, 0.5]], [[3, np.nan, 0.5]], [[3, 0.5, np.inf]]])
def test_bins_without_images_or_numbers_are_refused(rows):
    with pytest.raises(ValueError, match="expected bins that hold images"):
        calibration_of_bins(rows, 0.1)


def test_of_equal_changes_the_one_that_mended_more_comes_first():
    target = np.array([0] * 4 + [1] * 4)
    before, after = np.array([0, 0, 0, 1, 0, 0, 1, 1]), np.array([0, 0, 0, 0, 1, 1, 1, 0])
    found = class_changes(target, before, after)
    assert [(change.label, change.mended, change.broken) for change in found] == [(1, 2, 1), (0, 1, 0)]
