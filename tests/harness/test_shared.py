"""Several models in one command: they share weights and texts, and nothing else."""

import gc
import weakref

import pytest
import torch

import vs2_plugin
from vs2_plugin.harness import shared
from vs2_plugin.harness.shared import Shared, twin
from vs2_plugin.method import Method
from vs2_plugin.plugins import registry

from .conftest import TINY, few_digits, metrics

NAME = "local-dir-tiny-clip_wds-digits"
VS2 = f"vs2:{TINY}@{NAME}"


@pytest.fixture
def counted(monkeypatch):
    """Counts the models that open_clip makes, and the batches of texts that they encode."""
    import open_clip
    from open_clip.model import CLIP

    counts = {"models": 0, "texts": 0}

    def counting(what, function):
        def call(*args, **kwargs):
            counts[what] += 1
            return function(*args, **kwargs)

        return call

    made = open_clip.create_model_and_transforms
    monkeypatch.setattr(open_clip, "create_model_and_transforms", counting("models", made))
    monkeypatch.setattr(CLIP, "encode_text", counting("texts", CLIP.encode_text))
    return counts


@pytest.fixture
def evaluate(in_demo, clip_benchmark):
    """Evaluates models on 20 digits in one command, and gives their metrics."""
    few_digits(in_demo, "few", 0, count=20)

    def run(*models, data=("--dataset", "wds/few", "--dataset_root", "few")):
        words = ("--num_workers", "0", "--quiet", "--no_amp", "--output", "shared-{dataset}-{model}.json")
        code, error = clip_benchmark("eval", "--model", *models, "--pretrained", "", *data, *words)
        assert code == 0, error
        return [metrics(in_demo / f"shared-{data[1].removeprefix('wds/')}-{model}.json") for model in models]

    return run


# ---- the command


def test_models_of_one_backbone_share_it_and_its_texts_bit_for_bit(evaluate, counted, monkeypatch):
    models = (TINY, VS2, f"vs2pp:{TINY}@{NAME}@n=10", f"{VS2}@alpha=0")
    together = evaluate(*models)
    # Ten classes: the first texts of each steered model are encoded, and found to be the same.
    assert counted == {"models": 1, "texts": 10 + 3}
    alone = [evaluate(model)[0] for model in models]
    assert together == alone
    assert counted == {"models": 1 + 4, "texts": 13 + 40}


def test_a_plain_model_is_loaded_and_encodes_its_texts_as_ever(evaluate, counted):
    together = evaluate(VS2, TINY)
    assert counted == {"models": 2, "texts": 20} and together[1] == evaluate(TINY)[0]


def test_data_sets_with_the_same_prompts_share_them(evaluate, counted, in_demo):
    few_digits(in_demo, "more", 1, count=20)
    evaluate(VS2, data=("--dataset", "wds/few", "wds/more", "--dataset_root", "{dataset}"))
    assert counted == {"models": 1, "texts": 10 + 1}


def test_captions_are_shared_too(evaluate, counted, captions):
    data = (*captions[2:6], "--task", "zeroshot_retrieval")
    together = evaluate(TINY, VS2, f"{VS2}@alpha=0", data=data)
    batches = counted["texts"] - 2
    assert together[1] == evaluate(VS2, data=data)[0]
    assert batches > 1 and counted["texts"] == batches + 2 + batches


def test_a_method_that_changes_the_text_tower_shares_no_text(evaluate, counted, monkeypatch):
    """Also no model that comes after it."""

    def build(context):
        context.model.token_embedding.register_forward_hook(lambda module, args, output: output * 0)
        return lambda x: x

    known = registry()
    monkeypatch.setitem(known.methods, "loud", Method("loud", build, needs_checkpoint=False))
    monkeypatch.setitem(known.owners, "loud", "a test")
    models = (TINY, f"loud:{TINY}", VS2)
    together = evaluate(*models)
    assert together[0]["acc1"] > together[1]["acc1"]
    assert counted == {"models": 1, "texts": 10 + 10 + 1}
    assert together == [evaluate(model)[0] for model in models]


def test_nothing_is_shared_outside_of_one_command(in_demo):
    one, other = (vs2_plugin.load(VS2)[0] for _ in range(2))
    addresses = [{weight.data_ptr() for weight in model.parameters()} for model in (one.model, other.model)]
    assert not addresses[0] & addresses[1]


# ---- the backbone


@pytest.fixture
def stock(monkeypatch):
    """A loader of models with random weights, and what it loaded."""
    monkeypatch.setattr(gc, "collect", int)  # takes long among all that tests import
    loaded = []

    def load():
        loaded.append(torch.nn.Linear(2, 2))
        return loaded[-1], "transform", "tokenizer"

    load.loaded = loaded
    return load


def test_a_twin_has_the_weights_and_nothing_else_of_the_model(make_clip, batch):
    model = make_clip()
    model.visual.conv1.weight.requires_grad_(False)
    copy = twin(model)
    with torch.no_grad():
        assert torch.equal(copy.encode_image(batch), model.encode_image(batch))
        handle = copy.visual.register_forward_hook(lambda module, args, output: output + 1)
        assert not torch.equal(copy.encode_image(batch), model.encode_image(batch))
        handle.remove()
    for weight, own in zip(model.parameters(), copy.parameters(), strict=True):
        assert weight is not own and weight.data_ptr() == own.data_ptr() and weight.requires_grad == own.requires_grad
    assert {one.data_ptr() for one in model.buffers()}.isdisjoint(one.data_ptr() for one in copy.buffers())
    copy.visual.proj = torch.nn.Parameter(torch.zeros_like(copy.visual.proj))
    copy.encode_image(batch).sum().backward()
    assert model.visual.proj.any() and all(weight.grad is None for weight in model.parameters())


def test_the_backbone_is_loaded_anew_where_another_would_be_loaded(stock):
    held, arguments = Shared(), ("name", "tag", None, "cpu")

    def loads(*arguments, seed=0):
        before = len(stock.loaded)
        torch.manual_seed(seed)
        held.twin(stock, *arguments)
        return len(stock.loaded) - before

    assert [loads(*arguments) for _ in range(2)] == [1, 0]
    for place in range(4):
        assert loads(*arguments[:place], "other", *arguments[place + 1 :]) == 1
    assert [loads(*arguments), loads(*arguments, seed=1), loads(*arguments, seed=1)] == [1, 1, 0]
    torch.manual_seed(1)
    model, _, _ = held.twin(stock, *arguments)
    with torch.no_grad():
        model.weight.add_(1)  # as a method that trains while it is evaluated
    assert loads(*arguments, seed=1) == 1


def test_the_random_numbers_that_follow_are_those_after_loading(stock):
    held, arguments = Shared(), ("name", "tag", None, "cpu")

    def number():
        torch.manual_seed(5)
        held.twin(stock, *arguments)
        return torch.rand(1)

    assert number() == number() and len(stock.loaded) == 1


def test_only_the_last_backbone_is_held():
    held = Shared()

    def load(function, name):
        torch.manual_seed(0)
        return function(lambda: (torch.nn.Linear(2, 2), None, None), name)[0]

    plain = weakref.ref(load(held.load, "first"))
    model = load(held.twin, "first")
    weight = weakref.ref(model.weight)
    model.itself = (model,)  # a circle, as between a steered model and its edits
    del model
    assert plain() is not None and weight() is not None
    load(held.load, "second")
    assert plain() is None and weight() is None


# ---- texts


@pytest.fixture
def texts():
    """Batches of three texts for the tiny random CLIP, no two alike."""
    return [torch.randint(0, 64, (3, 8), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


@pytest.fixture
def pair(make_clip, counted):
    """What two models of one backbone share, and the two with their texts; the second is steered."""
    held = Shared()
    plain, _, _ = held.load(lambda: (make_clip(), None, None), "name")
    return held, held.with_texts(plain, steered=False), held.with_texts(twin(plain), steered=True)


@torch.no_grad()
def test_what_is_given_may_be_edited(pair, texts, counted):
    _, plain, steered = pair
    right = [plain.encode_text(text) for text in texts]
    expected = [embedding.clone() for embedding in right]
    for embedding in right:
        embedding.zero_()
    for _ in range(2):
        for text, embedding in zip(texts, expected, strict=True):
            found = steered.encode_text(text)
            assert torch.equal(found, embedding)
            found.zero_()
    assert counted["texts"] == 4 + 1


@torch.no_grad()
def test_embeddings_are_kept_for_the_same_tokens_in_the_same_precision_only(pair, texts, counted):
    _, plain, steered = pair

    def encodes(function):
        before = counted["texts"]
        function()
        return counted["texts"] - before

    for text in texts[:2]:
        plain.encode_text(text)
        steered.encode_text(text)
    assert encodes(lambda: steered.encode_text(texts[1])) == 0
    assert encodes(lambda: steered.encode_text(texts[1][:2])) == 1
    assert encodes(lambda: steered.encode_text(texts[1].int())) == 1
    with torch.autocast("cpu"):
        assert encodes(lambda: steered.encode_text(texts[1])) == 1
    assert encodes(lambda: steered.encode_text(texts[1], normalize=True)) == 1
    with torch.enable_grad():
        assert encodes(lambda: steered.encode_text(texts[1])) == 1
        assert steered.encode_text(texts[1]).requires_grad
    steered.train()
    assert encodes(lambda: steered.encode_text(texts[1])) == 1


@torch.no_grad()
def test_where_there_is_no_room_other_backbones_make_it_and_then_texts_are_encoded(pair, texts, counted, monkeypatch):
    held, plain, steered = pair
    monkeypatch.setattr(shared, "_LIMIT", 3 * 3 * 24 * 4)  # three batches
    for text in texts[:2]:
        plain.encode_text(text)
    held.load(lambda: (plain._model, None, None), "other")
    other = held.with_texts(plain._model, steered=False)
    for text in texts:
        other.encode_text(text)
    assert held._size == shared._LIMIT
    counted["texts"] = 0
    again = held.with_texts(plain._model, steered=True)
    for text in texts:
        again.encode_text(text)
    assert counted["texts"] == 1 + 1  # to compare, and the one without room
    steered.encode_text(texts[0])
    assert counted["texts"] == 3 and held._size == shared._LIMIT / 3


def test_the_model_is_else_as_it_is(pair, batch):
    _, _, steered = pair
    assert steered.visual is steered._model.visual and steered.logit_scale is steered._model.logit_scale
    with pytest.raises(AttributeError, match="no_such"):
        steered.no_such_attribute  # noqa: B018
