"""What Python and ``vs2 classify`` ask of models on a GPU: its answers are those of the CPU."""

import csv
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import vs2_plugin
from vs2_plugin.checkpoint.store import Store
from vs2_plugin.cli import main, train_sae
from vs2_plugin.clip.backbone import load_backbone
from vs2_plugin.clip.edits import reading
from vs2_plugin.clip.sites import embedding_from
from vs2_plugin.demo.digits import CLASSES, read_digits
from vs2_plugin.model.candidates import ZeroShot

from ..classify.conftest import write_photos
from .conftest import GPU, NAME, TINY

pytestmark = pytest.mark.gpu

BLOCK = "visual.transformer.resblocks.3"


@pytest.fixture(scope="module")
def pictures():
    """Images of digits, ``[8, 8]`` each."""
    return read_digits("train")[0][:64]


@pytest.fixture
def both(here):
    """A function from a method with options to the model on the CPU and on the GPU."""

    def load(method):
        name, at, options = method.partition("@")
        string = f"{name}:{TINY}@{NAME}{at}{options}"
        return [vs2_plugin.load(string, classes=CLASSES, amp=False, device=device)[0] for device in ("cpu", GPU)]

    return load


@pytest.mark.parametrize("method", ["vs2@gate=0.5", "vs2@blocks=2+3", "vs2s", "vs2pp", "rag"])
def test_images_are_classified_and_explained(both, pictures, method):
    models = both(method)
    expected, found = (model.classify(pictures) for model in models)
    assert found.logits.device.type == found.fvu.device.type == "cpu"
    off = (F.normalize(found.logits, dim=1) - F.normalize(expected.logits, dim=1)).abs().amax(1) > 1e-4
    assert off.sum() <= 1  # equally large but for rounding: another neighbour or latent
    torch.testing.assert_close(found.plain_logits, expected.plain_logits, rtol=1e-4, atol=1e-3)
    one, other = (model.explain(pictures[0]) for model in models)
    assert [change.name for change in other.classes] == [change.name for change in one.classes]
    assert [place.site for place in other.places] == [place.site for place in one.places]


@pytest.mark.parametrize("method", ["vs2@gate=0.5", "vs2s", "vs2pp", "clipsteer", "rag", "knn", "dn", "tda"])
def test_a_model_with_classes_may_be_moved(both, pictures, method):
    moved, there = both(method)
    before = moved.classify(pictures).logits
    moved.to(GPU)
    assert moved.classifier.weights.device.type == GPU
    assert torch.equal(moved.classify(pictures).labels, there.classify(pictures).labels)
    if method not in ("dn", "tda"):  # what is explained is a change of activations
        assert moved.explain(pictures[0]).classes
    moved.cpu()
    assert torch.equal(moved.classify(pictures).logits, before)


def test_activations_are_steered_where_they_lie(both):
    expected, found = both("vs2@gate=0.5")
    x = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    assert (found.steer(x) - expected.steer(x)).abs().max() < 1e-4
    assert found.steer(x).device == x.device and found.steer(x.to(GPU)).device.type == GPU


def test_an_sae_of_activations_is_that_of_their_images(here, pictures):
    quick = {"model": TINY, "pretrained": "", "samples": 3000, "amp": False, "quiet": True, "overwrite": True}
    loaded = load_backbone(TINY, "", None, GPU)
    site = loaded.sites.default
    with torch.no_grad(), reading(loaded.model, [site]) as found:
        loaded.model.encode_image(torch.stack([loaded.transform(one) for one in pictures]).to(GPU))
    by_images = vs2_plugin.train(pictures, **quick, name="images", cache_dtype="float32")
    np.save("x.npy", found[site].cpu().numpy())
    by_file = vs2_plugin.train(activations="x.npy", **quick, name="file")
    for by_rows in (by_file, vs2_plugin.train(found[site].cpu(), **quick, name="rows")):
        one, other = (load_file(of.folder / BLOCK / "sae.safetensors") for of in (by_images, by_rows))
        assert all(torch.equal(other[name], weight) for name, weight in one.items())
    words = ["--activations", "x.npy", "--samples", "3000", "--name", "none", "--overwrite"]
    assert train_sae.main(words) == 0 and 0 < Store.default().find("none").sites[0].fvu < 1


def test_a_folder_of_photos_is_classified(here, without_gpu):
    shutil.rmtree("photos", ignore_errors=True)
    write_photos(here / "photos", 24)
    rows = []
    for device in ("gpu", "cpu"):
        words = ["photos", "--model", f"vs2:{TINY}@{NAME}@gate=0.5", "--pretrained", "", "--no_amp", "--overwrite"]
        assert main.main(["classify", *words, "--out", f"{device}.csv", "--num_workers", "0"]) == 0
        with open(f"{device}.csv", newline="") as file:
            rows.append(list(csv.DictReader(file)))
        without_gpu()
    assert len(rows[0]) == 24 and sum(one["class"] != other["class"] for one, other in zip(*rows)) <= 1


def test_many_candidates_get_the_classes_that_the_tower_gives_each(both):
    _, model = both("vs2")
    place = model.places[0]
    x, v = torch.randn(2, 150, 128, device=GPU, generator=torch.Generator(GPU).manual_seed(0))
    ways = [F.normalize(x + strength * v) * x.norm(dim=1, keepdim=True) for strength in (0.0, 0.5, 1.0, 3.0, 8.0)]
    classifier = F.normalize(torch.randn(64, 30, device=GPU), dim=0)
    with torch.no_grad():
        found = ZeroShot(model.model, place.site, classifier)(ways)
        for way, classes in zip(ways, found.unbind(1), strict=True):
            logits = F.normalize(embedding_from(model.model, place.site, way), dim=-1) @ classifier
            best = logits.topk(2).values
            assert (classes == logits.argmax(1))[best[:, 0] - best[:, 1] > 1e-5].all()
