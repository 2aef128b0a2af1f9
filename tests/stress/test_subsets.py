"""Subsets of test images, counted."""

import numpy as np
import pytest

from vs2_plugin.stress.subsets import batch, few, long_tail, of_classes, shuffled

LABELS = np.repeat(np.arange(10), 40)


@pytest.mark.parametrize(("share", "count"), [(1, 10), (0.5, 5), (0.25, 2), (0.001, 1)])
def test_a_share_of_the_classes_keeps_all_of_their_images(share, count):
    rows = of_classes(LABELS, share, 0)
    assert len(np.unique(LABELS[rows])) == count and len(rows) == len(np.unique(rows)) == 40 * count


def test_a_long_tail_falls_off_by_the_ratio():
    rows = long_tail(LABELS, 10, 0)
    sizes = sorted(np.bincount(LABELS[rows]), reverse=True)
    assert sizes == [round(40 * 10 ** (-rank / 9)) for rank in range(10)] and sizes[0] == 10 * sizes[-1]
    assert len(np.unique(rows)) == len(rows)
    assert (np.bincount(LABELS[long_tail(LABELS, 1, 0)]) == 40).all()
    assert np.bincount(LABELS[long_tail(LABELS, 1000, 0)]).min() == 1  # no class goes


def test_a_batch_is_of_as_many_classes_as_asked_for_and_no_more_images():
    for seed in range(20):
        rows = batch(LABELS, 64, 2, 4, seed)
        assert len(np.unique(rows)) == len(rows) == 64 and 2 <= len(np.unique(LABELS[rows])) <= 4
    assert {len(np.unique(LABELS[batch(LABELS, 64, 2, 4, seed)])) for seed in range(20)} == {2, 3, 4}
    assert len(batch(LABELS, 64, 1, 1, 0)) == 40 and len(np.unique(LABELS[batch(LABELS, 400, 50, 60, 0)])) == 10


def test_draws_differ_and_are_repeatable():
    for subset in (lambda seed: few(LABELS, 50, seed), lambda seed: of_classes(LABELS, 0.5, seed),
                   lambda seed: long_tail(LABELS, 10, seed), lambda seed: shuffled(LABELS, seed),
                   lambda seed: batch(LABELS, 64, 1, 4, seed)):  # fmt: skip
        assert np.array_equal(subset(1), subset(1)) and not np.array_equal(subset(1), subset(2))
    assert len(few(LABELS, 50, 0)) == 50 and len(few(LABELS, 5000, 0)) == 400
