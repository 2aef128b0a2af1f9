"""What is read of the training images, once."""

import shutil
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest

from vs2_plugin.checkpoint.store import Store
from vs2_plugin.training.extract import Part, all_labels

from ..conftest import IMAGES

NAME = "local-dir-tiny-clip_wds-digits"


def drop_labels(folder):
    for shard in (folder / "digits/train").glob("*.tar"):
        with tarfile.open(shard) as source, tarfile.open(shard.with_suffix(".new"), "w") as target:
            for member in source:
                if not member.name.endswith(".cls"):
                    target.addfile(member, source.extractfile(member))
        shard.with_suffix(".new").replace(shard)


def test_the_second_run_extracts_nothing(folder, capsys, monkeypatch, train):
    assert train() == 0
    first = Store.default().find(NAME).digest
    monkeypatch.setattr("vs2_plugin.training.extract.extract", lambda *args, **kwargs: pytest.fail("extracted again"))
    monkeypatch.setattr("vs2_plugin.data.shards.LocalShards._index", lambda *args: pytest.fail("looked for images"))
    assert train("--overwrite") == 0
    assert Store.default().find(NAME).digest == first  # and the same seed gives the same SAE


def test_the_cache_notices_other_images_and_settings(folder, monkeypatch, train):
    import vs2_plugin.training.extract as module

    (folder / "digits/train/nshards.txt").write_text("2\n")  # half of the images are enough
    original, calls = module.extract, []
    monkeypatch.setattr(module, "extract", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    assert train("--max_images", "100", "--amp") == 0
    for words in (
        [],
        ["--max_images", "100"],
        ["--cache_dtype", "float32"],
        ["--blocks", "0"],
        ["--refresh_cache"],
    ):
        assert train("--overwrite", *words) == 0
    shutil.copy(folder / "digits/train/0.tar", folder / "digits/train/1.tar")
    assert train("--overwrite") == 0
    assert len(calls) == 7


def test_labels_are_not_needed_and_not_read(folder, train):
    assert train() == 0
    labeled = Store.default().find(NAME)
    drop_labels(folder)
    (folder / "digits/classnames.txt").unlink()
    shutil.rmtree(folder / "digits/test")
    assert train("--overwrite") == 0
    assert Store.default().find(NAME).sites[0].files == labeled.sites[0].files


def test_data_sets_that_clip_benchmark_builds_are_read_through_it(folder, train):
    """ImageNet's unverified form is any folder of images: the one torchvision data set that needs no download."""
    import io

    from PIL import Image

    with tarfile.open(folder / "digits/train/0.tar") as tar:
        for index, member in enumerate(m for m in tar if m.name.endswith(".png")):
            target = folder / "images/train" / f"n{index % 3}" / member.name
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.open(io.BytesIO(tar.extractfile(member).read())).save(target)
    words = ["--dataset", "imagenet1k-unverified", "--dataset_root", "images", "--num_workers", "2"]
    assert train(*words) == 0
    assert Store.default().find("local-dir-tiny-clip_imagenet1k-unverified").data.images == IMAGES // 4
    (folder / "images/train/n1" / "broken.png").write_bytes(b"no image")
    assert train(*words, "--overwrite", "--refresh_cache") == 2


def test_an_interrupted_extraction_leaves_nothing_half_done(folder, monkeypatch, capsys, train):
    from vs2_plugin.data.images import TrainingImages

    original = TrainingImages.batches

    def interrupted(self, *args):
        yield next(original(self, *args))  # fewer than a chunk
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainingImages, "batches", interrupted)
    assert train() == 130
    assert "run the same command" in capsys.readouterr().err
    assert list(Store.default().cached()) == list(Store.default().unfinished()) == Store.default().names() == []
    monkeypatch.setattr(TrainingImages, "batches", original)
    assert train() == 0


def test_pass_without_labels_is_refused(folder, capsys, train):
    drop_labels(folder)
    assert train("--pass_weight", "0.8") == 2
    assert "has no label (0000.cls), but labels are needed" in capsys.readouterr().err


def test_no_two_data_sets_share_a_class():
    parts = [Part(None, "", SimpleNamespace(labels=np.array(labels)), {}) for labels in ([0, 2, 1], [1, 0], [0])]
    assert all_labels(parts).tolist() == [0, 2, 1, 4, 3, 5]


def test_room_is_asked_for_the_activations_and_for_the_checkpoint_after_them(folder, monkeypatch, train):
    asked = []
    monkeypatch.setattr(
        "vs2_plugin.training.extract.require_space", lambda folder, needed, what: asked.append(needed) or needed
    )
    assert train() == train("--overwrite", "--max_images", "100") == 0
    sae = Store.default().find(NAME).folder / "visual.transformer.resblocks.3/sae.safetensors"
    assert asked[1] >= 100 * (128 + 64) * 2 + sae.stat().st_size and asked[0] - asked[1] == 200 * (128 + 64) * 2
