"""What a steered model's places are good for: copies, pickles, memory, exchange of weights, torch.compile."""

import copy
import gc
import pickle

import pytest
import torch

import vs2_plugin
from vs2_plugin.errors import HarnessError
from vs2_plugin.method import Method
from vs2_plugin.plugins import registry

from .conftest import TINY

METHODS = ["vs2:{}", "vs2:{}@gate=0.9@blocks=2+3", "rec:{}", "vs2s:{}@p=2@alpha=1", "vs2pp:{}", "knn:{}", "rag:{}"]


@pytest.fixture
def images():
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def classifier():
    return torch.nn.functional.normalize(torch.randn(64, 10, generator=torch.Generator().manual_seed(2)), dim=0)


def load(text, classifier):
    model, *_ = vs2_plugin.load(text.format(TINY), dataset="wds/digits")
    model.set_classifier(classifier)
    return model


@pytest.mark.parametrize("text", METHODS)
def test_a_steered_model_pickles_and_copies_also_after_use_with_gradients(text, in_demo, images, classifier):
    model = load(text, classifier)
    expected = model.encode_image(images)  # outside of no_grad
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(other.encode_image(images), expected)
        assert other.vs2_facts() != {} and other.model is not model.model


def test_a_steering_that_cannot_be_pickled_is_named(in_demo, images, monkeypatch):
    def build(context):
        return lambda x: x + 1

    monkeypatch.setitem(registry().methods, "local", Method("local", build, needs_checkpoint=False))
    model, *_ = vs2_plugin.load(f"local:{TINY}", dataset="wds/digits")
    with pytest.raises((AttributeError, pickle.PicklingError), match="build"):
        pickle.dumps(model)


def graphs():
    """Tensors alive that keep an autograd graph."""
    gc.collect()
    return sum(isinstance(one, torch.Tensor) and one.grad_fn is not None for one in gc.get_objects())


@pytest.mark.parametrize("text", ["vs2:{}@gate=0.9", "vs2pp:{}@brake=0.5@n=10"])
def test_outside_of_no_grad_no_graph_outlives_its_batch(text, in_demo, images, classifier):
    model = load(text, classifier)
    assert model.encode_image(images).grad_fn is not None
    before = graphs()
    for _ in range(20):
        model.encode_image(images)
    assert graphs() == before


def test_gradients_flow_through_the_steering(in_demo, images, classifier):
    model = load("vs2:{}", classifier)
    images.requires_grad_()
    model.encode_image(images).sum().backward()
    steered, images.grad = images.grad, None
    with model.unsteered():
        model.model.encode_image(images).sum().backward()
    assert steered.abs().sum() > 0 and not torch.allclose(steered, images.grad)


def test_weights_are_exchanged_with_a_plain_model(in_demo, images, classifier):
    plain, _, _ = vs2_plugin.load(f"vs2:{TINY}@alpha=0", dataset="wds/digits")
    plain = copy.deepcopy(plain).model
    for name in [name for name, _ in plain.named_modules() if name.endswith("vs2_steering_0")]:
        plain.get_submodule(name).remove()
    model = load("vs2:{}@blocks=all", classifier)
    assert model.model.state_dict().keys() == plain.state_dict().keys()
    changed = {name: tensor + 0.01 for name, tensor in plain.state_dict().items()}
    before = model.encode_image(images)
    assert not any(model.model.load_state_dict(changed))
    assert not torch.equal(model.encode_image(images), before)
    assert not any(plain.load_state_dict(model.model.state_dict()))
    with model.unsteered():
        assert torch.equal(model.model.encode_image(images), plain.encode_image(images))
    with pytest.raises(RuntimeError, match="Missing key"):
        model.model.load_state_dict({})


def test_compiled_code_of_a_plain_tower_is_never_used_in_silence(in_demo, images, classifier):
    torch._dynamo.reset()
    plain, _, _ = vs2_plugin.load(f"vs2:{TINY}@alpha=0", dataset="wds/digits")
    with torch.no_grad():
        with plain.unsteered():
            plain.model.visual.compile(backend="eager")
            unsteered = plain.model.encode_image(images)
        model = load("vs2:{}", classifier)
        expected = model.encode_image(images)
        assert not torch.allclose(expected, unsteered, atol=1e-3)
        model.model.visual.compile(backend="eager")
        try:
            torch.testing.assert_close(model.encode_image(images), expected)
        except HarnessError as error:
            assert "torch._dynamo.reset()" in str(error)
            torch._dynamo.reset()
            torch.testing.assert_close(model.encode_image(images), expected)
    torch._dynamo.reset()
