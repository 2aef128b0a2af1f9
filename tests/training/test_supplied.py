"""Training from Python: images and activations at hand, in place of a data set."""

import json
import shlex

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import vs2_plugin
from vs2_plugin.checkpoint.store import Store
from vs2_plugin.cli import train_sae
from vs2_plugin.clip.backbone import load_backbone
from vs2_plugin.clip.edits import reading
from vs2_plugin.errors import CheckpointError, DataError, ModelStringError, SettingError, TowerError

TINY = "local-dir:tiny-clip"
BLOCK = "visual.transformer.resblocks.3"
QUICK = {"model": TINY, "pretrained": "", "samples": 300, "amp": False, "quiet": True}


@pytest.fixture(scope="module")
def images():
    pixels = np.random.default_rng(0).integers(0, 256, (24, 8, 8), dtype=np.uint8)
    return [Image.fromarray(one) for one in pixels]


@pytest.fixture
def activations(folder, images):
    """Those of the images after the last block ``[24, 128]``."""
    loaded = load_backbone(TINY, "", None, "cpu")
    site = loaded.sites.default
    with torch.no_grad(), reading(loaded.model, [site]) as found:
        loaded.model.encode_image(torch.stack([loaded.transform(image) for image in images]))
    return found[site]


def weights(checkpoint):
    return load_file(checkpoint.folder / BLOCK / "sae.safetensors")


def same(one, other):
    return all(torch.equal(weights(one)[name], weight) for name, weight in weights(other).items())


def test_two_sources_are_refused(images):
    for source in (images, np.eye(8, dtype=np.float32)):
        with pytest.raises(SettingError, match="both a source and activations=FILE; expected one of the two"):
            vs2_plugin.train(source, activations="nowhere.npy", quiet=True)


def test_what_is_there_already_is_told_in_words_of_python(tmp_path):
    rows = np.random.default_rng(0).normal(size=(50, 8))
    vs2_plugin.train(rows, k=2, samples=100, quiet=True, store=tmp_path)
    with pytest.raises(DataError) as error:
        vs2_plugin.train(rows, k=3, samples=100, quiet=True, store=tmp_path)
    told = "already exists; replace it with overwrite=True, or give another name, such as name='activations-2'"
    assert str(error.value).endswith(told)


def test_images_from_python_become_a_checkpoint_that_load_takes(folder, images, caplog):
    checkpoint = vs2_plugin.train(images, **QUICK)
    checkpoint.verify()
    assert checkpoint.name == "local-dir-tiny-clip_images" and "command" not in checkpoint.created
    assert checkpoint.data.splits == ("given",) and checkpoint.gallery.count == len(images)
    for model in (f"vs2:{TINY}", f"vs2:{TINY}@alpha=1"):
        steered, *_ = vs2_plugin.load(model, checkpoint=checkpoint)
        assert steered.checkpoint == checkpoint and "@local-dir-tiny-clip_images" in str(steered.spec)
        assert vs2_plugin.load(model, checkpoint=checkpoint.name)[0].checkpoint == checkpoint
        assert vs2_plugin.load(model, checkpoint=checkpoint.folder)[0].checkpoint == checkpoint
    with pytest.raises(ModelStringError, match="names a checkpoint; leave it out there, or leave out checkpoint="):
        vs2_plugin.load(f"vs2:{TINY}@other", checkpoint=checkpoint)


def test_a_list_is_encoded_once_and_a_generator_each_time(folder, images, monkeypatch):
    kept = vs2_plugin.train(images, **QUICK)
    assert len(list(Store.default().cached())) == 1
    once = vs2_plugin.train((image for image in images), name="once", **QUICK)
    assert len(list(Store.default().cached())) == 1  # nothing is left of it but the gallery
    once.verify()
    assert same(kept, once)
    assert kept.gallery.parts[0].contents == once.gallery.parts[0].contents
    monkeypatch.setattr("vs2_plugin.training.extract.extract", lambda *args, **kwargs: pytest.fail("encoded again"))
    assert same(vs2_plugin.train([image.copy() for image in images], name="again", **QUICK), kept)
    with pytest.raises(pytest.fail.Exception, match="encoded again"):
        vs2_plugin.train(images[1:], name="others", **QUICK)


def test_activations_give_the_sae_that_their_images_give(folder, images, activations, tmp_path):
    by_images = vs2_plugin.train(images, **QUICK, cache_dtype="float32")
    np.save("x.npy", activations.numpy())
    by_file = vs2_plugin.train(activations="x.npy", **QUICK, name="file")
    for checkpoint in (vs2_plugin.train(activations, **QUICK), by_file):
        checkpoint.verify()
        assert same(checkpoint, by_images) and checkpoint.tower == by_images.tower and checkpoint.gallery is None
        assert vs2_plugin.load(f"vs2:{TINY}", checkpoint=checkpoint)[0].checkpoint == checkpoint
        with pytest.raises(CheckpointError, match="has no gallery of training images; train one on images"):
            vs2_plugin.load(f"vs2s:{TINY}", checkpoint=checkpoint)
    words = shlex.split(by_file.created["command"])
    assert train_sae.main([*words[1:], "--overwrite"]) == 0
    assert Store.default().find("file").digest == by_file.digest


def test_a_place_needs_a_tower(activations):
    with pytest.raises(SettingError, match="--blocks 3 is a place in a tower; name that with --model, or omit"):
        vs2_plugin.train(activations, blocks=3, samples=100, quiet=True)


def test_without_a_model_an_sae_steers_none(activations, capsys):
    np.save("x.npy", activations.numpy())
    checkpoint = vs2_plugin.train(activations.numpy(), samples=300, quiet=True)
    checkpoint.verify()
    assert (checkpoint.name, checkpoint.model, checkpoint.tower) == ("activations", "no CLIP", None)
    assert [site.hookpoint for site in checkpoint.sites] == ["activations"]
    assert json.loads((checkpoint.folder / "vs2.json").read_text())["tower"] is None
    with pytest.raises(
        CheckpointError, match=f"cannot steer one; train it again with --model {TINY} and its --pretrained"
    ):
        vs2_plugin.load(f"vs2:{TINY}", checkpoint=checkpoint)
    assert train_sae.main(["--activations", "x.npy", "--samples", "300", "--name", "file"]) == 0
    said = capsys.readouterr().out
    assert "24 activations of width 128; without images, there is no gallery" in said and "evaluate" not in said
    assert Store.default().find("file").digest == checkpoint.digest


def test_the_output_embedding_is_a_place_too(folder):
    checkpoint = vs2_plugin.train(np.random.default_rng(0).normal(size=(24, 64)), blocks="output", **QUICK)
    assert [site.hookpoint for site in checkpoint.sites] == ["visual"]


@pytest.mark.parametrize("settings, error, problem", [
    ({"blocks": (1, 2)}, SettingError, "--blocks 1 2: activations come from one place; expected one"),
    ({"blocks": 7}, SettingError, "block numbers from 0 to 3"),
    ({"blocks": "output"}, DataError, "have width 128, but the output embedding of .* has 64; block 3 would fit"),
    ({"pass_weight": 0.8}, SettingError, "--pass_weight is for images and labels, but there are only activations"),
    ({"max_images": 3}, SettingError, "--max_images is for images"),
    ({"dataset": ("a", "b")}, SettingError, "--dataset a b: expected one name for what is given"),
    ({"model": "ViT-B32"}, TowerError, "open_clip has no model 'ViT-B32'"),
])  # fmt: skip
def test_settings_that_activations_do_not_go_with_are_refused(activations, settings, error, problem):
    with pytest.raises(error, match=problem):
        vs2_plugin.train(activations, **{**QUICK, **settings})


@pytest.mark.parametrize("source, error, problem", [
    ((), SettingError, "--dataset is missing: name the images to train on, or --activations FILE"),
    (([],), DataError, "there are no images"),
    ((iter([]),), DataError, "there are no training images"),
    ((3,), DataError, r"train\(\) got 3; expected the name of a data set, a folder, images in a list"),
    (({"x": 1},), DataError, r"train\(\) got \{'x': 1\}"),
    ((["a.jpg", "b.jpg"],), DataError, "'a.jpg'"),
    ((np.zeros(5),), DataError, r"of shape \[5\]"),
    (([[0.5, 1], [1, 2]],), DataError, r"a list of numbers; expected activations as an array"),
    (([0.5, 1],), DataError, r"a list of numbers; expected activations as an array"),
])  # fmt: skip
def test_what_nothing_can_be_trained_on_is_refused(folder, source, error, problem):
    with pytest.raises(error, match=problem):
        vs2_plugin.train(*source, **QUICK)


def test_a_file_in_the_home_of_an_unknown_user_is_a_data_error(folder):
    with pytest.raises(DataError, match="'~nobody-of-that-name/x.npy' cannot be read: No such file"):
        vs2_plugin.train(activations="~nobody-of-that-name/x.npy", quiet=True)


def test_a_generator_cannot_be_read_twice(folder, images):
    with pytest.raises(SettingError, match="a generator gives them once; give a list"):
        vs2_plugin.train(iter(images), retrieval_encoder="resnet10t,", **QUICK)
