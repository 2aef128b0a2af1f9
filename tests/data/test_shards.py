import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vs2_plugin.data.images import open_images
from vs2_plugin.data.labels import CLASS_NAMES
from vs2_plugin.data.naming import DataSet
from vs2_plugin.data.shards import LocalShards, RemoteShards, beside, open_shards, remote_shards
from vs2_plugin.errors import DataError


def grey(image):
    """A transform: the image's grey value as an array ``[1]``."""
    import torch

    assert image.mode == "RGB"
    return torch.tensor([np.asarray(image)[0, 0, 0]])


def greys(dataset):
    return [item.item() for item in dataset]


@pytest.fixture
def shards(tmp_path, write_shards):
    """A function that writes the shards of the split ``train`` and returns their root."""

    def write(*members, **options):
        write_shards(tmp_path / "train", members, **options)
        return str(tmp_path)

    return write


def test_images_come_in_the_order_of_the_shards(shards, picture):
    root = shards({"a.png": picture(1), "b.png": picture(2)}, {}, {"c.png": picture(3)})
    found = open_shards(root, "train", grey)
    assert isinstance(found, LocalShards)
    assert len(found) == 3
    assert greys(found[index] for index in range(3)) == [1, 2, 3]
    assert greys([found[2], found[0]]) == [3, 1]


def test_shards_beyond_the_number_that_is_written_are_named(shards, picture, caplog):
    root = Path(shards({"a.png": picture(1)}, {"b.png": picture(2)}))
    assert len(open_shards(str(root), "train", grey)) == 2 and not caplog.messages
    (root / "train" / "nshards.txt").write_text("1")
    assert len(open_shards(str(root), "train", grey)) == 1
    (told,) = caplog.messages
    assert "nshards.txt says 1 shard(s), and 2 are there: the others are not read; to read them: echo 2 > " in told


def test_what_is_not_an_image_is_never_read(shards, picture):
    root = shards(
        {
            "a.cls": b"\xff\xfe not a number",
            "a.png": picture(1),
            "a.json": b"{",
            "a.txt": b"\xff",
            "readme": b"",
            "b.png": picture(2),
        }
    )
    assert greys(map(open_shards(root, "train", grey).__getitem__, range(2))) == [1, 2]


IMAGE_NAMES = [
    # members (their format, by name), the grey values that are read
    (["a.png", "a.jpg"], [10]),  # clip_benchmark prefers png
    (["a.jpg", "a.png"], [20]),
    (["a.jpeg", "a.jpg", "a.png", "a.webp"], [40]),
    (["a.PNG", "b.Jpg"], [10, 20]),
    (["x/a.png", "y/a.png"], [10, 20]),
    (["./a.png", "./b.png"], [10, 20]),
    (["v1.0/a.png"], [10]),
    (["a.seg.png", "b.png"], [20]),  # webdataset's extension is all after the first dot
    (["a.gif", "b.png"], [20]),
]


@pytest.mark.parametrize(("names", "values"), IMAGE_NAMES, ids=[" ".join(row[0]) for row in IMAGE_NAMES])
def test_one_image_per_sample_is_chosen_as_clip_benchmark_chooses(names, values, shards):
    members = {}
    for number, name in enumerate(names, 1):
        file = io.BytesIO()
        extension = name.rpartition(".")[2].lower()
        Image.new("RGB", (8, 8), (10 * number,) * 3).save(
            file, {"jpg": "jpeg"}.get(extension, extension), lossless=True
        )
        members[name] = file.getvalue()
    found = open_shards(shards(members), "train", grey)
    assert greys(found[index] for index in range(len(found))) == values


def test_images_of_any_mode_reach_the_transform_as_rgb(shards):
    members = {}
    for mode in ("L", "1", "P", "RGBA", "CMYK"):
        file = io.BytesIO()
        Image.new(mode, (8, 8)).save(file, "jpeg" if mode == "CMYK" else "png")
        members[f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}"] = file.getvalue()
    found = open_shards(shards(members), "train", grey)
    assert len([found[index] for index in range(len(found))]) == 5


def test_more_workers_than_shards_read_every_image_once(shards, picture):
    root = shards({f"{i}.png": picture(i) for i in range(7)})
    images = open_images(DataSet.of("wds/x", root), "train", grey)
    assert greys(row for batch in images.batches(3, num_workers=2) for row in batch.images) == list(range(7))


def test_the_fingerprint_changes_when_a_shard_does(shards, picture):
    root = shards({"a.png": picture(1)}, {"b.png": picture(2)})
    before = open_shards(root, "train", grey).fingerprint()
    assert open_shards(root, "train", grey).fingerprint() == before
    shards({"a.png": picture(1)}, {"b.png": picture(2), "c.png": picture(3)})
    assert open_shards(root, "train", grey).fingerprint() != before


def test_shards_are_indexed_when_an_image_is_wanted_and_once(shards, picture, monkeypatch, tmp_path):
    def index(file):
        with open(tmp_path / "indexed", "a") as log:  # by whichever process
            log.write(f"{file.stem}\n")
        return original(file)

    original = LocalShards._index
    monkeypatch.setattr(LocalShards, "_index", staticmethod(index))
    root = shards({"a.png": picture(1)}, {"b.png": picture(2)})
    images = open_images(DataSet.of("wds/x", root), "train", grey)
    assert images.fingerprint == open_shards(root, "train", grey).fingerprint()
    assert not (tmp_path / "indexed").exists()
    assert greys(row for batch in images.batches(1, num_workers=2) for row in batch.images) == [1, 2]
    assert images.count == 2
    assert (tmp_path / "indexed").read_text() == "0\n1\n"


# ---- damage


def no_listing(folder):
    (folder / "nshards.txt").unlink()


def wordy_listing(folder):
    (folder / "nshards.txt").write_text("many")


def binary_listing(folder):
    (folder / "nshards.txt").write_bytes(b"\xff\xfe")


def zero_shards(folder):
    (folder / "nshards.txt").write_text("0")


def negative_shards(folder):
    (folder / "nshards.txt").write_text("-2")


def too_many_shards(folder):
    (folder / "nshards.txt").write_text("1000000")


def far_too_many_shards(folder):
    (folder / "nshards.txt").write_text("100000000")


def one_shard_too_few(folder):
    (folder / "1.tar").unlink()


def empty_file(folder):
    (folder / "1.tar").write_bytes(b"")


def no_tar(folder):
    (folder / "1.tar").write_bytes(b"<html>404</html>" * 100)


def cut_in_an_image(folder):
    whole = (folder / "1.tar").read_bytes()
    (folder / "1.tar").write_bytes(whole[:550])


DAMAGE = [
    (
        no_listing,
        "no readable file {folder}/nshards.txt (No such file or directory); expected the number of shards: "
        "echo 2 > {folder}/nshards.txt",
    ),
    (wordy_listing, "{folder}/nshards.txt holds 'many'; expected the number of shards, from 1 to 1,000,000"),
    (binary_listing, "{folder}/nshards.txt holds '\ufffd\ufffd'; expected the number of shards"),
    (zero_shards, "{folder}/nshards.txt holds '0'; expected the number of shards"),
    (negative_shards, "{folder}/nshards.txt holds '-2'; expected the number of shards"),
    (far_too_many_shards, "{folder}/nshards.txt holds '100000000'; expected the number of shards"),
    (too_many_shards, "{folder}/2.tar: no such file, and {folder}/nshards.txt says 1,000,000 shards; write it, or: "
                      "echo 2 > {folder}/nshards.txt"),
    (one_shard_too_few, "cannot read shard {folder}/1.tar"),
    (empty_file, "cannot read shard {folder}/1.tar"),
    (no_tar, "cannot read shard {folder}/1.tar"),
    (cut_in_an_image, "cannot read shard {folder}/1.tar"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damaged_shards_are_named(damage, message, shards, picture):
    root = shards({"a.png": picture(1)}, {"b.png": picture(2)})
    folder = Path(root) / "train"
    damage(folder)
    with pytest.raises(DataError) as error:
        next(open_images(DataSet.of("wds/x", root), "train", grey).batches(2, 0))
    assert message.format(folder=folder) in str(error.value)


def test_a_split_that_is_not_there_is_named(shards, picture):
    root = shards({"a.png": picture(1)})
    with pytest.raises(DataError, match=r"no readable file .*valid/nshards\.txt .*the splits in .*: train\)"):
        open_shards(root, "valid", grey)


def test_a_plain_folder_of_pictures_is_told_from_shards(tmp_path, picture):
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "1.PNG").write_bytes(picture(1))
    with pytest.raises(DataError, match=r"nshards\.txt .*expected webdataset shards .* holds plain images"):
        open_shards(str(tmp_path), "test", grey)


def test_shards_without_images_are_refused(shards):
    with pytest.raises(DataError, match=r"no images \(webp, png, jpg, jpeg\) in the 2 shards beside .*0\.tar"):
        len(open_shards(shards({"a.cls": b"1"}, {"b.gif": b"GIF89a"}), "train", grey))


def test_a_damaged_header_between_images_is_noticed(shards, picture):
    root = shards({f"{i}.png": picture(i) for i in range(3)})
    file = Path(root) / "train" / "0.tar"
    whole = bytearray(file.read_bytes())
    whole[1024:1536] = b"\x07" * 512  # the header of the second image
    file.write_bytes(whole)
    try:
        assert len(open_shards(root, "train", grey)) == 3
    except DataError:
        pass


COMPRESSED = "compressed shards, which clip_benchmark reads, are indexed by offsets into the uncompressed stream"


def test_a_compressed_shard_is_refused_with_what_is_expected(shards, picture):
    root = shards({"a.png": picture(1)}, mode="w:gz")
    with pytest.raises(DataError, match="expected an uncompressed tar file"):
        len(open_shards(root, "train", grey))


def test_a_cut_compressed_shard_is_named(shards, picture):
    root = shards({"a.png": picture(1)}, mode="w:gz")
    file = Path(root) / "train" / "0.tar"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(DataError, match=r"0\.tar"):
        len(open_shards(root, "train", grey))


def test_an_image_takes_few_bytes_of_every_process(shards, picture):
    """A million images and four loader processes must not fill the memory."""
    labeled = {
        f"{number:04d}{suffix}": data for number in range(500) for suffix, data in ((".png", b"x"), (".cls", b"1"))
    }
    found = open_shards(shards(labeled, labeled), "train", grey, labels=True)
    assert len(found) == 1000
    assert len(pickle.dumps(found.samples)) < 1000 * 33


@pytest.mark.parametrize("data", [b"", b"not an image", b"\x89PNG\r\n\x1a\n"], ids=["empty", "text", "header only"])
def test_a_damaged_image_is_named_with_its_shard(data, shards, picture):
    found = open_shards(shards({"a.png": picture(1)}, {"b.png": data}), "train", grey)
    assert greys([found[0]]) == [1]
    with pytest.raises(DataError, match=r"train/1\.tar: b\.png is not a readable image"):
        found[1]


def test_a_cut_image_is_named(shards):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype="uint8")).save(file, "png")
    found = open_shards(shards({"b.png": file.getvalue()[:500]}), "train", grey)
    with pytest.raises(DataError, match=r"train/0\.tar: b\.png is not a readable image"):
        found[0]


# ---- labels


def labelled(picture, *labels):
    """A shard of images, each with what its ``.cls`` file holds."""
    pairs = ((f"{number}.png", picture(number), f"{number}.cls", label) for number, label in enumerate(labels))
    return {name: data for image, pixels, cls, label in pairs for name, data in ((image, pixels), (cls, label))}


def labels_of(root, num_workers=0):
    images = open_images(DataSet.of("wds/x", root), "train", grey, labels=True)
    return [label for batch in images.batches(2, num_workers) for label in batch.labels.tolist()]


WRONG_LABELS = [
    # classes that are named, the label, what is expected
    (None, b"-5", "the label is -5; expected a class number from 0 to 999999 (no file names the classes)"),
    (None, b"9999999999", "the label is 9999999999; expected a class number from 0 to 999999"),
    (None, b"1" * 10_000, f"the label is {'1' * 64}; expected a class number"),
    (None, b"1000000", "the label is 1000000; expected"),
    (10, b"99", "the label is 99; expected a class number from 0 to 9 ({root}/classnames.txt names 10 classes)"),
    (10, b"10", "the label is 10; expected a class number from 0 to 9"),
    (10, b"-1", "the label is -1; expected a class number from 0 to 9"),
    (10, b"cat", "holds b'cat'; expected the number of a class"),
]


@pytest.mark.parametrize("remote", [False, True], ids=["local", "remote"])
@pytest.mark.parametrize(("classes", "label", "expected"), WRONG_LABELS, ids=[str(row[1][:12]) for row in WRONG_LABELS])
def test_a_label_of_no_class_is_named_with_its_shard_and_key(
    remote, classes, label, expected, shards, picture, tmp_path, request
):
    root = shards(labelled(picture, b"0"), labelled(picture, b" 1\n", label))
    if classes:
        (tmp_path / "classnames.txt").write_text("".join(f"class {number}\n" for number in range(classes)))
    if remote:
        root = request.getfixturevalue("serve")
    with pytest.raises(DataError) as error:
        labels_of(root)
    assert f"{root}/train/1.tar: 1.cls" in str(error.value) and expected.format(root=root) in str(error.value)


@pytest.mark.parametrize("remote", [False, True], ids=["local", "remote"])
def test_labels_of_classes_are_read(remote, shards, picture, tmp_path, request):
    root = shards(labelled(picture, b"9", b" 0\n"), labelled(picture, b"3"))
    (tmp_path / "classnames.txt").write_text("x\n" * 10)
    assert labels_of(request.getfixturevalue("serve") if remote else root) == [9, 0, 3]
    (tmp_path / "classnames.txt").unlink()
    assert labels_of(request.getfixturevalue("serve") if remote else root) == [9, 0, 3]


@pytest.mark.parametrize("names", ["", None], ids=["empty", "a folder"])
def test_class_names_that_name_none_are_refused(names, shards, picture, tmp_path):
    root = shards(labelled(picture, b"0"))
    if names is None:
        (tmp_path / "classnames.txt").mkdir()
    else:
        (tmp_path / "classnames.txt").write_text(names)
    with pytest.raises(DataError, match=r"classnames\.txt .*expected one class name per line"):
        labels_of(root)
    assert open_shards(root, "train", grey)[0].item() == 0  # without labels, it is never looked at


# ---- behind a URL


def read_all(images, num_workers=0):
    return greys(row for batch in images.batches(2, num_workers) for row in batch.images)


@pytest.mark.parametrize("num_workers", [0, 3])
def test_remote_shards_are_streamed_once_and_in_order(num_workers, serve, shards, picture):
    shards(
        {"a.png": picture(1), "b.jpg": picture(2, "jpeg")}, {"c.png": picture(3)}, {"d.png": picture(4), "d.cls": b"7"}
    )
    images = open_images(DataSet.of("wds/x", serve), "train", grey)
    assert isinstance(images.source, RemoteShards)
    assert images.count is None
    assert images.fingerprint == [[f"{serve}/train/{index}.tar" for index in range(3)], None]
    assert read_all(images, num_workers) == [1, 2, 3, 4]


def test_a_stream_is_cut_at_max_images(serve, shards, picture):
    shards({f"{i}.png": picture(i) for i in range(5)})
    assert read_all(open_images(DataSet.of("wds/x", serve), "train", grey, max_images=3)) == [0, 1, 2]


def test_the_first_of_several_images_is_streamed_as_clip_benchmark_does(serve, shards, picture):
    shards({"a.jpg": picture(1, "jpeg"), "a.png": picture(2)})
    assert read_all(open_images(DataSet.of("wds/x", serve), "train", grey)) == [2]


@pytest.mark.parametrize("members", [{"a.cls": b"garbage"}, {"a.json": b"{"}, {"a.txt": b"\xff"}], ids=str)
def test_labels_of_remote_shards_are_never_read(members, serve, shards, picture):
    shards({"a.png": picture(1), **members})
    assert read_all(open_images(DataSet.of("wds/x", serve), "train", grey)) == [1]


def test_remote_shards_are_kept_in_the_cache_folder_asked_for(serve, shards, picture, tmp_path):
    shards({"a.png": picture(1)})
    (tmp_path / "cache").mkdir()
    images = open_images(DataSet.of("wds/x", serve), "train", grey, wds_cache_dir=str(tmp_path / "cache"))
    assert read_all(images) == [1]
    assert list((tmp_path / "cache").rglob("*.tar"))


def test_a_missing_listing_behind_a_url_is_named(serve, shards, picture):
    shards({"a.png": picture(1)})
    with pytest.raises(DataError, match="cannot read http://127.0.0.1:.*/valid/nshards.txt .*404"):
        open_images(DataSet.of("wds/x", serve), "valid", grey)


def test_a_listing_that_is_no_number_behind_a_url_is_named(serve, shards, picture, tmp_path):
    shards({"a.png": picture(1)})
    (tmp_path / "train" / "nshards.txt").write_text("<html>")
    with pytest.raises(DataError, match="http://127.0.0.1:.*/train/nshards.txt holds '<html>'"):
        open_images(DataSet.of("wds/x", serve), "train", grey)


# Which of the two notices the missing shard first, curl's exit code or tarfile, differs from run to run.
def test_a_missing_shard_behind_a_url_is_named(serve, shards, picture, tmp_path):
    shards({"a.png": picture(1)}, {"b.png": picture(2)})
    (tmp_path / "train" / "1.tar").unlink()
    with pytest.raises(DataError, match=r"cannot read the shard http://127.0.0.1:\d+/train/1.tar: .*Error: [^<]+$"):
        read_all(open_images(DataSet.of("wds/x", serve), "train", grey))


def test_hugging_face_addresses_are_split_into_raw_and_resolve(monkeypatch):
    import requests

    asked = []

    def get(url, timeout):
        asked.append(url)
        answer = requests.Response()
        answer.status_code, answer._content = 200, b"2"
        return answer

    monkeypatch.setattr(requests, "get", get)
    found = RemoteShards("https://huggingface.co/datasets/me/wds_x/tree/main", "train", grey)
    assert asked == ["https://huggingface.co/datasets/me/wds_x/raw/main/train/nshards.txt"]
    assert found.urls == [f"https://huggingface.co/datasets/me/wds_x/resolve/main/train/{i}.tar" for i in range(2)]


def test_small_files_lie_beside_listed_shards_or_above_them(tmp_path):
    listed = str(tmp_path / "train" / "{0..1}.tar")
    assert beside(str(tmp_path)) == beside(listed) == tmp_path
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / CLASS_NAMES).touch()
    assert beside(listed) == tmp_path / "train"
    shards = [f"https://x.org/a/{number}.tar" for number in range(2)]
    assert remote_shards("https://x.org/a/{0..1}.tar", "test") == ("https://x.org/a", shards)
