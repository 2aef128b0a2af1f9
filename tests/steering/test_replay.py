"""Steerings that are told once, without a GPU: what stands for a graph does the work again, with the same tensors."""

import copy
import logging
import pickle

import pytest
import torch
from torch import Tensor

from vs2_plugin.steering import replay
from vs2_plugin.steering.replay import Replays, can_replay
from vs2_plugin.steering.tally import Tally

pytestmark = pytest.mark.usefixtures("again")


class Doubling:
    """Doubles activations, counts, and asks whether any image is special: one that begins with a 7."""

    def __init__(self):
        self.tally, self.seen = Tally(), []

    def __call__(self, x: Tensor, batch) -> Tensor:
        self.seen.append(x.dtype)
        asked = batch.ask(x[:, 0] == 7)
        self.tally.add(first=x[:, 0])
        return 2 * x + asked()[:, None]


def test_what_is_given_is_what_the_steering_gives_in_the_dtype_of_the_tower():
    steer, replays = Doubling(), Replays()
    for dtype in (torch.float32, torch.bfloat16):
        for x in torch.randn(4, 5, 3).to(dtype):
            given = replays(steer, x)
            assert given.dtype == dtype and torch.equal(given, 2 * x)
    assert set(steer.seen) == {torch.float32}


@torch.inference_mode()
def test_it_works_within_the_inference_mode_and_after_it():
    steer, replays = Doubling(), Replays()
    x = torch.ones(2, 3)
    assert torch.equal(replays(steer, x), 2 * x)
    with torch.inference_mode(False), torch.no_grad():
        assert torch.equal(replays(steer, torch.full((2, 3), 4.0)), torch.full((2, 3), 8.0))
    assert torch.equal(replays(steer, x), 2 * x)


def test_a_batch_for_which_the_answer_is_yes_counts_only_where_it_is_told_anew():
    steer, replays = Doubling(), Replays()
    assert replays(steer, torch.ones(2, 3)) is not None
    assert replays(steer, torch.tensor([[1.0, 2, 3], [7, 0, 0]])) is None
    assert replays(steer, torch.full((2, 3), 4.0)) is not None
    assert steer.tally.means() == {"first": 2.5}


def test_every_shape_is_told_and_of_many_the_first(monkeypatch):
    monkeypatch.setattr(replay, "_MOST", 2)
    steer, replays = Doubling(), Replays()
    found = [replays(steer, torch.ones(count, 3)) for count in (1, 2, 3, 1, 2, 3)]
    assert [one is None for one in found] == [False, False, True] * 2
    replays.forget()
    assert replays(steer, torch.ones(3, 3)) is not None


def test_what_cannot_be_told_is_asked_of_the_steering_itself(caplog):
    def steer(x, batch):
        raise RuntimeError("operation not permitted when stream is capturing")

    caplog.set_level(logging.INFO, "vs2_plugin")
    replays = Replays()
    assert replays(steer, torch.ones(1, 3)) is None and "stream is capturing" in caplog.text
    caplog.clear()
    assert replays(steer, torch.ones(1, 3)) is None and not caplog.records


def test_a_copy_is_told_anew():
    steer, replays = Doubling(), Replays()
    replays(steer, torch.ones(1, 3))
    for other in (copy.deepcopy(replays), pickle.loads(pickle.dumps(replays))):
        assert torch.equal(other(Doubling(), torch.ones(1, 3)), torch.full((1, 3), 2.0))


def test_nothing_is_replayed_on_a_processor():
    with torch.no_grad():
        assert not can_replay(torch.ones(1))
