"""The gallery's files in a checkpoint."""

import json
import os
import shutil

import numpy as np
import pytest

from vs2_plugin import arrays
from vs2_plugin.arrays import Column, Stack, trust_all
from vs2_plugin.checkpoint.checkpoint import Checkpoint, save_checkpoint
from vs2_plugin.checkpoint.manifest import MANIFEST
from vs2_plugin.checkpoint.records import SiteSAE, TrainingData
from vs2_plugin.clip.tower import Tower
from vs2_plugin.errors import CheckpointError
from vs2_plugin.gallery import files as gallery_module
from vs2_plugin.gallery.contents import GalleryContents, GalleryPart, RetrievalEncoder
from vs2_plugin.gallery.files import GalleryFiles, index_file

FIRST, LAST = "visual.transformer.resblocks.0", "visual.transformer.resblocks.11"
ENCODERS = {"clip": RetrievalEncoder(6), "test_vit": RetrievalEncoder(5, "test_vit", "", "ab")}
COUNTS = {"cifar100": 7, "cub": 4}


def columns(seed, count):
    rng = np.random.default_rng(seed)
    return {
        FIRST: rng.normal(size=(count, 8)).astype(np.float16),
        LAST: rng.normal(size=(count, 8)).astype(np.float16),
        "embedding.clip": rng.normal(size=(count, 6)).astype(np.float16),
        "embedding.test_vit": rng.normal(size=(count, 5)).astype(np.float16),
        "digests": rng.integers(2**63, 2**64, size=count, dtype=np.uint64),
        "labels": np.arange(count) % 3,
    }


@pytest.fixture
def extracted(tmp_path):
    """What was extracted of two data sets: files and numbers by data set, and what tells of their contents."""
    files, numbers, contents = {}, {}, {}
    for seed, (dataset, count) in enumerate(COUNTS.items()):
        folder = tmp_path / "activations" / dataset
        folder.mkdir(parents=True)
        numbers[dataset] = columns(seed, count)
        for name, array in numbers[dataset].items():
            column = Column(folder / f"{name}.npy", None if array.ndim == 1 else array.shape[1], array.dtype)
            column.append(array)
            contents[dataset, name] = column.complete()
        files[dataset] = {name: folder / f"{name}.npy" for name in numbers[dataset]}
    return files, numbers, contents


@pytest.fixture
def save(tmp_path, extracted, make_sae):
    """A function that saves a checkpoint with a gallery of some data sets."""

    def write(*datasets, labels=True, name="mine", gallery=True):
        files, _, contents = extracted
        parts = tuple(
            GalleryPart(
                dataset, COUNTS[dataset], 3 if labels else None,
                contents={key: contents[dataset, key] for key in files[dataset] if labels or key != "labels"},
            )
            for dataset in datasets
        )  # fmt: skip
        contents = GalleryContents(parts, (FIRST, LAST), ENCODERS, labels)
        linked = [
            {key: path for key, path in files[dataset].items() if labels or key != "labels"} for dataset in datasets
        ]
        facts = [SiteSAE(site, "plain", "none", 8, [0.0] * 8, 0.1, {"0.5": 0.1}, {}, {}) for site in (FIRST, LAST)]
        return save_checkpoint(
            tmp_path / name,
            backbone="ViT-B-32",
            pretrained="openai",
            tower=Tower("ab" * 32, ["GELU"], {}),
            data=TrainingData(datasets, 7),
            saes=[(site, make_sae(8, 32, 4)) for site in facts],
            created={},
            gallery=GalleryFiles(contents, linked) if gallery else None,
        )

    return write


def file_in(checkpoint, name, part=0):
    return checkpoint.gallery_folder / str(part) / f"{name}.npy"


# ---- what comes back


def test_a_gallery_comes_back_as_it_was_extracted(save, extracted):
    numbers = extracted[1]["cifar100"]
    found = Checkpoint.load(save("cifar100").folder).open_gallery()
    assert len(found) == 7 and found.datasets == ("cifar100",) and found.encoders == ENCODERS
    assert found.activations.keys() == {FIRST, LAST} and found.embeddings.keys() == {"clip", "test_vit"}
    for site in (FIRST, LAST):
        assert np.array_equal(found.activations[site], numbers[site])
    for name in ENCODERS:
        assert np.array_equal(found.embeddings[name], numbers[f"embedding.{name}"])
    assert np.array_equal(found.digests, numbers["digests"]) and np.array_equal(found.labels, numbers["labels"])


def test_large_arrays_stay_on_disk(save):
    found = save("cifar100").open_gallery()
    assert all(isinstance(array, np.memmap) for array in (*found.activations.values(), *found.embeddings.values()))
    several = save("cifar100", "cub", name="both").open_gallery()
    assert all(isinstance(array, Stack) for array in (*several.activations.values(), *several.embeddings.values()))


def test_several_data_sets_stand_in_their_order_and_share_no_class(save, extracted):
    one, other = (extracted[1][dataset] for dataset in COUNTS)
    found = save("cifar100", "cub").open_gallery()
    assert len(found) == 11 and found.datasets == ("cifar100", "cub")
    assert np.array_equal(found.activations[LAST][:], np.concatenate([one[LAST], other[LAST]]))
    assert np.array_equal(found.digests, np.concatenate([one["digests"], other["digests"]]))
    assert found.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 3, 4, 5, 3]
    turned = save("cub", "cifar100", name="turned").open_gallery()
    assert turned.labels.tolist() == [0, 1, 2, 0, 3, 4, 5, 3, 4, 5, 3]


def test_without_labels_there_are_none(save):
    checkpoint = save("cifar100", labels=False)
    assert checkpoint.open_gallery().labels is None and not file_in(checkpoint, "labels").exists()


def test_the_digest_changes_with_the_gallery(save):
    digests = {
        save("cifar100", name="a").digest,
        save("cifar100", name="b", labels=False).digest,
        save("cub", name="c").digest,
        save("cifar100", name="d", gallery=False).digest,
    }
    assert len(digests) == 4 and save("cifar100", name="e").digest in digests


# ---- the files


def test_files_are_links_that_outlive_the_cache(save, extracted):
    files, numbers, _ = extracted
    checkpoint = save("cifar100", "cub")
    for part, dataset in enumerate(COUNTS):
        for name, source in files[dataset].items():
            assert os.path.samefile(source, file_in(checkpoint, name, part))
    shutil.rmtree(files["cub"][LAST].parent.parent)
    found = checkpoint.open_gallery()
    assert np.array_equal(found.activations[LAST][7:], numbers["cub"][LAST])
    checkpoint.verify()


def test_where_links_cannot_be_made_files_are_copied(save, extracted, monkeypatch):
    def no_links(source, target):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(gallery_module.os, "link", no_links)
    checkpoint = save("cifar100")
    for name, source in extracted[0]["cifar100"].items():
        copy = file_in(checkpoint, name)
        assert copy.read_bytes() == source.read_bytes() and not os.path.samefile(source, copy)
    checkpoint.verify()


def test_the_gallery_takes_no_room_of_its_own(save):
    checkpoint = save("cifar100")
    assert all(path.stat().st_nlink == 2 for path in (checkpoint.gallery_folder / "0").glob("*.npy*"))


def test_an_index_lies_in_the_gallery(save):
    checkpoint = save("cifar100")
    assert index_file(checkpoint.gallery_folder, "test_vit").parent == checkpoint.gallery_folder
    assert index_file(checkpoint.gallery_folder, "test_vit") != index_file(checkpoint.gallery_folder, "clip")


def test_sparsify_loads_all_saes_of_a_checkpoint_with_a_gallery(sparsify, save):
    checkpoint = save("cifar100")
    (checkpoint.gallery_folder / "auto").mkdir()
    found = sparsify.SparseCoder.load_many(checkpoint.folder, local=True)
    assert {name: sae.cfg.k for name, sae in found.items()} == {FIRST: 4, LAST: 4}


# ---- damage


def remove(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def clear(path):
    path.write_bytes(b"")


def garbage(path):
    path.write_bytes(b"garbage")


def pickled(path):
    np.save(path, np.array([{}, {}], dtype=object))


def fewer(path):
    np.save(path, np.load(path)[:-1])


def flat(path):
    np.save(path, np.load(path).reshape(-1)[:7][None, None])


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def swap(path):
    np.save(path, np.load(path)[::-1])


FILES = [FIRST, "embedding.clip", "embedding.test_vit", "digests", "labels"]


@pytest.mark.parametrize("damage", [remove, cut, clear, garbage, pickled, fewer, flat, flip, swap])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_in_one_sentence(name, damage, save):
    checkpoint = save("cifar100", "cub")
    path = file_in(checkpoint, name, part=1)
    replaced = path.read_bytes()
    path.unlink()  # not the cache's file, which it is linked to
    path.write_bytes(replaced)
    damage(path)
    for read in (checkpoint.open_gallery, checkpoint.verify):
        with pytest.raises(CheckpointError) as error:
            read()
        assert f"gallery is damaged: {path}" in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("label", [-5, 3, 9999999999])
def test_labels_of_no_class_are_damage(label, save, extracted):
    """Checkpoints of before labels were checked where they are read may hold some."""
    labels = np.load(extracted[0]["cub"]["labels"])
    labels[1] = label
    np.save(extracted[0]["cub"]["labels"], labels)
    with pytest.raises(CheckpointError, match=rf"1/labels\.npy holds labels from .*{label}.*, for 3 classes"):
        save("cifar100", "cub").open_gallery()


# ---- what is asked of it


def test_what_is_there_is_given(save):
    checkpoint = save("cifar100", "cub")
    assert checkpoint.require_gallery(labels=True, encoder="test_vit", n=11) == checkpoint.gallery
    assert checkpoint.gallery.encoders["test_vit"].width == 5


LACKING = [
    ({"gallery": False}, {}, "has no gallery of training images; train the checkpoint again with the same"),
    ({"labels": False}, {"labels": True}, "keeps no training labels, which an oracle needs; .* --gallery_labels"),
    (
        {},
        {"encoder": "resnet10t"},
        r"has no embeddings by 'resnet10t' \(available: clip, test_vit\); .* --retrieval_encoder resnet10t",
    ),
    ({}, {"n": 12}, "n is 12, but the gallery of checkpoint 'mine' holds 11 images"),
]


@pytest.mark.parametrize(("has", "asked", "sentence"), LACKING)
def test_what_is_lacking_is_named_with_what_mends_it(has, asked, sentence, save):
    checkpoint = save("cifar100", "cub", **has)
    with pytest.raises(CheckpointError, match=sentence):
        checkpoint.require_gallery(**asked)


def test_a_checkpoint_of_before_galleries_is_still_read(save):
    checkpoint = save("cifar100", gallery=False)
    manifest = json.loads((checkpoint.folder / MANIFEST).read_text())
    assert "gallery" not in manifest and checkpoint.gallery is None
    checkpoint.verify()
    with pytest.raises(CheckpointError, match="has no gallery"):
        checkpoint.open_gallery()


def test_a_whole_gallery_is_read_once_and_not_at_every_load(save, monkeypatch):
    """What is linked was compared when the cache was opened; a copy is compared when it is first opened."""
    read = []
    stock = arrays.check
    monkeypatch.setattr(arrays, "check", lambda path, *args: read.append(path.stem) or stock(path, *args))
    checkpoint = save("cifar100")
    checkpoint.open_gallery()
    assert read == []
    shutil.copytree(checkpoint.folder, checkpoint.folder.with_name("copy"))
    copied = Checkpoint.load(checkpoint.folder.with_name("copy"))
    copied.open_gallery()
    assert sorted(read) == sorted([FIRST, LAST, "embedding.clip", "embedding.test_vit", "digests", "labels"])
    copied.open_gallery()
    assert len(read) == 6
    copied.verify()
    assert len(read) == 12


def test_the_doctor_reads_everything_whatever_is_remembered(save):
    checkpoint = save("cifar100")
    path = file_in(checkpoint, "embedding.clip")
    checkpoint.open_gallery()
    flip(path)
    content = checkpoint.gallery.parts[0].contents["embedding.clip"]
    trust_all(path.parent, {path.name: content})  # as a disk that fails, and says nothing
    checkpoint.open_gallery()
    with pytest.raises(CheckpointError, match=r"embedding\.clip\.npy: its rows 0 to 6 are not those that were written"):
        checkpoint.verify()


def test_a_gallery_of_before_contents_were_told_is_still_read(save):
    checkpoint = save("cifar100")
    facts = json.loads((checkpoint.folder / MANIFEST).read_text())
    for part in facts["gallery"]["parts"]:
        part["extraction"] = part.pop("contents")["digests"]
    del facts["digest"]
    (checkpoint.folder / MANIFEST).write_text(json.dumps(facts))
    for file in (checkpoint.gallery_folder / "0").glob("*.sha256"):
        file.unlink()
    old = Checkpoint.load(checkpoint.folder)
    assert old.gallery.parts[0].contents is None and len(old.open_gallery()) == 7
    old.verify()


HEADERS = [(b"<u8", b",u8"), (b"<u8", b"|O8"), (b"(7,)", b"(9" + b"0" * 14 + b",)"), (b"(7,)", b"(-7,)"), (b"}", b"{")]


@pytest.mark.parametrize("change", HEADERS)
def test_a_damaged_header_of_before_contents_were_told_is_damage(change, save):
    """Whatever numpy makes of it: a syntax error, or petabytes."""
    checkpoint = save("cifar100")
    facts = json.loads((checkpoint.folder / MANIFEST).read_text())
    del facts["digest"], facts["gallery"]["parts"][0]["contents"]
    (checkpoint.folder / MANIFEST).write_text(json.dumps(facts))
    path = file_in(checkpoint, "digests")
    raw = path.read_bytes()
    head = raw[10:128].replace(*change).strip().ljust(117) + b"\n"
    path.unlink()
    path.write_bytes(raw[:10] + head + raw[128:])
    with pytest.raises(CheckpointError, match=r"gallery is damaged: .*digests\.npy"):
        Checkpoint.load(checkpoint.folder).open_gallery()
