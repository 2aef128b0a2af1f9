"""Steered embeddings on a GPU are those of the CPU."""

import copy
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import vs2_plugin
from vs2_plugin.clip.backbone import load_backbone
from vs2_plugin.clip.edits import editing
from vs2_plugin.data.images import image_digest, open_images
from vs2_plugin.data.naming import DataSet
from vs2_plugin.demo.digits import CLASSES, read_digits
from vs2_plugin.devices import add_at
from vs2_plugin.errors import PluginError
from vs2_plugin.method import Method
from vs2_plugin.plugins import registry
from vs2_plugin.steering.batch import Batch

from ..clip import library
from .conftest import GPU, NAME, TINY, needs_gpu

pytestmark = pytest.mark.gpu

METHODS = ("vs2", "vs2@gate=0.5", "vs2@blocks=2+3", "vs2@alpha=auto", "pass", "vs2s", "vs2s@alpha=1@p=2", "rec", "amp")
METHODS += ("vs2pp", "vs2pp@rule=query", "vs2pp@brake=0.8", "vs2pp@labels=oracle", "vs2pp@search=faiss", "clipsteer")
METHODS += ("vs2pp@blocks=2", "rag", "rag@labels=pseudo", "knn", "proto")
IMAGES = 64


@pytest.fixture(scope="module")
def digits():
    """Images of digits, ``[8, 8]`` each, and what they are."""
    pictures, labels = read_digits("test")
    return pictures[-IMAGES:], torch.tensor(labels[-IMAGES:])


class Steered:
    """A steered model on a device that knows the classes, and images for it."""

    def __init__(self, digits, method, device):
        name, at, options = method.partition("@")
        string = f"{name}:{TINY}{at}{options}"
        self.model, self.transform, tokenizer = vs2_plugin.load(string, dataset="wds/few", device=device)
        plain, *_ = vs2_plugin.load(f"vs2:{TINY}", dataset="wds/few")
        pictures, self.targets = digits
        self.images = torch.stack([self.transform(picture) for picture in pictures]).to(device)
        with torch.no_grad():  # the classes are the same numbers on every device
            texts = plain.encode_text(tokenizer([f"a photo of the digit {name}" for name in CLASSES]))
        self.model.set_classifier(F.normalize(texts, dim=-1).T.to(device), quiet=True)

    @torch.no_grad()
    def embed(self):
        """Embeddings of unit norm, float32 on the CPU."""
        self.model.set_targets(self.targets)
        return F.normalize(self.model.encode_image(self.images).float(), dim=-1).cpu()


@pytest.fixture
def steered(here, digits):
    """A function from a method with options and a device to a :class:`Steered`."""
    return lambda method, device=GPU: Steered(digits, method, device)


def forget_choices():
    shutil.rmtree(f"store/checkpoints/{NAME}/auto", ignore_errors=True)


def apart(one, other):
    """How far each embedding is from the other: ``1 - cos``, ``[images]``."""
    return 1 - (one.double() * other.double()).sum(1)


@pytest.mark.parametrize("method", METHODS)
def test_embeddings_are_those_of_the_cpu(steered, method):
    forget_choices()
    expected = steered(method, "cpu")
    embeddings = expected.embed()
    forget_choices()
    found = steered(method)
    wrong = (found.embed() - embeddings).abs().amax(1) > 1e-5
    # Where two latents, or two neighbours, are equally large but for rounding, either may be taken.
    assert wrong.sum() <= 1, wrong.nonzero()
    told, facts = found.model.vs2_facts(), expected.model.vs2_facts()
    assert told.keys() == facts.keys()
    for name, value in facts.items():
        if name not in ("vs2_auto_evidence", "vs2_auto_reason", "vs2_auto_standard_errors"):
            assert told[name] == (pytest.approx(value, abs=0.02) if isinstance(value, float) else value), name


@pytest.mark.parametrize(
    ("precision", "usual", "worst"), [("tf32", 1e-5, 0.05), (torch.float16, 1e-5, 0.05), (torch.bfloat16, 2e-4, 0.1)]
)
@pytest.mark.parametrize("method", ["vs2", "vs2pp"])
def test_other_precisions_stay_within_their_tolerance(steered, method, precision, usual, worst):
    """Most embeddings by rounding only; a few take another latent or neighbour."""
    expected, found = steered(method, "cpu").embed(), steered(method)
    if precision == "tf32":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        try:
            embeddings = found.embed()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False
    else:
        with torch.autocast(GPU, precision):
            embeddings = found.embed()
    differences = apart(embeddings, expected)
    assert differences.median() < usual and (differences > worst).sum() <= 1  # one vote may turn out otherwise


def test_a_model_in_half_precision_is_steered_in_float32(steered):
    expected, found = steered("vs2", "cpu").embed(), steered("vs2")
    found.model.half()
    found.images = found.images.half()
    assert apart(found.embed(), expected).median() < 1e-5
    assert {weight.dtype for weight in found.model.places[0].gate.sae.parameters()} == {torch.float32}


@pytest.mark.parametrize("method", ["vs2pp", "vs2pp@blocks=2", "clipsteer", "knn"])
def test_an_image_of_the_gallery_is_not_its_own_neighbour(steered, method):
    expected, found = steered(method, "cpu"), steered(method)
    train = open_images(DataSet.of("wds/few", "few"), "train", found.transform)
    images = next(train.batches(32, 0)).images
    for model in (expected, found):
        model.images = torch.cat([images, model.images.cpu()[:32]]).to(model.images.device)  # the others are strangers
    assert ((found.embed() - expected.embed()).abs().amax(1) > 1e-5).sum() <= 1
    gallery = found.model.places.retriever.gallery
    batch = Batch(found.images, embed=lambda: found.model.model.encode_image(found.images))
    with torch.no_grad(), found.model.unsteered():
        hood = found.model.places.retriever.neighbours(batch)
    own = np.array([image_digest(image) for image in found.images])
    assert hood.rows.device.type == GPU and np.isin(own, gallery.digests).sum() >= 32
    assert not (gallery.digests[hood.rows.cpu().numpy()] == own[:, None]).any()


@pytest.mark.parametrize("method", ["vs2", "vs2@gate=0.5", "vs2@blocks=2+3", "pass", "rec", "amp", "vs2pp", "knn"])
def test_no_batch_waits_for_the_gpu(steered, method, monkeypatch):
    monkeypatch.setattr("vs2_plugin.steering.retriever._SAME", 2.0)  # none is near enough to be looked at
    found = steered(method)
    for _ in range(3):  # what a GPU is told once, it is told by then
        found.embed()
        with torch.autocast(GPU):
            found.embed()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            for _ in range(2):
                found.model.encode_image(found.images)
            with torch.autocast(GPU):
                found.model.encode_image(found.images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert method == "knn" or found.model.vs2_facts()["vs2_mean_fvu"] > 0


REPLAYED = [method for method in METHODS if not method.startswith(("clipsteer", "rag", "proto"))]
REPLAYED.remove("vs2pp@search=faiss")
REPLAYED += ["centre", "latents@boost=3+5@factor=2"]


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("method", REPLAYED)
@torch.no_grad()
def test_replayed_models_give_the_same_bits(steered, method, amp, monkeypatch):
    monkeypatch.setattr("vs2_plugin.steering.retriever._SAME", 2.0)
    found = steered(method)
    images = found.images[: IMAGES if GPU != "cpu" else 24]  # a CPU may emulate autocast
    some = [images.roll(by, 3) for by in range(6)] + [images[:20]] * 4
    results = []
    for on in (False, True):
        found.model.reset_statistics()
        with monkeypatch.context() as patch, torch.autocast(GPU, enabled=amp):
            if not on:
                patch.setattr("vs2_plugin.model.steered.can_replay", lambda x: False)
            results.append([found.model.encode_image(images) for images in some])
        results.append(found.model.vs2_facts())
    assert [one._replayed._calls for one in found.model._replays._told.values()] == [6, 4]
    anew, facts, again, same = results
    for name, value in facts.items():
        assert same[name] == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else value), name
    assert all(map(torch.equal, anew, again))


@torch.no_grad()
def test_replays_follow_the_classes_and_the_device(steered):
    found = steered("vs2pp@rule=query")
    for _ in range(4):
        expected = found.embed()
    classifier = found.model.classifier.weights
    found.model.set_classifier(classifier.roll(1, 0), quiet=True)
    others = [found.embed() for _ in range(4)]
    assert all(torch.equal(one, others[0]) for one in others) and not torch.equal(others[0], expected)
    found.model.set_classifier(classifier, quiet=True)
    assert all(torch.equal(found.embed(), expected) for _ in range(4))
    plain = steered("vs2")
    *_, expected = (plain.embed() for _ in range(4))
    plain.model.cpu().to(GPU)
    assert all(torch.equal(plain.embed(), expected) for _ in range(4))
    with torch.no_grad():
        plain.model.model.visual.proj.mul_(-1)  # in place
    assert all(torch.equal(plain.embed(), -expected) for _ in range(2))


@torch.no_grad()
def test_replays_read_nothing_that_the_surrounding_autocast_has_cast(steered):
    found, others = steered("vs2"), steered("vs2")
    with torch.autocast(GPU):
        expected = others.embed()
        for _ in range(4):
            assert torch.equal(found.embed(), expected)
    junk = [torch.full((1 << 20,), float("nan"), device=GPU) for _ in range(8)]  # where the casts were
    with torch.autocast(GPU):
        assert torch.equal(found.embed(), expected) and len(junk) == 8


class Waiting:
    """A steering that says of itself that it can be replayed, and cannot."""

    replayable = True

    def __call__(self, x):
        return x + float(x[0, 0])


@needs_gpu
@torch.no_grad()
def test_a_steering_that_waits_for_the_gpu_is_asked_each_time(here, digits, monkeypatch, caplog):
    known = registry()
    method = Method("waiting", lambda context: Waiting(), needs_checkpoint=False)
    monkeypatch.setitem(known.methods, method.name, method)
    monkeypatch.setitem(known.owners, method.name, "a test")
    caplog.set_level("INFO", "vs2_plugin")
    found, others = Steered(digits, "waiting", GPU), Steered(digits, "waiting", "cpu")
    for by in range(5):
        found.images, others.images = (one.images.roll(by, 0) for one in (found, others))
        assert (found.embed() - others.embed()).abs().max() < 1e-5
    assert "waits for the GPU" in caplog.text
    assert torch.cuda.current_stream() == torch.cuda.default_stream() and torch.cuda.get_sync_debug_mode() == 0


FAILS = """
import torch
from vs2_plugin.devices import Replayed
replayed = Replayed()
for _ in range(4):
    replayed(lambda: torch.ones(3, device="cuda").sum().item())
assert Replayed.failed and not replayed.is_told
assert torch.cuda.current_stream() == torch.cuda.default_stream()
assert torch.ones(3, device="cuda").sum().item() == 3
"""


@needs_gpu
def test_a_graph_that_cannot_be_made_leaves_the_stream_as_it_was():
    """In another process, in which torch may make no other graph afterwards."""
    subprocess.run([sys.executable, "-c", FAILS], check=True)


FORKS = """
import gc, os, torch
from vs2_plugin.devices import Replayed, to_processor

def leave_garbage():
    replayed, numbers = Replayed(), torch.ones(3, device="cuda")
    for _ in range(4):
        replayed(lambda: numbers.add_(1))
    assert replayed.is_told
    garbage = [replayed, to_processor(numbers)]
    garbage.append(garbage)

gc.disable()
leave_garbage()
child = os.fork()
if not child:
    gc.collect()
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert gc.collect() > 0
"""


@needs_gpu
def test_what_lies_on_a_gpu_is_not_freed_by_processes_without_one():
    subprocess.run([sys.executable, "-c", FORKS], check=True)


@torch.no_grad()
def test_hooks_of_others_are_called_each_time(steered):
    found, seen = steered("vs2"), []
    *_, expected = (found.embed() for _ in range(4))
    handle = found.model.model.visual.register_forward_hook(lambda *_: seen.append(1))
    assert all(torch.equal(found.embed(), expected) for _ in range(4)) and len(seen) == 4
    handle.remove()
    assert torch.equal(found.embed(), expected) and len(seen) == 4


@needs_gpu
def test_what_is_not_finite_is_told_before_results_are(here, digits, monkeypatch):
    known = registry()
    method = Method("wild", lambda context: lambda x: x / 0, needs_checkpoint=False)
    monkeypatch.setitem(known.methods, method.name, method)
    monkeypatch.setitem(known.owners, method.name, "a test")
    model = Steered(digits, "wild", GPU)
    model.embed()
    with pytest.raises(PluginError, match="method 'wild' of a test steered to NaN or infinity at block 3"):
        model.model.vs2_facts()
    model.model.reset_statistics()
    assert model.model.vs2_facts()["vs2_method"] == "wild"


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_are_those_of_the_cpu_and_the_same_each_time(dtype):
    torch.manual_seed(0)
    values = torch.randn(300_000, dtype=dtype) * 100
    places = torch.randint(0, 500, values.shape)
    expected = torch.zeros(500, dtype=torch.float64).index_add_(0, places, values.double())
    found = [add_at(torch.zeros(500, dtype=dtype).to(GPU), places.to(GPU), values.to(GPU)).cpu() for _ in range(3)]
    assert all(torch.equal(one, found[0]) for one in found)
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-6, atol=1e-5)
    rows, own = values.view(3, -1), places.view(3, -1)
    expected = torch.zeros(3, 500, dtype=torch.float64).scatter_add_(1, own, rows.double())
    found = add_at(torch.zeros(3, 500, dtype=dtype).to(GPU), own.to(GPU), rows.to(GPU)).cpu()
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)
    nothing = add_at(torch.ones(2).to(GPU), torch.tensor([1]).to(GPU), torch.zeros(1).to(GPU))
    assert torch.equal(nothing.cpu(), torch.ones(2))
    for wrong in (torch.inf, torch.nan):
        sums = add_at(torch.zeros(2).to(GPU), torch.tensor([0, 1, 1]).to(GPU), torch.tensor([1.0, wrong, 1.0]).to(GPU))
        assert not sums[1].isfinite()


def test_a_model_moves_between_devices(steered):
    model = steered("vs2@gate=0.5", "cpu")
    expected = model.embed()
    model.model.to(GPU)
    model.images = model.images.to(GPU)
    assert (model.embed() - expected).abs().max() < 1e-5
    model.model.cpu()
    model.images = model.images.cpu()
    assert torch.equal(model.embed(), expected)


@pytest.mark.parametrize("method", ["vs2@gate=0.5", "vs2pp"])
def test_copies_and_pickles_steer_alike(steered, method):
    model = steered(method)
    expected, original = model.embed(), model.model
    for other in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
        model.model = other
        assert torch.equal(model.embed(), expected)
        assert next(other.parameters()).device.type == GPU


def test_per_image_facts_come_to_the_cpu(steered):
    model = steered("vs2@gate=0.5")
    model.model.record_images(True)
    model.embed()
    told = model.model.per_image()
    assert {name: (values.device.type, len(values)) for name, values in told.items()} == {
        "fvu": ("cpu", IMAGES),
        "steered": ("cpu", IMAGES),
    }


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2"])
@torch.no_grad()
def test_a_tower_of_transformers_is_steered(kind, tmp_path):
    name = getattr(library, f"write_{kind}")(tmp_path / kind)
    embeddings = []
    for device in ("cpu", GPU):
        loaded = load_backbone(name, "", None, device)
        pictures = [Image.effect_noise((40, 30), sigma).convert("RGB") for sigma in (20, 60)]
        torch.manual_seed(0)
        images = torch.rand(2, *loaded.transform(pictures[0]).shape).to(device)
        with editing(loaded.model, loaded.sites.default, lambda x: x.flip(1)):
            embeddings.append(F.normalize(loaded.model.encode_image(images).float(), dim=-1).cpu())
        plain = F.normalize(loaded.model.encode_image(images).float(), dim=-1).cpu()
        assert (plain - embeddings[-1]).abs().max() > 1e-3
    assert (embeddings[0] - embeddings[1]).abs().max() < 1e-5
