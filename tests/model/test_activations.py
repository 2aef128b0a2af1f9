"""Activations that are steered by themselves, beside those in the tower."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import vs2_plugin
from vs2_plugin.clip.edits import reading
from vs2_plugin.demo.digits import CLASSES, read_digits
from vs2_plugin.errors import DataError, HarnessError

from .conftest import TINY

NAME = "local-dir-tiny-clip_wds-digits"


@pytest.fixture
def images():
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def load(options="", method="vs2", **settings):
    return vs2_plugin.load(f"{method}:{TINY}@{NAME}{options}", **settings)[0]


def activations(model, images, site):
    """Those of the plain model."""
    with torch.no_grad(), model.unsteered(), reading(model.model, [site]) as found:
        model.model.encode_image(images)
    return found[site]


@pytest.mark.parametrize("options, method", [("", "vs2"), ("@gate=0.5", "vs2"), ("@n=5", "vs2pp"), ("", "vs2s")])
def test_they_are_steered_as_in_the_tower(in_demo, images, options, method):
    model = load(options, method, classes=CLASSES, amp=False)
    [place] = model.places
    x = activations(model, images, place.site)
    with torch.no_grad(), reading(model.model, [place.site]) as inside:
        model.encode_image(images)
        assert torch.allclose(model.steer(x), inside[place.site], atol=1e-5)


def test_the_callers_autocast_changes_nothing(in_demo, images):
    model = load(classes=CLASSES, amp=False)
    x = torch.randn(20, 128, generator=torch.Generator().manual_seed(0))
    expected, explained = model.steer(x), repr(model.explain(images[0]))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.steer(x), expected) and repr(model.explain(images[0])) == explained


def test_what_comes_back_is_of_the_same_kind(in_demo):
    model, x = load(), torch.randn(3, 128)
    steered = model.steer(x)
    assert not torch.equal(steered, x) and torch.allclose(steered.norm(dim=1), x.norm(dim=1))
    assert torch.equal(model.steer(x.half()), model.steer(x.half().float()).half())
    for dtype in (np.float64, np.float16):
        array = x.numpy().astype(dtype)
        found = model.steer(array)
        assert isinstance(found, np.ndarray) and found.dtype == dtype and np.array_equal(array, x.numpy().astype(dtype))
        assert np.allclose(found, steered.numpy(), atol=1e-2)


def test_a_place_is_named_where_there_are_several(in_demo, images):
    model = load("@blocks=1+2")
    x = activations(model, images, model.places[0].site)
    with torch.no_grad(), reading(model.model, [model.places[0].site]) as inside:
        model.encode_image(images)
    assert torch.allclose(model.steer(x, block=1), inside[model.places[0].site], atol=1e-5)
    with pytest.raises(DataError, match="block= is missing: the model steers at block 1 and block 2; expected the num"):
        model.steer(x)
    with pytest.raises(DataError, match="block=3: the model steers at block 1 and block 2"):
        model.steer(x, block=3)


@pytest.mark.parametrize("x, problem", [
    (torch.zeros(2, 64), r"of shape \[2, 64\] and type float32; expected floats \[batch, 128\], as they are at"),
    (torch.zeros(128), r"of shape \[128\].*; one alone is x\[None\]"),
    (np.zeros((2, 128), dtype=int), "type int64"),
    (None, "activations of type NoneType; expected a tensor or an array of floats"),
    (torch.full((2, 128), float("nan")), "row 0 of the activations holds NaN or infinity"),
])  # fmt: skip
def test_what_is_no_activation_is_refused(in_demo, x, problem):
    with pytest.raises(DataError, match=problem):
        load().steer(x)


def test_methods_that_ask_for_more_than_activations_say_so(in_demo):
    with pytest.raises(HarnessError, match="classes=.'cat', 'dog'."):
        load(method="vs2s").steer(F.normalize(torch.ones(1, 128)))
    with pytest.raises(HarnessError, match="methods with a gallery steer within encode_image only"):
        load("@n=5@blocks=1", method="vs2pp", classes=CLASSES, amp=False).steer(torch.ones(1, 128))


def test_behind_another_place_an_activation_does_not_tell_the_plain_embedding(in_demo):
    model = load("@blocks=2+3@n=5", "vs2pp", classes=CLASSES, amp=False)
    with pytest.raises(HarnessError):
        model.steer(torch.randn(3, 128), block=3)
    assert load("@blocks=2+3").steer(torch.randn(3, 128), block=3).shape == (3, 128)


@pytest.mark.parametrize("kind", [">f4", "longdouble"])
def test_numbers_that_torch_does_not_have_are_refused(kind, in_demo):
    x = np.random.default_rng(0).normal(size=(40, 128)).astype(kind)
    with pytest.raises(DataError, match="expected native float16, float32 or float64"):
        load().steer(x)
    with pytest.raises(DataError, match="expected floating-point numbers"):
        vs2_plugin.train(x)
    with pytest.raises(DataError, match="row 1 of the activations holds NaN or infinity, as float32"):
        load().steer(torch.tensor([[1.0], [1e300]], dtype=torch.float64).expand(2, 128))


def test_an_image_is_steered_where_a_gate_at_any_place_lets_it_through(in_demo, images):
    model = load("@blocks=2+3@gate=0.5@alpha=3", classes=CLASSES, amp=False)
    digits = read_digits("test")[0][:200]
    transform = model.transform
    found = model.classify(torch.stack([transform(image) for image in digits]))
    first = load("@blocks=2@gate=0.5@alpha=3", classes=CLASSES, amp=False)
    alone = first.classify(torch.stack([transform(image) for image in digits]))
    assert (found.steered >= alone.steered).all() and alone.steered.any()
    assert ((found.logits - found.plain_logits).abs().amax(1)[~found.steered] < 1e-3).all()


def test_class_embeddings_are_used_in_the_precision_of_the_model(in_demo, images, caplog):
    for amp in (False, True):
        named = load(classes=CLASSES, amp=amp)
        model = load(amp=amp)
        model.set_classifier(named.classifier.weights.double())
        assert model.classifier.amp is amp
        assert torch.equal(model.classify(images).logits, named.classify(images).logits)
    assert "unit norm" not in caplog.text
    model.set_classifier(7 * named.classifier.weights)
    assert "class embeddings are not of unit norm" in caplog.text
