"""The galleries that vs2-train-sae keeps beside its checkpoints."""

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from vs2_plugin.checkpoint.store import Store
from vs2_plugin.cli import main as vs2
from vs2_plugin.cli import train_sae
from vs2_plugin.clip.backbone import load_backbone
from vs2_plugin.clip.edits import reading
from vs2_plugin.clip.sites import Sites
from vs2_plugin.data.images import image_digest, open_images
from vs2_plugin.data.naming import DataSet

FEW = ["--samples", "500", "--max_images", "48", "--num_workers", "0", "--quiet", "--no_amp"]
BLOCK = "visual.transformer.resblocks.3"


@pytest.fixture(scope="module")
def digits(workplace, tmp_path_factory):
    return shutil.copytree(workplace, tmp_path_factory.mktemp("digits"), dirs_exist_ok=True)


@pytest.fixture(scope="module")
def timm_folder(digits):
    """A folder that timm loads a model from."""
    timm = pytest.importorskip("timm")
    folder = digits / "timm/model"
    folder.mkdir(parents=True)
    timm.models.save_for_hf(timm.create_model("test_vit", num_classes=0), folder)


@pytest.fixture
def folder(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(digits)
    monkeypatch.setenv("VS2_STORE", str(tmp_path / "store"))
    return digits


def train(*words: str, name: str = "mine") -> int:
    data = ["--dataset", "wds/digits", "--dataset_root", "digits"]
    return train_sae.main(["--model", "local-dir:tiny-clip", *data, *FEW, "--name", name, *words])


def gallery(name: str = "mine"):
    return Store.default().find(name).open_gallery()


def test_the_gallery_holds_what_the_plain_tower_gives(folder):
    assert train("--gallery_labels") == 0
    found = gallery()
    loaded = load_backbone("local-dir:tiny-clip", "")
    images = open_images(DataSet.of("wds/digits", "digits"), "train", loaded.transform, max_images=48, labels=True)
    (batch,) = images.batches(64, 0)
    site = Sites.of(loaded.model).default
    with torch.no_grad(), reading(loaded.model, [site]) as read:
        embeddings = loaded.model.encode_image(batch.images)
    assert len(found) == 48 and found.datasets == ("wds/digits",)
    assert found.activations.keys() == {BLOCK} and found.embeddings.keys() == {"clip"}
    assert found.activations[BLOCK].dtype == found.embeddings["clip"].dtype == np.float16
    assert np.allclose(found.activations[BLOCK], read[site].numpy(), rtol=2e-3, atol=2e-3)
    assert np.allclose(found.embeddings["clip"], embeddings.numpy(), rtol=2e-3, atol=2e-3)
    assert found.digests.tolist() == [image_digest(image) for image in batch.images]
    assert np.array_equal(found.labels, batch.labels)


def test_labels_are_kept_only_when_they_are_asked_for(folder):
    assert train() == 0
    assert gallery().labels is None
    assert not list(Store.default().root.rglob("labels.npy"))


def test_the_gallery_is_linked_to_the_cache_and_outlives_it(folder):
    assert train() == 0
    before = gallery().activations[BLOCK][:].copy()
    (cached,) = Store.default().cached()
    linked = Store.default().find("mine").gallery_folder / "0" / f"{BLOCK}.npy"
    assert os.path.samefile(cached / f"{BLOCK}.npy", linked)
    assert vs2.main(["store", "remove", "--cache"]) == 0
    assert not list(Store.default().cached())
    assert np.array_equal(gallery().activations[BLOCK], before)
    Store.default().find("mine").verify()
    assert train("--overwrite") == 0
    assert np.array_equal(gallery().activations[BLOCK], before)


def test_a_new_extraction_leaves_an_older_checkpoint_its_own_files(folder):
    assert train() == 0
    old = Store.default().find("mine")
    assert train("--refresh_cache", name="other") == 0
    file = f"0/{BLOCK}.npy"
    assert not os.path.samefile(old.gallery_folder / file, Store.default().find("other").gallery_folder / file)
    old.verify()


@pytest.mark.parametrize("before", [["--gallery_labels", "--retrieval_encoder", "test_vit,"], []])
def test_a_pass_sae_keeps_what_the_gallery_holds(before, folder, capsys):
    assert train("--blocks", "2", "last", *before) == 0
    old, plain = Store.default().find("mine"), gallery()
    assert train("--pass_weight", "0.8") == 0
    new, both = Store.default().find("mine"), gallery()
    assert [site.folder for site in new.sites] == [*(site.folder for site in old.sites), f"{BLOCK}.pass"]
    assert both.activations.keys() == plain.activations.keys() and both.encoders == plain.encoders
    for name, embeddings in plain.embeddings.items():
        assert np.array_equal(both.embeddings[name], embeddings)
    for site, activations in plain.activations.items():
        assert np.array_equal(both.activations[site], activations)
    assert both.labels is not None  # PASS reads them
    if before:
        assert np.array_equal(both.labels, plain.labels) and "test_vit" in both.embeddings
    new.verify()
    # And the other way round: a new plain SAE keeps the labels that PASS brought.
    assert train("--overwrite", "--seed", "1", "--max_images", "900") == 2  # other images
    assert "was trained on other data" in capsys.readouterr().err
    assert train("--blocks", "2", "last", "--overwrite") == 0
    assert np.array_equal(gallery().labels, both.labels) and gallery().encoders == both.encoders


def test_without_a_gallery_nothing_is_kept(folder):
    assert train("--no_gallery") == 0
    assert Store.default().find("mine").gallery is None
    assert not Store.default().find("mine").gallery_folder.exists()


def test_several_data_sets_make_one_gallery(folder):
    for name, shards in {"odd": (1, 3), "even": (0, 2)}.items():
        target = folder / "sets" / name / "train"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        (target / "nshards.txt").write_text("2")
        for number, shard in enumerate(shards):
            shutil.copy(folder / f"digits/train/{shard}.tar", target / f"{number}.tar")
    both = ["--dataset", "wds/odd", "wds/even", "--dataset_root", "sets/{dataset}", "--gallery_labels"]
    assert train(*both) == 0
    found = gallery()
    assert len(found) == 96 and found.datasets == ("wds/odd", "wds/even")
    assert found.labels[:48].max() < 10 <= found.labels[48:].min() and found.labels.max() < 20
    assert len(set(found.digests.tolist())) > 48


def test_another_encoder_is_extracted_once_and_said_in_the_manifest(folder, monkeypatch):
    import vs2_plugin.training.extract as module

    assert train() == 0
    original, extracted = module.extract, []
    monkeypatch.setattr(module, "extract", lambda *given, **options: extracted.append(1) or original(*given, **options))
    assert train("--retrieval_encoder", "test_vit,", "--overwrite") == 0
    assert len(extracted) == 1  # the tower's activations are there
    found = gallery()
    facts = found.encoders["test_vit"]
    assert found.embeddings["test_vit"].shape == (48, facts.width) and facts.weights == ""
    assert train("--retrieval_encoder", "test_vit,", name="other") == 0
    assert len(extracted) == 1


def test_images_that_come_to_another_encoder_in_another_order_are_refused(folder, monkeypatch, capsys):
    import vs2_plugin.training.extract as module

    original = module.extract

    def extract(encode, widths, *given, **options):
        found = original(encode, widths, *given, **options)
        return replace(found, digests=found.digests[::-1]) if "test_vit" in widths else found

    monkeypatch.setattr(module, "extract", extract)
    assert train("--retrieval_encoder", "test_vit,") == 2
    assert "gave its images in another order the second time" in capsys.readouterr().err
    assert Store.default().names() == []


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["--retrieval_encoder", "clip"], ["the CLIP embedding is always kept"]),
        (["--retrieval_encoder", "test_vit,", "--no_gallery"], ["leave out --no_gallery"]),
        (["--retrieval_encoder", "no_such_model,"], ["no_such_model", "which timm does not know"]),
        (["--retrieval_encoder", "test_vit,nowhere.pth"], ["no file 'nowhere.pth'"]),
        (["--gallery_labels", "--no_gallery"], ["--no_gallery"]),
        (["--retrieval_encoder", "local-dir:timm/model,"], ["local-dir:timm/model"]),  # no name for a file or an option
    ],
    ids=lambda value: " ".join(value),
)
def test_mistakes_end_with_one_line(words, fragments, timm_folder, folder, capsys):
    assert train(*words) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vs2-train-sae: error: ")]
    assert all(fragment in error for fragment in fragments)
    assert Store.default().names() == []
