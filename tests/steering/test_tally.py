"""Means over the images that were seen."""

import pytest
import torch

from vs2_plugin.steering.tally import Tally, counted


def test_means_are_of_all_images_since_the_last_reset():
    tally = Tally()
    assert tally.means() == {}
    tally.add(opened=torch.tensor([True, False]), fvu=torch.tensor([0.5, 1.5]))
    tally.add(opened=torch.tensor([True]), fvu=torch.tensor([4.0]))
    assert tally.means() == tally.means() == {"opened": pytest.approx(2 / 3), "fvu": 2.0}
    tally.add(opened=torch.tensor([True]), fvu=torch.tensor([2.0]))
    assert tally.means() == {"opened": 0.75, "fvu": 2.0}
    tally.reset()
    assert tally.means() == {}


def test_what_is_counted_apart_counts_when_it_is_kept():
    one, other = Tally(), Tally()
    one.add(fvu=torch.ones(3))
    with counted() as told:
        one.add(fvu=torch.full((3,), 5.0))
        other.add(share=torch.tensor([0.25, 0.75]))
    assert one.means() == {"fvu": 1.0} and other.means() == {}
    for tally, sums, count in told:
        tally.keep(sums, count)
    assert one.means() == {"fvu": 3.0} and other.means() == {"share": 0.5}
    one.add(fvu=torch.full((6,), 5.0))
    assert one.means() == {"fvu": 4.0}


def test_what_is_kept_within_a_block_counts_apart_too():
    tally = Tally()
    with counted() as outer:
        with counted() as inner:
            tally.add(fvu=torch.ones(2))
        assert not outer
        for one, sums, count in inner:  # as a replayed graph does
            one.keep(sums, count)
    assert tally.means() == {} and len(outer) == 1


def test_numbers_are_added_in_double_precision():
    tally = Tally()
    for _ in range(3):
        tally.add(fvu=torch.full((1,), 2.0**24))
        tally.add(fvu=torch.ones(1))
    assert tally.means() == {"fvu": (2**24 + 1) / 2}
