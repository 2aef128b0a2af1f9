"""What a steered model's places are good for: copies, pickles, memory, exchange of weights, torch.compile."""

import copy
import gc
import json
import pickle
import re
import shutil
import sys

import pytest
import torch

import vs2_plugin
from vs2_plugin.errors import HarnessError, PluginError
from vs2_plugin.method import Method
from vs2_plugin.plugins import registry
from vs2_plugin.steering.batch import Batch
from vs2_plugin.steering.context import Task

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


def test_a_method_without_a_checkpoint_steers_beneath_one_that_learns_from_a_gallery(in_demo, images, monkeypatch):
    monkeypatch.setitem(
        registry().methods, "local", Method("local", lambda context: lambda x: x + 1, needs_checkpoint=False)
    )
    embeddings = []
    for name in (f"local:{TINY}", f"dn:local:{TINY}"):
        model, *_ = vs2_plugin.load(name, dataset="wds/digits", classes=["one", "two"], amp=False)
        embeddings.append(model.encode_image(images))
    assert torch.equal(*embeddings) and model.classify(images).probabilities.shape == (6, 2)


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


# ---- what a plugin may not do


@pytest.fixture
def offer(monkeypatch):
    """A function that registers a method of a plugin, and gives the loaded model."""

    def add(build, **declared):
        monkeypatch.setitem(registry().methods, "odd", Method("odd", build, **declared))
        monkeypatch.setitem(registry().owners, "odd", "a plugin")
        return vs2_plugin.load(f"odd:{TINY}@local-dir-tiny-clip_wds-digits")[0]

    return add


def steers(act):
    """A builder of a steering that does something and leaves the activations alone."""

    def build(context):
        def steer(x, batch):
            act(context, x, batch)
            return x

        return steer

    return build


EDITS = {
    "its activations": lambda context, x, batch: x.zero_(),
    "batch.images": lambda context, x, batch: batch.images.zero_(),
    "batch.targets": lambda context, x, batch: setattr(batch, "targets", batch.targets + 1),
    "batch.code() 0, its values": lambda context, x, batch: batch.code(context.sae, x).values.mul_(2),
    "batch.embedding()": lambda context, x, batch: batch.embedding().zero_(),
    "context.sae.W_dec": lambda context, x, batch: context.sae.W_dec.zero_(),
    "context.model.visual.proj": lambda context, x, batch: context.model.visual.proj.add_(1),
    "context.model.ln_final.weight": lambda context, x, batch: context.model.ln_final.weight.zero_(),
    "context.sae.encoder.bias": lambda context, x, batch: setattr(
        context.sae.encoder, "bias", torch.nn.Parameter(torch.zeros(512))
    ),
    "the class embeddings": lambda context, x, batch: context.retriever.classifier.zero_(),
    "the gallery's classes": lambda context, x, batch: context.retriever.pseudo[0].zero_(),
    "neighbours.similarity": lambda context, x, batch: context.retriever.neighbours(batch).similarity.zero_(),
}


@pytest.mark.parametrize("what", EDITS)
@torch.no_grad()
def test_a_method_that_edits_what_others_read_is_refused_by_name(what, in_demo, images, classifier, offer):
    def act(context, x, batch):
        batch.embedding(), context.retriever.pseudo, context.retriever.neighbours(batch)
        if ready:
            EDITS[what](context, x, batch)

    ready = False
    model = offer(steers(act), gallery="neighbours", classes=True)
    model.set_classifier(classifier)
    targets = torch.zeros(6, dtype=torch.int64)
    batch = Batch(images, targets, embed=lambda: images.flatten(1)[:, :64])
    place, x = model.places[0], torch.randn(6, 128)
    place.steer(x, batch)  # what is asked for the first time is no edit
    ready = True
    with pytest.raises(PluginError) as error:
        place.steer(x, batch)
    assert str(error.value).startswith(f"method 'odd' of a plugin failed at block 3: the steering edited {what} in pl")


OWN = {
    "mean": lambda context: context.mean.zero_(),
    "quantiles": lambda context: context.fvu_quantiles.clear(),
    "classes": lambda context: context.task.classes.clear(),
    "shared": lambda context: context.shared.update(mine=[1]),
}


@pytest.mark.parametrize("what", OWN)
@torch.no_grad()
def test_what_a_method_is_given_of_its_own_it_may_change(what, in_demo, images, offer):
    def build(context):
        if context.task is not None:
            OWN[what](context)
        return lambda x: (OWN[what](context), x)[1]

    model, task = offer(build), Task("wds/digits", classes=["one", "two"])
    model.bind(task)
    model.encode_image(images)
    plain, *_ = vs2_plugin.load(f"vs2:{TINY}@local-dir-tiny-clip_wds-digits@alpha=0")
    plain.encode_image(images)
    assert model.vs2_facts()["vs2_mean_fvu"] == plain.vs2_facts()["vs2_mean_fvu"]
    assert task.classes == ["one", "two"] and len(model.checkpoint.sites[-1].fvu_quantiles) == 10


BUILDS = {
    "context.sae.b_dec": lambda context: context.sae.b_dec.zero_(),
    "context.model.visual.proj": lambda context: context.model.visual.proj.zero_(),
    "context.model.visual.ln_post.bias": lambda context: setattr(
        context.model.visual.ln_post, "bias", torch.nn.Parameter(torch.ones(128))
    ),
}


@pytest.mark.parametrize("what", BUILDS)
@torch.no_grad()
def test_a_builder_that_edits_weights_is_refused(what, in_demo, offer):
    with pytest.raises(PluginError, match=f"method 'odd' of a plugin could not be built: the steering edited {what}"):
        offer(lambda context: (BUILDS[what](context), lambda x: x)[1])


class Fails(torch.nn.Module):
    def forward(self, x):
        raise RuntimeError("boom")


def stops(x):
    sys.exit(3)


FAILURES = {
    "RuntimeError: boom": lambda context: Fails(),
    "SystemExit: 3": lambda context: stops,
    "StopIteration: ": lambda context: lambda x: next(iter(())),
}


@pytest.mark.parametrize("gate", ["", "@gate=0.9"])
@pytest.mark.parametrize("what", FAILURES)
@torch.no_grad()
def test_a_method_that_raises_is_named_with_its_site_and_line(what, gate, in_demo, images, offer):
    offer(FAILURES[what])
    model, *_ = vs2_plugin.load(f"odd:{TINY}@local-dir-tiny-clip_wds-digits{gate}")
    with pytest.raises(PluginError) as error:
        model.encode_image(images)
    place = rf" \(in {re.escape(__file__)}, line \d+\)"
    assert re.fullmatch(f"method 'odd' of a plugin failed at block 3: {what}{place}", str(error.value))


def test_a_builder_that_ends_the_process_is_named(in_demo, offer):
    with pytest.raises(PluginError, match="method 'odd' of a plugin could not be built: SystemExit: 3 .in .*, line"):
        offer(stops)


def test_arrays_of_the_gallery_cannot_be_written_to(in_demo, offer):
    found = []
    offer(lambda context: found.append(context.retriever.gallery) or (lambda x: x), gallery="images")
    [gallery] = found
    for array in (gallery.digests, *gallery.embeddings.values(), *gallery.activations.values()):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


@pytest.mark.parametrize("dtype", [torch.long, torch.half, torch.double, torch.complex64, torch.bool], ids=str)
@pytest.mark.parametrize("gate", ["", "@gate=0.9"])
@torch.no_grad()
def test_activations_of_another_dtype_are_refused_by_name(dtype, gate, in_demo, images, offer, monkeypatch):
    offer(lambda context: lambda x: x.to(dtype))
    model, *_ = vs2_plugin.load(f"odd:{TINY}@local-dir-tiny-clip_wds-digits{gate}")
    with pytest.raises(PluginError, match="method 'odd' of a plugin failed at block 3: the steering returned activati"):
        model.encode_image(images)


@torch.no_grad()
def test_large_activations_are_finite_though_their_sum_is_not(in_demo, offer):
    place = offer(lambda context: lambda x: x.sign() * 3e38).places[0]
    for x in (torch.ones(6, 128), torch.tensor([[1.0, -1.0]]).repeat(6, 64)):
        assert torch.equal(place.steer(x, Batch()), x * 3e38)
    with pytest.raises(PluginError, match="steered to NaN or infinity"):
        offer(lambda context: lambda x: x * 3e38 * 10).places[0].steer(x, Batch())


class Told(torch.nn.Module):
    """A steering that tells one thing before its first batch, and another thing after."""

    def __init__(self, before, after):
        super().__init__()
        self.told, self.after = before, after

    @property
    def facts(self):
        return self.told() if callable(self.told) else self.told

    def forward(self, x):
        self.told = self.after
        return x


def raises():
    raise KeyError("gone")


@pytest.mark.parametrize("facts", [{"a": float("nan")}, {"method": "mine"}, {1: 2}, {"a": torch.ones(2)}, 7, raises])
@torch.no_grad()
def test_odd_facts_are_refused_at_once_or_left_out_of_the_results(facts, in_demo, images, offer, caplog):
    with pytest.raises(PluginError, match="method 'odd' of a plugin has (a fact|facts|the fact) .*; expected "):
        offer(lambda context: Told(facts, {}))
    model = offer(lambda context: Told({"fine": 1}, facts))
    model.encode_image(images)
    found = model.vs2_facts()
    assert found["vs2_method"] == "odd" and found["vs2_coverage"] == 1 and "vs2_a" not in found
    json.dumps(found, allow_nan=False)
    assert "method 'odd' of a plugin has " in caplog.text and "; it is left out of the results" in caplog.text


# ---- an SAE of no use


def test_an_sae_of_no_use_is_told_when_a_model_is_bound_and_in_its_results(in_demo, tmp_path, caplog):
    for name, facts, told in [("bad", {"fvu": 1.25}, "its FVU is 1.25, while that of the mean activation alone is 1"),
                              ("old", {"training": {}}, None), ("fine", {}, None)]:  # fmt: skip
        folder = tmp_path / name
        shutil.copytree(in_demo / "store/checkpoints/local-dir-tiny-clip_wds-digits", folder)
        values = json.loads((folder / "vs2.json").read_text())
        values.pop("digest", None)
        values["sites"] = [{**site, **facts} for site in values["sites"]]
        (folder / "vs2.json").write_text(json.dumps(values))
        caplog.clear()
        model, *_ = vs2_plugin.load(f"vs2:{TINY}@{folder}")
        assert model.vs2_facts().get("vs2_sae_warning") == (told and f"block 3: {told}")
        assert caplog.text.count("is useless") == (told is not None)
        model.bind(Task("wds/digits"))  # as clip_benchmark and vs2 classify do next
        assert caplog.text.count("is useless") == (told is not None)
