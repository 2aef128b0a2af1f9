"""A batch: what is asked of the images at hand is computed once."""

import pytest
import torch

from vs2_plugin.errors import PluginError
from vs2_plugin.sae.topk import TopKSAE
from vs2_plugin.steering.batch import Batch, call, steer
from vs2_plugin.steering.gate import Gate
from vs2_plugin.steering.move import Code, Move


@pytest.fixture
def encoded(monkeypatch):
    """The tensors that were encoded."""
    seen, inner = [], TopKSAE.encode
    monkeypatch.setattr(TopKSAE, "encode", lambda self, x: seen.append(x) or inner(self, x))
    return seen


def test_once_is_once_for_each_key():
    batch, made = Batch(), []
    for key in ("a", "b", "a", ("a", 1), ("a", 1)):
        assert batch.once(key, lambda key=key: made.append(key) or key) == key
    assert made == ["a", "b", ("a", 1)]
    assert Batch().once("a", lambda: "fresh") == "fresh"


def test_the_embedding_is_asked_for_once_and_of_unit_norm():
    asked = []
    batch = Batch(embed=lambda: asked.append(1) or torch.full((2, 4), 3.0, dtype=torch.bfloat16))
    assert torch.equal(batch.embedding(), torch.full((2, 4), 0.5)) and batch.embedding() is batch.embedding()
    assert asked == [1]


@pytest.mark.parametrize("inference", [False, True])
def test_a_tensor_is_encoded_once_per_sae(make_sae, encoded, inference):
    one, other, batch = make_sae(seed=1), make_sae(seed=2), Batch()
    with torch.inference_mode(inference):
        x = torch.randn(3, 32)
        assert batch.code(one, x) is batch.code(one, x) and batch.code(other, x) is not batch.code(one, x)
        assert len(encoded) == 2
        batch.code(one, x.clone())
        assert len(encoded) == 3


def test_gate_and_steering_share_a_code(make_sae, encoded):
    sae, x = make_sae(), torch.randn(5, 32)

    def double(x, batch):
        return Move(batch.code(sae, x), 2.0)

    expected = Move(Code.of(sae, x), 2.0).apply(x)
    del encoded[:]
    assert torch.equal(Gate(double, sae, torch.zeros(32), None)(x), expected) and len(encoded) == 1


class Shift(torch.nn.Module):
    def forward(self, x):
        return x + 1


@pytest.mark.parametrize(
    "steering", [lambda x: x + 1, lambda x, batch: x + 1, lambda x, *, batch=None: x + 1, Shift(), torch.Tensor.exp]
)
def test_a_plain_function_of_activations_goes_on_working(steering):
    x = torch.zeros(2, 3)
    assert torch.equal(steer(steering, x, Batch()), torch.ones(2, 3))


def test_a_second_argument_of_another_name_is_left_alone():
    assert torch.equal(steer(lambda x, scale=3: scale * x, torch.ones(2, 3), Batch()), 3 * torch.ones(2, 3))


def test_a_plain_function_may_edit_in_place_what_it_is_given():
    x = torch.ones(2, 3)
    assert torch.equal(steer(lambda x: x.mul_(5), x, Batch()), 5 * torch.ones(2, 3))
    assert torch.equal(x, torch.ones(2, 3))


def test_one_that_shares_the_batch_may_not():
    with pytest.raises(PluginError, match="edited its activations in place"):
        call(lambda x, batch: x.mul_(5), torch.ones(2, 3), Batch())
