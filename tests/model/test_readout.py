"""Methods on logits, in Python, under the stock command and in a sweep: what each protocol shows them, and what is
made of what they give."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import vs2_plugin
from vs2_plugin.cli.main import main
from vs2_plugin.demo.digits import CLASSES
from vs2_plugin.errors import HarnessError, ModelStringError, PluginError
from vs2_plugin.method import Method, Option
from vs2_plugin.model.readout import stream_order
from vs2_plugin.plugins import registry

from .conftest import DIGITS, TINY, metrics

STOCK = ("eval", "--pretrained", "", *DIGITS)


@pytest.fixture
def add(monkeypatch):
    def add(name, build, options=(), **declared):
        monkeypatch.setitem(registry().methods, name, Method(name, build, options, site="logits", **declared))

    return add


def zero_shot(context):
    return lambda x: 100 * x @ context.require_classifier()


def load(method, options=""):
    model, *_ = vs2_plugin.load(f"{method}:{TINY}{options}", dataset="wds/digits", classes=CLASSES, amp=False)
    return model


@pytest.fixture
def images():
    return torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("protocol", ["image", "unlabeled", "stream", "transductive"])
def test_what_reads_as_clip_does_gives_its_logits_under_each_protocol(protocol, add, in_demo, images):
    add("same", zero_shot, protocol=protocol)
    alone, steered, both = (load(text).classify(images, 4) for text in ("same", "vs2", "same:vs2"))
    torch.testing.assert_close(alone.logits, alone.plain_logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(both.logits, steered.logits, rtol=0, atol=1e-4)
    assert torch.equal(both.plain_logits, steered.plain_logits) and torch.equal(both.fvu, steered.fvu)


def test_the_metrics_of_the_stock_command_are_computed_from_what_it_gives(add, in_demo, clip_benchmark):
    def build(context, shift):
        return lambda x: (100 * x @ context.classifier).roll(int(shift), dims=1)

    add("rolled", build, [Option("shift", int, 1)])
    assert clip_benchmark(*STOCK, "--model", f"rolled:{TINY}@shift=0", TINY, "--output", "{model}.json")[0] == 0
    assert clip_benchmark(*STOCK, "--model", f"rolled:{TINY}", "--output", "rolled.json")[0] == 0
    same, plain = (metrics(next(in_demo.glob(f"{name}*.json"))) for name in (f"rolled:{TINY}@shift=0", TINY))
    assert {name: same[name] for name in plain} == pytest.approx(plain)
    rolled = metrics(in_demo / "rolled.json")
    assert rolled["acc1"] < plain["acc1"] - 0.2
    assert rolled["vs2_method"] == "rolled" and rolled["vs2_protocol"] == "image" and rolled["vs2_shift"] == 1


def test_class_embeddings_come_at_unit_norm(add, in_demo, images):
    add("same", zero_shot)
    model = load("same")
    expected = model.classify(images).logits
    model.set_classifier(3 * model.classifier.weights)
    torch.testing.assert_close(model.classify(images).logits, expected)


def test_a_method_sees_the_images_and_tells_facts_of_itself(add, in_demo, images):
    class Read:
        def __init__(self, classifier):
            self.classifier, self.facts = classifier, {"brightest": -100.0}

        def __call__(self, x, batch):
            self.facts = {"brightest": max(self.facts["brightest"], float(batch.images.max()))}
            return (100 * x @ self.classifier).double()

    add("sees", lambda context: Read(context.classifier))
    model = load("sees")
    assert model.classify(images, 4).logits.dtype == torch.float32
    assert model.vs2_facts()["vs2_brightest"] == float(images.max())


def test_unlabeled_images_are_those_of_the_gallery_as_they_are_steered(add, in_demo, images, monkeypatch):
    monkeypatch.setattr("vs2_plugin.gallery.search._BLOCK", 70)  # the gallery is more than one block
    seen = []

    def build(context):
        seen.append(context.unlabeled)
        return zero_shot(context)

    add("learns", build, protocol="unlabeled")
    plain, steered = load("learns"), load("learns:vs2")
    stored = np.array(plain.checkpoint.open_gallery().embeddings["clip"])
    torch.testing.assert_close(seen[0], F.normalize(torch.from_numpy(stored).float(), dim=1))
    assert seen[1].shape == seen[0].shape and (seen[1] - seen[0]).norm(dim=1).min() > 0.01
    torch.testing.assert_close(seen[1].norm(dim=1), torch.ones(len(seen[1])))
    calls = len(seen)
    plain.classify(images)
    steered.set_classifier(steered.classifier)
    assert len(seen) == calls  # it learns once for the same classes
    with pytest.raises(
        ModelStringError, match=r"learns from steered images of the gallery.*expected @unlabeled=test, or no @blocks"
    ):
        load("learns:vs2", "@blocks=2+3")


def test_for_other_classes_it_learns_again(in_demo, images):
    model, *_ = vs2_plugin.load(f"dn:{TINY}", dataset="wds/digits", classes=CLASSES, amp=False)
    first = model.classify(images).logits
    again, *_ = vs2_plugin.load(f"dn:{TINY}", dataset="wds/digits", classes=CLASSES[::-1], amp=False)
    model.set_classifier(again.classifier)
    torch.testing.assert_close(model.classify(images).logits, first.flip(1))


def test_figures_of_a_gate_are_not_of_the_gallerys_images(in_demo, clip_benchmark):
    names = [f"{method}:{TINY}@gate=0.5" for method in ("vs2", "dn:vs2")]
    assert clip_benchmark(*STOCK, "--model", *names, "--output", "gated-{model}.json")[0] == 0
    alone, beneath = (metrics(in_demo / f"gated-{name}.json") for name in names)
    for figure in ("vs2_coverage", "vs2_mean_fvu"):
        assert beneath[figure] == alone[figure]


def test_all_test_images_are_shown_at_once_where_asked_for(add, in_demo, images):
    seen = []

    def build(context):
        def read(x, batch):
            seen.append((context.unlabeled, x, batch.rows))
            return 100 * x @ context.classifier

        return read

    add("learns", build, protocol="unlabeled")
    model, *_ = vs2_plugin.load(f"learns:{TINY}@unlabeled=test", classes=CLASSES, amp=False)  # needs no checkpoint
    model.classify(images, 4)
    [(unlabeled, x, rows)] = seen
    assert torch.equal(unlabeled, x) and len(x) == 10 and rows.tolist() == list(range(10))
    assert model.vs2_facts()["vs2_protocol"] == "transductive"


def shifted(context):
    return lambda x: (100 * x @ context.classifier).roll(1, dims=1)


@pytest.mark.parametrize("method", ["inmap", "learns"])
def test_it_is_used_only_where_unlabeled_images_speak_for_it_if_so_asked(method, add, in_demo, images):
    add("learns", shifted, protocol="unlabeled")
    options = "@steps=100@sinkhorn=20" if method == "inmap" else ""
    always, auto = load(method, options), load(method, f"{options}@use=auto")
    expected, found = always.classify(images), auto.classify(images)
    used = method == "inmap"
    torch.testing.assert_close(found.logits, expected.logits if used else found.plain_logits, rtol=0, atol=1e-4)
    facts = auto.vs2_facts()
    assert facts["vs2_used"] is used and "nats" in facts["vs2_use_reason"]
    assert facts["vs2_use_reason"].endswith(": enough") is used
    assert "vs2_used" not in always.vs2_facts()
    seen = load(method, f"{options}@use=auto@unlabeled=test").classify(images)  # ten of noise speak for nothing
    assert torch.equal(seen.logits, seen.plain_logits)


def test_its_use_is_decided_by_some_of_the_unlabeled_images_which_it_is_told(add, in_demo, monkeypatch):
    monkeypatch.setattr("vs2_plugin.model.readout._JUDGED", 50)
    judged = []

    def build(context):
        def read(x, batch):
            judged.append(batch.rows)
            assert torch.equal(context.unlabeled[batch.rows], x)
            return 100 * x @ context.classifier

        return read

    add("learns", build, protocol="unlabeled")
    model = load("learns", "@use=auto")
    [rows] = judged
    last = len(model.checkpoint.open_gallery()) - 1
    assert len(rows) == 50 and (rows[0], rows[-1]) == (0, last)
    assert model.vs2_facts()["vs2_use_reason"].startswith("over 50 images, a class carries ")


def test_a_method_that_is_not_used_leaves_the_rounded_logits_of_clip_benchmark(add, in_demo, images):
    add("learns", shifted, protocol="unlabeled")
    model, *_ = vs2_plugin.load(f"learns:vs2:{TINY}@use=auto", dataset="wds/digits", classes=CLASSES, amp=True)
    steered, *_ = vs2_plugin.load(f"vs2:{TINY}", dataset="wds/digits", classes=CLASSES, amp=True)
    assert torch.equal(model.classify(images).logits, steered.classify(images).logits)


def test_a_stream_comes_image_by_image_in_the_order_of_its_seed(add, in_demo, images):
    seen = []

    def build(context):
        count = [0]

        def read(x):
            assert len(x) == 1
            seen[-1].append(x[0])
            count[0] += 1
            return torch.full((1, len(CLASSES)), float(count[0]))

        seen.append([])
        return read

    add("counts", build, protocol="stream")
    model = load("counts")
    first = model.classify(images, 4).logits[:, 0]
    again = model.classify(images, 3).logits[:, 0]
    turned = model.classify(images.flip(0), 4).logits[:, 0]
    assert sorted(first.tolist()) == list(range(1, 11)) != first.tolist()
    assert torch.equal(first, again) and torch.equal(first, turned.flip(0))  # a new stream each time, of one order
    other, *_ = vs2_plugin.load(f"counts:{TINY}@order=1", classes=CLASSES, amp=False)
    assert not torch.equal(other.classify(images).logits[:, 0], first)
    assert other.vs2_facts()["vs2_order"] == 1 and other.vs2_facts()["vs2_protocol"] == "stream"


def test_the_order_of_a_stream_is_that_of_its_images_and_seed():
    digests = [5, 3, 9, 1]
    order = [digests[row] for row in stream_order(digests, 7)]
    assert [digests[::-1][row] for row in stream_order(digests[::-1], 7)] == order
    assert sorted(order) == sorted(digests)


def test_views_are_the_image_and_crops_of_it(add, in_demo, images):
    seen = []

    def build(context):
        def read(x):
            seen.append(x)
            return 100 * x[:, 0] @ context.classifier

        return read

    add("looks", build, views=True)
    model, *_ = vs2_plugin.load(f"looks:{TINY}@views=5", classes=CLASSES, amp=False)
    found = model.classify(images, 4)
    torch.testing.assert_close(found.logits, found.plain_logits, rtol=0, atol=1e-4)
    x = torch.cat(seen)
    assert x.shape == (10, 5, 64) and (x[:, 1:] - x[:, :1]).norm(dim=2).median() > 0.01
    seen.clear()
    model.classify(images, 10)
    torch.testing.assert_close(torch.cat(seen), x)  # whatever the batches
    gated = load("looks:vs2")
    fvu = gated.classify(images, 4).fvu
    assert len(fvu) == 10
    assert gated.vs2_facts()["vs2_mean_fvu"] == pytest.approx(fvu.double().mean().item())  # of the images, not of crops


def test_copies_and_pickles_read_the_same(in_demo, images):
    model = load("dn:vs2")
    expected = model.classify(images).logits
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(other.classify(images).logits, expected)


@pytest.mark.parametrize("protocol", ["image", "unlabeled", "stream", "transductive"])
def test_the_callers_autocast_changes_nothing_that_is_learned(protocol, in_demo, images, add):
    def build(context):
        of = context.classifier.T if context.unlabeled is None else context.unlabeled
        counts = of @ context.classifier
        return lambda x: 100 * x @ context.classifier + counts.mean(0)

    add("counts", build, protocol=protocol)
    model = load("counts:vs2")
    model.classify(images)
    readout, again = model.readout, copy.deepcopy(model.readout)  # which learns anew
    again._embeddings, again._digests = readout._embeddings, readout._digests
    with torch.autocast("cpu", torch.bfloat16):
        if protocol in ("image", "unlabeled"):
            assert torch.equal(again._learned()(torch.eye(64)), readout._learned()(torch.eye(64)).float())
        else:
            assert torch.equal(again.logits(), model.readout.logits())
    if protocol not in ("image", "unlabeled"):
        assert torch.equal(again.logits(), readout.logits())


def test_classes_that_a_method_cannot_learn_leave_no_mixture(in_demo, images, add):
    def build(context):
        assert context.classifier.shape[1] == 10
        return lambda x: 100 * x @ context.classifier

    add("ten", build)
    model = load("ten:vs2")
    expected, known = model.classify(images).logits, model.classifier
    with pytest.raises(PluginError, match="could not be built: AssertionError"):
        model.set_classifier(known.weights[:, :7])
    model.set_classifier(known)
    assert torch.equal(model.classify(images).logits, expected)


def wrong_shape(context):
    return lambda x: x


def nothing(context):
    return lambda x: None


def not_finite(context):
    return lambda x: 100 * x @ context.classifier / 0


def edits(context):
    def read(x, batch):
        x.mul_(2)
        return x @ context.classifier

    return read


def edits_classes(context):
    def read(x):
        context.classifier.mul_(2)
        return x @ context.classifier

    return read


def edits_images(context):
    def read(x, batch):
        batch.images.mul_(2)
        return x @ context.classifier

    return read


def not_all_finite(context):
    return lambda x: (100 * x @ context.classifier).where(torch.arange(len(CLASSES)) > 0, torch.nan)


def fewer_images(context):
    return lambda x: 100 * x[1:] @ context.classifier


class Boasts:
    facts = {"not a name": 1}

    def __init__(self, context):
        pass

    def __call__(self, x):
        return x


def edits_weights(context):
    return lambda x: (context.model.logit_scale.mul_(1), x @ context.classifier)[1]


def raises(context):
    return lambda x: 1 / 0


def no_function(context):
    return 3


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (wrong_shape, r"returned \(4, 64\); expected logits \(4, 10\)"),
        (nothing, "returned NoneType; expected logits"),
        (not_finite, "NaN or infinity"),
        (not_all_finite, "NaN or infinity"),
        (fewer_images, r"returned \(3, 10\); expected logits \(4, 10\)"),
        (Boasts, "has a fact named 'not a name'"),
        (edits, "edited its embeddings in place"),
        (edits_images, "edited batch.images in place"),
        (edits_classes, "edited context.classifier in place"),
        (edits_weights, "edited context.model.logit_scale in place"),
        (raises, r"failed: ZeroDivisionError: division by zero \(in .*test_readout.py, line \d+\)$"),
        (no_function, "expected a function from embeddings to logits"),
        (lambda context: context.require_unlabeled(), "could not be built: this method learns from unlabeled"),
        (lambda context: context.require_sae(), "could not be built: this method steers along an SAE"),
    ],
)
def test_what_is_wrong_with_a_method_is_said_with_its_name(build, words, add, in_demo, images):
    add("wrong", build)
    with pytest.raises(PluginError, match=f"method 'wrong'.*{words}"):
        load("wrong").classify(images, 4)


def test_steering_alone_is_explained(in_demo, images):
    with pytest.raises(HarnessError, match="dn reads embeddings as classes.*for example vs2:"):
        load("dn:vs2").explain(images[:1])


def test_other_tasks_are_refused_before_anything_is_loaded(in_demo, captions, clip_benchmark):
    model = ("--model", f"dn:{TINY}@digits")
    code, errors = clip_benchmark("eval", *captions, "--task", "zeroshot_retrieval", *model, "--output", "x.json")
    assert code == 2 and "dn needs classes, but zeroshot_retrieval has none" in errors


def test_a_sweep_comes_to_the_results_of_the_command(in_demo, clip_benchmark, add):
    def build(context):
        memory = torch.zeros(len(CLASSES))

        def read(x):
            logits = 100 * x @ context.classifier - memory
            memory[logits.argmax()] += 0.1
            return logits

        return read

    add("avoids", build, protocol="stream")
    models = [f"dn:{TINY}@weight=0.5", f"dn:vs2:{TINY}@alpha=0.5@unlabeled=test", f"avoids:{TINY}"]
    assert main(["sweep", "--pretrained", "", *DIGITS, "--model", *models, "--output", "swept/{model}.json"]) == 0
    swept = {json.loads(path.read_text())["model"]: metrics(path) for path in (in_demo / "swept").rglob("*.json")}
    assert clip_benchmark(*STOCK, "--model", *models, "--output", "own-{model}.json")[0] == 0
    for model in models:
        assert swept[model] == metrics(in_demo / f"own-{model}.json")
