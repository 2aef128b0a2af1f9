"""Forward passes that are told once, without a GPU: what stands for a graph does the same operations again, with the
same tensors."""

import copy
import gc
import itertools
import logging
import pickle
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import vs2_plugin
from vs2_plugin.clip.backbone import load_backbone
from vs2_plugin.clip.edits import editing, paused
from vs2_plugin.clip.sites import Site
from vs2_plugin.data.images import open_images
from vs2_plugin.data.naming import DataSet
from vs2_plugin.gallery.search import ExactSearch
from vs2_plugin.model import replay
from vs2_plugin.model.replay import Replays
from vs2_plugin.steering.tally import Tally

from ..clip import library
from .conftest import TINY

pytestmark = pytest.mark.usefixtures("again")
MODEL = nn.Sequential(nn.Linear(3, 3)).eval()


class Doubling:
    """Doubles images, counts, and asks whether any is special: one that begins with a 7."""

    def __init__(self):
        self.tally, self.seen = Tally(), []

    def __call__(self, batch) -> Tensor:
        casts = torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()
        self.seen.append((*casts, torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        asked = batch.ask(batch.images[:, 0] == 7)
        self.tally.add(first=batch.images[:, 0])
        return 2 * batch.images + asked()[:, None]


def test_what_is_given_is_what_encoding_gives():
    encode, replays = Doubling(), Replays()
    given = []
    for dtype in (torch.float32, torch.bfloat16):
        for x in torch.randn(4, 5, 3).to(dtype):
            given.append((replays(MODEL, encode, x), x))
    for found, x in given:  # of one batch it stays when the next one has come
        assert found.dtype == x.dtype and torch.equal(found, 2 * x)


def test_nothing_that_autocast_has_cast_before_is_read():
    encode, replays, x = Doubling(), Replays(), torch.ones(1, 3)
    with torch.autocast("cpu"):
        replays(MODEL, encode, x)
        assert torch.is_autocast_cache_enabled()
    replays(MODEL, encode, x)
    assert [one[:2] for one in encode.seen] == [(True, False), (False, False)]


@torch.inference_mode()
def test_it_works_within_the_inference_mode_and_after_it():
    encode, replays = Doubling(), Replays()
    x = torch.ones(2, 3)
    for _ in range(4):
        assert torch.equal(replays(MODEL, encode, x), 2 * x)
        with torch.inference_mode(False), torch.no_grad():
            assert torch.equal(replays(MODEL, encode, torch.full((2, 3), 4.0)), torch.full((2, 3), 8.0))
    assert {one[2:] for one in encode.seen} == {(False, False)}


def test_a_batch_for_which_the_answer_is_yes_counts_only_where_it_is_told_anew():
    encode, replays = Doubling(), Replays()
    ones, fours, special = torch.ones(2, 3), torch.full((2, 3), 4.0), torch.tensor([[1.0, 2, 3], [7, 0, 0]])
    for batch in (ones, special, fours, ones, special, special, fours):
        found = replays(MODEL, encode, batch)
        assert found is None if batch is special else torch.equal(found, 2 * batch)
    assert encode.tally.means() == {"first": 2.5} and len(encode.seen) == 3


def test_nothing_stays_of_what_was_forgotten():
    encode, replays = Doubling(), Replays()
    for _ in range(4):
        replays(MODEL, encode, torch.ones(2, 3))
    gone = [weakref.ref(one) for one in (next(iter(replays._told.values())), replays._parts)]
    gc.disable()  # a GPU's memory would wait for it
    try:
        replays.forget()
        assert [one() for one in gone] == [None, None]
    finally:
        gc.enable()


def test_every_shape_is_told_and_of_many_the_first(monkeypatch):
    monkeypatch.setattr(replay, "_MOST", 2)
    encode, replays = Doubling(), Replays()
    found = [replays(MODEL, encode, torch.ones(count, 3)) for count in (1, 2, 3, 1, 2, 3)]
    assert [one is None for one in found] == [False, False, True] * 2
    replays.forget()
    assert replays(MODEL, encode, torch.ones(3, 3)) is not None


@pytest.mark.parametrize("name", ["fp32_precision", "allow_tf32"])
def test_other_products_and_another_order_in_memory_are_told_apart(name):
    encode, replays, x, products = Doubling(), Replays(), torch.ones(3, 3), torch.backends.cuda.matmul
    if not hasattr(products, name):
        pytest.skip("torch before 2.9")
    replays(MODEL, encode, x)
    before = getattr(products, name)
    setattr(products, name, "tf32" if name == "fp32_precision" else True)
    try:
        replays(MODEL, encode, x)
    finally:
        setattr(products, name, before)
    assert len(replays._told) == 2
    replays(MODEL, encode, x.T)
    assert [one._images.stride() for one in replays._told.values()] == [(3, 1), (3, 1), (1, 3)]
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        replays(MODEL, encode, x)
    assert len(replays._told) == 4


def test_what_cannot_be_told_is_asked_of_encoding_itself(caplog):
    def encode(batch):
        raise RuntimeError("operation not permitted when stream is capturing")

    caplog.set_level(logging.INFO, "vs2_plugin")
    replays = Replays()
    assert replays(MODEL, encode, torch.ones(1, 3)) is None and "stream is capturing" in caplog.text
    caplog.clear()
    assert replays(MODEL, encode, torch.ones(1, 3)) is None and not caplog.records


def test_what_waits_for_the_gpu_is_asked_itself_before_a_graph_is_made_of_it(caplog, monkeypatch):
    modes, number = [], itertools.count(1)
    monkeypatch.setattr("torch.cuda.set_sync_debug_mode", modes.append)

    def encode(batch):
        if next(number) in waits:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("Synchronization debug mode does not yet detect all synchronizing operations", stacklevel=1)
        return batch.images + 1

    caplog.set_level(logging.INFO, "vs2_plugin")
    replays, waits, x = Replays(), (1,), torch.ones(1, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert all(replays(MODEL, encode, x) is not None for _ in range(5))  # when it is set up, it may
        waits = (5,)
        assert [replays(MODEL, encode, x[:, :2]) is None for _ in range(3)] == [False, True, True]
    assert modes == ["warn", 0] * 2 and "waits for the GPU" in caplog.text


def test_weights_of_other_kinds_are_left_alone():
    class Packed(Tensor):
        """Has no place of its own."""

    model = copy.deepcopy(MODEL)
    model[0].register_buffer("packed", torch.ones(2).as_subclass(Packed))
    assert Replays()(model, Doubling(), torch.ones(1, 3)) is None


def test_a_copy_is_told_anew():
    encode, replays = Doubling(), Replays()
    replays(MODEL, encode, torch.ones(1, 3))
    for other in (copy.deepcopy(replays), pickle.loads(pickle.dumps(replays))):
        assert torch.equal(other(MODEL, Doubling(), torch.ones(1, 3)), torch.full((1, 3), 2.0))
        assert len(other._told) == 1


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("change", ["weights", "module", "forward"])
def test_a_model_that_was_changed_is_told_anew(change, told):
    model, replays = copy.deepcopy(MODEL), Replays()

    def once():
        replays(model, Doubling(), torch.ones(1, 3))
        return next(iter(replays._told.values()), None)

    first = once()
    with torch.no_grad():
        model[0].weight.mul_(2)  # in place: a graph reads it there
    assert once() is first
    if told:
        assert once() is first
    if change == "weights":
        model[0].weight = nn.Parameter(torch.ones(3, 3))
    elif change == "module":
        model.append(nn.Identity().eval())
    else:
        model[0].forward = lambda x: x
    assert once() is None  # that batch is encoded anew
    second = once()
    assert second not in (first, None) and once() is second


def test_weights_that_are_elsewhere_are_found_before_a_gpu_looks_for_them(again):
    model, encode, replays, x = copy.deepcopy(MODEL), Doubling(), Replays(), torch.ones(1, 3)
    for _ in range(3):
        replays(model, encode, x)
    (before,) = replays._told.values()
    model[0].weight.data = model[0].weight.data.clone()
    assert replays(model, encode, x) is not None and len(encode.seen) == 4
    assert before not in replays._told.values() and before._replayed._calls == 3


def test_weights_that_lie_otherwise_at_the_same_place_are_told_anew():
    model, replays, x = copy.deepcopy(MODEL), Replays(), torch.ones(1, 3)
    told = [replays(model, Doubling(), x) is not None for _ in range(3)]
    model[0].weight.data = model[0].weight.data.T
    told += [replays(model, Doubling(), x) is not None for _ in range(2)]
    assert told == [True, True, True, False, True]


def test_threads_leave_the_mode_of_waits_as_it_was(monkeypatch):
    modes, inside, left = [0], threading.Event(), threading.Event()
    monkeypatch.setattr("torch.cuda.get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr("torch.cuda.set_sync_debug_mode", modes.append)

    def first():
        with replay._without_waits():
            inside.set()
            left.wait(0.2)  # for a second thread that did not wait for this one

    def second():
        inside.wait(60)
        with replay._without_waits():
            left.set()

    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(first), threads.submit(second)]:
            done.result(60)
    assert modes == [0, "warn", 0, "warn", 0]


def test_another_model_is_told_anew():
    replays, x, told = Replays(), torch.ones(1, 3), []
    for model in (MODEL, copy.deepcopy(MODEL), MODEL):
        assert replays(model, Doubling(), x) is not None
        told += replays._told.values()
    assert len(set(told)) == 3


def test_a_model_with_hooks_or_in_training_is_asked_itself():
    model, replays, x = copy.deepcopy(MODEL), Replays(), torch.ones(1, 3)
    assert replays(model, Doubling(), x) is not None
    for register in (model[0].register_forward_hook, model[0].register_forward_pre_hook):
        handle = register(lambda *_: None)
        assert replays(model, Doubling(), x) is None
        handle.remove()
    model[0].train()
    assert replays(model, Doubling(), x) is None
    model[0].eval()
    with editing(model, Site("0", 3), lambda x: x):
        assert replays(model, Doubling(), x) is None
    same = Same()
    with editing(model, Site("0", 3), same):  # a steering that says so is no reason
        assert replays(model, Doubling(), x) is not None
        with paused([model[0].vs2_steering_0]):
            assert replays(model, Doubling(), x) is None
        assert replays(model, Doubling(), x) is not None


class Same(nn.Module):
    """A steering that does nothing, and says that it does the same with all batches."""

    replayable = True

    def __init__(self):
        super().__init__()
        self.number, self.direction = 1.0, torch.ones(3)

    def forward(self, x):
        return x


@pytest.mark.parametrize("change", [{"number": 2.0}, {"direction": torch.ones(3)}, {"eps": 1e-3}])
def test_what_modules_were_told_is_told_anew(change):
    model, replays, told = nn.Sequential(nn.LayerNorm(3)).eval(), Replays(), []
    with editing(model, Site("0", 3), Same()):
        (of,) = [one for one in model.modules() if isinstance(one, nn.LayerNorm if "eps" in change else Same)]
        for number in range(6):
            if number == 3:
                vars(of).update(change)
            told.append(replays(model, Doubling(), torch.ones(1, 3)) is not None)
    assert told == [True, True, True, False, True, True]


@pytest.mark.parametrize("wrap", [torch.compile, lambda model: torch.jit.trace(model, torch.ones(1, 3))])
def test_compiled_modules_are_asked_themselves(wrap):
    model = nn.Sequential(wrap(copy.deepcopy(MODEL))).eval()
    assert Replays()(model, Doubling(), torch.ones(1, 3)) is None


def test_a_pass_that_was_interrupted_is_told_anew(monkeypatch):
    replays, encode, x = Replays(), Doubling(), torch.ones(1, 3)
    assert replays(MODEL, encode, x) is not None
    with pytest.raises(KeyboardInterrupt):
        replays(MODEL, lambda batch: interrupted(), x)
    assert [replays(MODEL, encode, batch) is None for batch in (x, x[:, :2], x[:, :2])] == [True, False, False]


def interrupted():
    raise KeyboardInterrupt


def test_a_gallery_that_holds_the_images_is_not_asked_twice_for_ever(monkeypatch):
    replays, encode, special = Replays(), Doubling(), torch.full((2, 3), 7.0)
    for _ in range(2):
        assert replays(MODEL, encode, special) is None
    assert replays(MODEL, encode, -special) is not None
    for _ in range(9):
        assert replays(MODEL, encode, special) is None
    assert len(encode.seen) == 3 and list(replays._told.values()) == [None]


class Watching(TorchDispatchMode):
    """Sees every operation."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_nothing_is_replayed_on_a_processor_or_where_somebody_looks_on(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
    can_replay = replay.can_replay
    on_gpu = torch.ones(1).as_subclass(type("OnGpu", (Tensor,), {"is_cuda": True}))
    monkeypatch.setattr(replay, "Tensor", type(on_gpu))
    assert not can_replay(on_gpu)  # gradients are asked for
    with torch.no_grad():
        assert can_replay(on_gpu) and not can_replay(torch.ones(1))
        with Watching():
            assert not can_replay(on_gpu)
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
        assert not can_replay(on_gpu)
        handle.remove()
        assert can_replay(on_gpu)
        monkeypatch.setattr("torch.jit.is_tracing", lambda: True)
        assert not can_replay(on_gpu)


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2"])
@torch.no_grad()
def test_towers_of_transformers_are_replayed(kind, tmp_path):
    loaded = load_backbone(getattr(library, f"write_{kind}")(tmp_path / kind), "", None, "cpu")
    size, replays = loaded.transform(Image.new("RGB", (9, 9))).shape, Replays()
    for images in torch.randn(5, 2, *size):
        found = replays(loaded.model.visual, lambda batch: loaded.model.encode_image(batch.images), images)
        assert torch.equal(found, loaded.model.encode_image(images))
    assert [one._replayed.is_told for one in replays._told.values()] == [True]


@pytest.fixture
def images():
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def classifier():
    return nn.functional.normalize(torch.randn(64, 10, generator=torch.Generator().manual_seed(2)), dim=0)


def load(text, classifier):
    model, *_ = vs2_plugin.load(text.format(TINY), dataset="wds/digits")
    model.set_classifier(classifier)
    return model


@pytest.fixture
def replaying(again, monkeypatch):
    """A function that has models replayed as if on a GPU, or told anew."""
    monkeypatch.setattr("vs2_plugin.steering.retriever.ScreenedSearch", ExactSearch)
    return lambda on: monkeypatch.setattr("vs2_plugin.model.steered.can_replay", lambda x: on)


def told(model):
    """The number of shapes that a model was told."""
    return len(model._replays._told)


REPLAYED = ["vs2:{}", "vs2:{}@gate=0.5", "vs2:{}@blocks=2+3", "vs2:{}@alpha=auto", "rec:{}", "centre:{}", "vs2s:{}"]
REPLAYED += ["latents:{}@boost=3+5@factor=2", "vs2pp:{}", "vs2pp:{}@rule=query@brake=0.5", "knn:{}"]
REPLAYED.append("vs2pp:{}@blocks=2")


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("text", REPLAYED)
@torch.no_grad()
def test_replayed_models_give_the_same_bits_and_figures(text, amp, in_demo, images, classifier, replaying):
    found = []
    for on in (False, True):
        replaying(on)
        model = load(text, classifier)
        with torch.autocast("cpu", enabled=amp):
            some = [images.roll(by, 3) for by in range(5)] + [images[:2], images[2:4], -images[:2], images[:2]]
            embeddings = [model.encode_image(batch) for batch in some]
        found.append((embeddings, model.vs2_facts()))
        assert [one._replayed._calls for one in model._replays._told.values()] == ([5, 4] if on else [])
    (anew, facts), (again, same) = found
    assert facts == same and all(map(torch.equal, anew, again))
    model.reset_statistics()
    assert told(model) == 2 and model.vs2_facts() != facts


@pytest.mark.parametrize("text", ["clipsteer:{}", "rag:{}", "vs2pp:{}@encoder=none"])
@torch.no_grad()
def test_what_asks_more_than_the_gpu_is_told_anew(text, in_demo, images, classifier, replaying):
    replaying(True)
    model = load(text.removesuffix("@encoder=none"), classifier)
    if text.endswith("none"):
        model.places.retriever._encode = lambda images: images.flatten(1)[:, :64]
    model.encode_image(images)
    assert told(model) == 0


@torch.no_grad()
def test_an_image_of_the_gallery_is_told_anew(in_demo, classifier, replaying):
    found = []
    for on in (False, True):
        replaying(on)
        model = load("vs2pp:{}@n=3", classifier)
        train = next(open_images(DataSet.of("wds/digits", "digits"), "train", model.transform).batches(4, 0)).images
        mixed = torch.cat([train[:1], torch.ones_like(train[1:])])
        strangers = torch.ones_like(train)
        some = (train, strangers, mixed, train, strangers, mixed)
        embeddings = [model.encode_image(batch) for batch in some]
        found.append((embeddings, model.vs2_facts()))
        assert told(model) == on
    (anew, facts), (again, same) = found
    assert facts == same and all(map(torch.equal, anew, again))


@torch.no_grad()
def test_they_are_told_anew_for_other_classes_and_other_weights(in_demo, images, classifier, replaying):
    replaying(True)
    model = load("vs2pp:{}@rule=query", classifier)
    before = model.encode_image(images)
    model.set_classifier(classifier.roll(1, 0))
    assert told(model) == 0
    rolled = model.encode_image(images)
    assert not torch.equal(rolled, before)
    (first,) = model._replays._told.values()
    model.double().float()
    assert torch.allclose(model.encode_image(images), rolled, atol=1e-5)
    assert first not in model._replays._told.values()
    replaying(False)
    assert torch.equal(load("vs2pp:{}@rule=query", classifier.roll(1, 0)).encode_image(images), rolled)


@torch.no_grad()
def test_a_steering_that_was_changed_is_told_anew(in_demo, images, classifier, replaying):
    replaying(True)
    model = load("vs2:{}", classifier)
    *_, before = (model.encode_image(images) for _ in range(4))
    model.places[0].steering.strength = 3.0
    found = [model.encode_image(images) for _ in range(4)]
    replaying(False)
    assert all(torch.equal(one, model.encode_image(images)) for one in found)
    assert not torch.equal(found[0], before)


@torch.no_grad()
def test_what_is_told_of_each_image_or_asked_otherwise_is_not_replayed(in_demo, images, classifier, replaying):
    replaying(True)
    model = load("vs2:{}@gate=0.5", classifier)
    model.encode_image(images, normalize=True)
    shown = []
    model.record_images(True, lambda plain: shown.append(plain()))
    model.encode_image(images)
    assert told(model) == 0 and len(model.per_image()["fvu"]) == len(images) and len(shown) == 1
    model.record_images(False)
    model.encode_image(images)
    assert told(model) == 1
