"""A batch: what is asked of the images at hand is computed once."""

import pytest
import torch

from vs2_plugin.errors import PluginError
from vs2_plugin.sae.topk import TopKSAE
from vs2_plugin.steering.batch import Batch, steer, unchanged
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


WRONG = {
    "one row": (lambda x: x[:1], r"activations of shape \(1, 32\); expected \(4, 32\)"),
    "five columns": (lambda x: x[..., :5], r"activations of shape \(4, 5\); expected \(4, 32\)"),
    "a number": (lambda x: x.sum(), r"activations of shape \(\); expected \(4, 32\)"),
    "nothing": (lambda x: None, r"returned NoneType; expected activations \(4, 32\)"),
    "numpy's": (lambda x: x.numpy(), "returned ndarray"),
    "another device": (lambda x: x.to("meta"), "activations of device meta; expected cpu"),
    "sparse": (lambda x: x.to_sparse(), "activations of layout torch.sparse_coo; expected torch.strided"),
}
DTYPES = [torch.long, torch.int8, torch.bool, torch.half, torch.bfloat16, torch.double, torch.complex64]


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("gated", [False, True])
def test_what_is_no_activation_is_refused(wrong, gated, make_sae):
    steering, message = WRONG[wrong]
    gate = Gate(steering, make_sae(), torch.zeros(32), 0.5)
    with pytest.raises(PluginError, match=message):
        gate(torch.ones(4, 32)) if gated else steer(steering, torch.ones(4, 32), Batch())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_of_another_dtype_are_refused(dtype):
    with pytest.raises(PluginError, match=f"activations of dtype {dtype}; expected torch.float32"):
        steer(lambda x: x.to(dtype), torch.ones(4, 32), Batch())


@pytest.mark.parametrize("inference", [False, True])
def test_edits_in_place_of_what_others_read_are_refused(inference, make_sae):
    sae = make_sae()
    with torch.inference_mode(inference):
        batch = Batch(torch.rand(2, 3, 4, 4), torch.tensor([0, 1]), embed=lambda: torch.ones(2, 8))
        x = torch.randn(2, 32)
        code = batch.code(sae, x)
        batch.embedding(), code.direction
    held = {name: tensor for name, tensor in batch.shared().items() if tensor is not None}
    parts = {f"batch.code() 0, its {part}" for part in ("values", "indices", "direction")}
    assert held.keys() == {"batch.images", "batch.targets", "batch.embedding()", *parts}
    for tensor in () if inference else held.values():  # of the inference mode, torch itself refuses such edits
        with pytest.raises(PluginError, match="edited .* in place; expected new tensors"), unchanged(batch.shared):
            tensor += 1
    with pytest.raises(PluginError, match="edited batch.images"), unchanged(batch.shared):
        batch.images = torch.zeros(1)
    with unchanged(batch.shared):  # new things are no edits
        batch.once("mine", lambda: torch.zeros(2)).add_(1)
        batch.code(sae, x.clone())
