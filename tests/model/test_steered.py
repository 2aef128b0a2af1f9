"""SteeredCLIP: what the harness and Python callers touch."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.data import Subset

import vs2_plugin
from vs2_plugin.demo.digits import CLASSES, read_digits
from vs2_plugin.errors import DataError, HarnessError, ModelStringError, PluginError, SettingError
from vs2_plugin.files import json_digest
from vs2_plugin.method import Method, Option
from vs2_plugin.plugins import registry
from vs2_plugin.steering.context import Task

from .conftest import TINY

NAME = "local-dir-tiny-clip_wds-digits"


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.randn(6, 3, 32, 32)


@pytest.fixture
def add_method(monkeypatch):
    """Register a method for one test."""

    def add(method: Method) -> None:
        known = registry()
        monkeypatch.setitem(known.methods, method.name, method)
        monkeypatch.setitem(known.owners, method.name, "a test")

    return add


def test_load_gives_model_transform_and_tokenizer(in_demo, images):
    model, transform, tokenizer = vs2_plugin.load(f"vs2:{TINY}", dataset="wds/digits")
    plain = model.model
    assert isinstance(model, torch.nn.Module) and not model.training
    with torch.no_grad():
        assert torch.equal(model.encode_text(tokenizer(["a"])), plain.encode_text(tokenizer(["a"])))
        steered = model.encode_image(images)
        assert torch.equal(steered, model.model.encode_image(images))  # the tower itself is steered
    assert model.logit_scale is plain.logit_scale and model.visual is plain.visual
    with pytest.raises(AttributeError):
        model.no_such_attribute  # noqa: B018


@pytest.mark.parametrize("amp", [False, True])
def test_dtype_is_the_towers(in_demo, images, amp):
    model, *_ = vs2_plugin.load(f"vs2:{TINY}", dataset="wds/digits")
    plain, *_ = vs2_plugin.load(f"vs2:{TINY}@alpha=0", dataset="wds/digits")
    with torch.no_grad(), torch.autocast("cpu", enabled=amp):
        steered, unsteered = model.encode_image(images), plain.encode_image(images)
    assert steered.dtype == unsteered.dtype == (torch.bfloat16 if amp else torch.float32)
    assert not torch.equal(steered, unsteered)


def test_an_image_does_not_depend_on_its_batch(in_demo, images):
    model, *_ = vs2_plugin.load(f"vs2:{TINY}", dataset="wds/digits")
    others = torch.cat([images[:1], torch.randn(5, 3, 32, 32) * 3])
    with torch.no_grad():
        assert torch.equal(model.encode_image(images)[0], model.encode_image(others)[0])
        torch.testing.assert_close(model.encode_image(images)[:1], model.encode_image(images[:1]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", ["vs2pp:{}", "vs2:{}@blocks=2+3", "knn:{}", "vs2pp:{}@blocks=1"])
def test_threads_may_share_a_model(in_demo, options):
    model, transform, _ = vs2_plugin.load(options.format(TINY), dataset="wds/digits", classes=CLASSES, amp=False)
    pictures = torch.stack([transform(picture) for picture in read_digits("test")[0][:48]])
    batches = pictures.split(8)

    def embed(batch):
        with torch.no_grad():
            return model.encode_image(batch), model.classify(batch).logits

    alone = [embed(batch) for batch in batches]
    with ThreadPoolExecutor(4) as threads:
        for expected, found in zip(alone * 4, threads.map(embed, batches * 4), strict=True):
            assert all(map(torch.equal, expected, found))


@pytest.mark.parametrize("options", ["vs2pp:{}", "vs2pp:{}@blocks=1", "knn:{}"])
def test_the_tower_in_another_thread_is_not_steered_by_this_ones_images(in_demo, options):
    model, *_ = vs2_plugin.load(options.format(TINY), dataset="wds/digits", classes=CLASSES, amp=False)
    with ThreadPoolExecutor(1) as thread, model.at_hand(torch.zeros(2, 3, 32, 32)):
        with pytest.raises(HarnessError, match="methods with a gallery steer within encode_image only"):
            thread.submit(model.model.encode_image, torch.ones(2, 3, 32, 32)).result(60)


def test_images_may_be_given_by_who_waits_for_a_turn(in_demo):
    model, transform, _ = vs2_plugin.load(f"vs2:{TINY}", dataset="wds/digits", classes=CLASSES, amp=False)
    pictures = read_digits("test")[0][:3]
    with ThreadPoolExecutor(1) as thread:

        def images():
            for picture in pictures:
                thread.submit(model.encode_image, transform(picture)[None]).result(60)
                yield picture

        assert torch.equal(model.classify(images()).logits, model.classify(list(pictures)).logits)


def test_a_copy_and_what_was_pickled_know_nothing_of_whose_turn_it_is(in_demo, images):
    model, *_ = vs2_plugin.load(f"vs2:{TINY}", dataset="wds/digits")
    embed = torch.no_grad()(lambda model: model.encode_image(images))
    with model._current.turn:
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert all(place.current is other._current is not model._current for place in other.places)
            with ThreadPoolExecutor(1) as thread:  # which does not wait for the model's
                assert torch.equal(thread.submit(embed, other).result(60), embed(model))


def test_what_is_no_classifier_is_refused(in_demo):
    model, *_ = vs2_plugin.load(f"vs2:{TINY}", dataset="wds/digits", classes=CLASSES, amp=False)
    weights = model.classifier.weights
    wrong = {"of type ndarray": weights.numpy(), "of type torch.int64": weights.long(), "NaN": weights / 0 * 0}
    wrong |= {r"of shape \[10, 64\]": weights.T, r"of shape \[64\]": weights[:, 0], r"of shape \[\]": weights.sum()}
    for said, classifier in wrong.items():
        with pytest.raises(SettingError, match=f"the classifier (is|holds) {said}.*expected"):
            model.set_classifier(classifier)
    assert torch.equal(model.classifier.weights, weights)  # the one before stays


def test_without_a_data_set_it_says_so(in_demo, images):
    model, *_ = vs2_plugin.load(f"vs2:{TINY}")
    with pytest.raises(ModelStringError, match="does not know its data set"):
        model.encode_image(images)
    named, *_ = vs2_plugin.load(f"vs2:{TINY}@{NAME}")
    named.encode_image(images)


def test_a_copy_is_steered_like_the_original(in_demo, images):
    model, *_ = vs2_plugin.load(f"vs2:{TINY}", dataset="wds/digits")
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model).encode_image(images), model.encode_image(images))


@pytest.mark.parametrize("options", ["vs2:{}@gate=0.5", "vs2pp:{}", "dn:{}", "vs2s:{}"])
def test_a_model_that_comes_from_another_device_is_bound_anew(in_demo, options, monkeypatch):
    model, *_ = vs2_plugin.load(options.format(TINY), dataset="wds/digits", classes=CLASSES, amp=False)
    pictures = read_digits("test")[0][:8]
    before, expected, prompts = model.places, model.classify(pictures), model.classifier.prompts
    assert model.cpu().places is before
    devices = iter([torch.device("cuda:1")])
    monkeypatch.setattr(type(model), "_device", property(lambda model: next(devices, torch.device("cpu"))))
    found = model.cpu().classify(pictures)
    assert model.places is not before and model.classifier.prompts == prompts
    assert before.retriever is None or model.places.retriever is not before.retriever
    assert torch.equal(found.logits, expected.logits)
    monkeypatch.undo()
    before = model.places
    assert next(model.to("meta").parameters()).is_meta and model.places is before  # nothing can be computed there


def test_later_data_sets_do_not_rebind(in_demo):
    """A linear probe builds its training and validation sets after the test set."""
    from clip_benchmark.datasets.builder import build_dataset
    from clip_benchmark.models import load_clip

    model, transform, _ = load_clip("open_clip", f"vs2:{TINY}", "", None, "cpu")
    build_dataset("wds/digits", root="digits", transform=transform, split="test")
    digest = model.vs2_facts()["vs2_checkpoint_digest"]
    build_dataset("wds/other", root="digits", transform=transform, split="train")
    assert model.vs2_facts()["vs2_checkpoint_digest"] == digest and model.checkpoint.name == NAME


def test_results_tell_whose_labels_neighbours_have_and_the_weight_of_pass(in_demo):
    facts = vs2_plugin.load(f"vs2pp:{TINY}@labels=pseudo@alpha=1", dataset="wds/digits")[0].vs2_facts()
    assert (facts["vs2_neighbour_labels"], facts["vs2_labels"]) == ("pseudo", "none")
    assert vs2_plugin.load(f"pass:{TINY}", dataset="wds/digits")[0].vs2_facts()["vs2_pass_weight"] > 0
    assert "vs2_pass_weight" not in vs2_plugin.load(f"vs2:{TINY}", dataset="wds/digits")[0].vs2_facts()


@torch.no_grad()
def test_of_several_places_images_tell_the_last_fvu_and_whether_any_of_them_steered(in_demo, images):
    model, *_ = vs2_plugin.load(f"vs2:{TINY}@blocks=2+3@gate=0.5", dataset="wds/digits")
    first, last = model.places.gates
    first.tau, last.tau = 9.0, 0.0
    model.record_images(True)
    model.encode_image(images)
    told = model.per_image()
    assert torch.equal(told["fvu"], last.per_image()["fvu"]) and not torch.equal(told["fvu"], first.per_image()["fvu"])
    assert told["steered"].all() and not last.per_image()["steered"].any()
    assert model.vs2_facts()["vs2_coverage"] == 0  # which is that of the last place
    assert model.vs2_facts()["vs2_mean_fvu"] == pytest.approx(told["fvu"].mean().item())


def test_activations_that_a_gpu_steered_to_nan_are_told_before_anything_else_is_blamed(in_demo, images):
    from types import ModuleType

    from vs2_plugin.harness.patches import patch

    model, *_ = vs2_plugin.load(f"vs2:{TINY}", dataset="wds/digits", classes=CLASSES)

    def encode(model, model_id=None):  # as a GPU notes it, which is not waited for
        model.places[0].sums.add(steered=torch.tensor([float("nan")]), given=torch.ones(1))
        return {}

    module = ModuleType("clip_benchmark.metrics.linear_probe")
    module.evaluate = encode
    patch(module)
    with pytest.raises(PluginError, match="steered to NaN or infinity"):
        module.evaluate(model, "name")
    encode_image = model.encode_image
    model.encode_image = lambda *given: (encode(model), encode_image(*given))[1]
    with pytest.raises(PluginError, match="steered to NaN or infinity"):
        model.classify(images)


def test_a_linear_probe_caches_features_per_checkpoint(in_demo):
    """Its cache is keyed by the model's name; the digest joins it, so that a retrained SAE finds no stale features."""
    from types import ModuleType

    from vs2_plugin.harness.patches import patch

    seen = []
    module = ModuleType("clip_benchmark.metrics.linear_probe")
    module.evaluate = lambda model, model_id, device="cuda": seen.append(model_id) or {"acc1": 1.0}
    patch(module)
    model, *_ = vs2_plugin.load(f"vs2:{TINY}@{NAME}")
    metrics = module.evaluate(model, "name")
    assert seen == [f"name-{json_digest(model.vs2_facts())[:16]}"] and metrics["vs2_method"] == "vs2"
    assert module.evaluate(torch.nn.Identity(), "name") == {"acc1": 1.0} and seen[1] == "name"


def test_a_linear_probe_caches_features_per_content_of_folders_and_tells_no_share_of_training_images(in_demo, images):
    from types import ModuleType, SimpleNamespace

    from vs2_plugin.harness.patches import patch

    def stock(model, model_id, train_dataloader, dataloader, val_dataloader=None):
        seen.append(model_id)
        return {"encoded": len(model.encode_image(images))}

    seen, module = [], ModuleType("clip_benchmark.metrics.linear_probe")
    module.evaluate = stock
    patch(module)
    model, *_ = vs2_plugin.load(f"vs2:{TINY}@{NAME}")
    train, test, other = (SimpleNamespace(dataset=SimpleNamespace(fingerprint=lambda one=one: one)) for one in "abc")
    found = [module.evaluate(model, "x", one, two) for one, two in ((train, test), (other, test), (train, other))]
    for parts in ([0, 2], [0, 1]):  # of the training images, and others for the choice of the weight decay
        for whole in (train, other):
            part = SimpleNamespace(dataset=Subset(whole.dataset, parts))
            found += [module.evaluate(model, "x", part, test), module.evaluate(model, "x", train, test, part)]
    model.bind(Task("wds/digits", "elsewhere", "test"))
    found.append(module.evaluate(model, "x", train, test))
    assert len(set(seen)) == len(found) == 12
    assert all("vs2_coverage" not in metrics and "vs2_mean_fvu" not in metrics for metrics in found)


def test_an_unsupported_clip_benchmark_is_named():
    from types import ModuleType

    from vs2_plugin.errors import HarnessError
    from vs2_plugin.harness.patches import patch

    for name in ("models", "datasets.builder", "cli", "metrics.captioning"):
        with pytest.raises(HarnessError, match="1.6"):
            patch(ModuleType(f"clip_benchmark.{name}"))


def test_methods_without_checkpoint_and_with_facts(in_demo, images, add_method):
    class Shift(torch.nn.Module):
        facts = {"shift_norm": 2.0}

        def forward(self, x):
            return x + 2.0

    add_method(Method("shift", lambda context: Shift(), needs_checkpoint=False, labels="oracle"))
    model, *_ = vs2_plugin.load(f"shift:{TINY}", dataset="wds/nothing")
    facts = model.vs2_facts()
    assert facts["vs2_labels"] == "oracle" and facts["vs2_shift_norm"] == 2.0 and "vs2_checkpoint" not in facts
    model.encode_image(images)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda context: 1 / 0, "could not be built: ZeroDivisionError"),
        (lambda context: 7, "built 7; expected a function"),
        (lambda context, extra: None, "could not be built: TypeError"),
    ],
)
def test_broken_builders_are_named(in_demo, add_method, build, message):
    add_method(Method("bad", build, needs_checkpoint=False))
    with pytest.raises(PluginError, match="'bad'") as caught:
        vs2_plugin.load(f"bad:{TINY}", dataset="x")
    assert message in str(caught.value)


def test_the_context_is_complete(in_demo, add_method):
    seen = []
    add_method(Method("look", lambda context, n: seen.append((context, n)) or (lambda x: x), [Option("n", int, 3)]))
    vs2_plugin.load(f"look:{TINY}@n=5", dataset="wds/digits")
    context, n = seen[0]
    assert n == 5 and context.width == 128 and context.mean.shape == (128,) and context.sae.config.d_in == 128
    assert context.site == "visual.transformer.resblocks.3" and context.task.dataset == "wds/digits"
    assert set(context.fvu_quantiles) >= {"0.9", "0.95", "0.99", "0.995"}


@pytest.mark.parametrize("image", [
    None, [torch.zeros(3, 32, 32)], torch.zeros(3, 32, 32).numpy(), torch.zeros(3, 32, 32), torch.zeros(1, 1, 32, 32),
    torch.zeros(1, 3, 32, 32, dtype=torch.int32),
])  # fmt: skip
def test_what_is_no_batch_of_images_is_not_encoded(image, in_demo):
    model = vs2_plugin.load(f"vs2:{TINY}", dataset="wds/digits")[0]
    with pytest.raises(DataError, match=r"expected a tensor of floats \[batch, 3, height, width\]"):
        model.encode_image(image)
