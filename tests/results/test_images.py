"""Per-image results: what is written is read again, and what damaged files say."""

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from vs2_plugin.errors import DataError
from vs2_plugin.results.images import Images, images_file
from vs2_plugin.results.runs import read

#: What a file holds, array by array: others read it, too.
KINDS = {
    "digest": "uint64", "target": "int32", "prediction": "int32", "rank": "int32", "confidence": "float32",
    "target_probability": "float32", "fvu": "float32", "steered": "bool", "plain_prediction": "int32",
    "plain_confidence": "float32", "classes": "<U3", "seconds": "float64", "peak_memory": "int64",
}  # fmt: skip


def test_what_is_written_is_read_again(make_images, tmp_path):
    arrays = make_images(0.6, sae=True, before=0.5)
    given = arrays | {"target": arrays["target"].astype(np.int64), "classes": tuple(arrays["classes"])}
    Images(**given).write(tmp_path / "x.images.npz")
    held = np.load(tmp_path / "x.images.npz")
    assert {name: str(held[name].dtype) for name in held.files} == KINDS
    again = Images.read(tmp_path / "x.images.npz")
    for name, array in arrays.items():
        assert np.array_equal(np.asarray(getattr(again, name)), array), name
    assert [path.name for path in tmp_path.iterdir()] == ["x.images.npz"]


def test_a_plain_model_has_fewer_arrays_and_what_is_not_known_is_none(make_images, tmp_path):
    arrays = make_images(0.6)
    Images(**{name: arrays[name] for name in list(KINDS)[:6]}).write(tmp_path / "x.npz")
    again = Images.read(tmp_path / "x.npz")
    assert (again.classes, again.fvu, again.plain, again.seconds, again.peak_memory) == ((), None, None, None, None)
    assert again.name(3) == "class 3"


def test_the_files_of_images_are_kept(make_images, tmp_path):
    arrays = make_images(0.6)
    paths = [f"class/{number} \u6f22.png" for number in range(len(arrays["digest"]))]
    given = {name: arrays[name] for name in list(KINDS)[:6]}
    Images(**given, paths=paths).write(tmp_path / "x.npz")
    again = Images.read(tmp_path / "x.npz")
    assert list(again.paths) == paths
    again.write(tmp_path / "y.npz")
    assert list(Images.read(tmp_path / "y.npz").paths) == paths


@pytest.mark.parametrize(("name", "before", "after"), [("mended", 0.5, 0.6), ("broken", 0.6, 0.5)])
def test_the_files_that_steering_changed_are_told(make_images, name, before, after):
    arrays = make_images(after, sae=True, before=before)
    given = arrays | {"classes": tuple(arrays["classes"])}
    assert Images(**given).changed() == {}
    images = Images(**given, paths=[f"{number}.png" for number in range(len(arrays["digest"]))])
    ((found, files),) = images.changed(3).items()
    assert found == name and len(files) == 3
    rows = [int(path.removesuffix(".png")) for path, _, _ in files]
    assert (images.correct[rows] == (name == "mended")).all()
    assert (images.plain.correct[rows] == (name == "broken")).all()
    assert images.confidence[rows].tolist() == sorted(images.confidence[rows].tolist(), reverse=True)
    for row, (_, was, now) in zip(rows, files):
        assert (was, now) == (images.name(images.plain_prediction[row]), images.name(images.prediction[row]))


def test_where_they_lie():
    assert images_file(Path("a/vs2:B@gate=0.9.json")) == Path("a/vs2:B@gate=0.9.images.npz")


CHANGES = {
    "digest is int64": {"digest": np.zeros(600, np.int64)},
    "digest is uint64 of shape \\[0\\]": {"digest": np.zeros(0, np.uint64)},
    "target is int32 of shape \\[599\\] for 600 images": {"target": np.zeros(599, np.int32)},
    "target names a class outside the 6 classes": {"target": np.full(600, 6, np.int32)},
    "prediction names a class outside": {"prediction": np.full(600, -1, np.int32)},
    "rank is float64": {"rank": np.zeros(600)},
    "confidence holds values that are not finite numbers": {"confidence": np.full(600, np.nan, np.float32)},
    "confidence lies outside 0 to 1": {"confidence": np.full(600, 3, np.float32)},
    "fvu is float32 of shape \\[600, 1\\]": {"fvu": np.zeros((600, 1), np.float32)},
    "steered is int64": {"steered": np.zeros(600, np.int64)},
    "plain_prediction names a class outside": {
        "plain_prediction": np.full(600, 6, np.int32), "plain_confidence": np.zeros(600, np.float32)
    },
    "plain_confidence lies outside 0 to 1": {
        "plain_prediction": np.zeros(600, np.int32), "plain_confidence": np.full(600, 3, np.float32)
    },
    "of the plain model it holds plain_prediction only": {"plain_prediction": np.zeros(600, np.int32)},
    "plain_confidence is float32 of shape \\[599\\]": {"plain_confidence": np.zeros(599, np.float32)},
    "classes is float64": {"classes": np.zeros(6)},
    "paths is float64": {"paths": np.zeros(6)},
    "path_ends is int64 of shape \\[5\\] for 600 images": {
        "paths": np.zeros(6, np.uint8), "path_ends": np.arange(5)
    },
    "path_ends are not where paths end": {"paths": np.zeros(6, np.uint8), "path_ends": np.arange(600)},
    "seconds is float64 of shape \\[3\\]; expected one number": {"seconds": np.zeros(3)},
}


@pytest.mark.parametrize("message", CHANGES)
def test_arrays_that_do_not_fit(write_run, make_images, message):
    path = write_run("B", images=make_images(0.5))
    np.savez(path.with_suffix(".images.npz"), **make_images(0.5, **CHANGES[message]))
    with pytest.raises(DataError, match=f"damaged per-image results: {message}.*VS2_PER_IMAGE=1"):
        read([path])


def test_an_array_that_is_missing(write_run, make_images):
    arrays = make_images(0.5)
    del arrays["rank"], arrays["classes"]
    path = write_run("B", images=arrays)
    with pytest.raises(DataError, match="it holds no rank, classes"):
        read([path])


def test_files_that_are_no_archives(write_run, make_images):
    path = write_run("B", images=make_images(0.5))
    beside = path.with_suffix(".images.npz")
    good = beside.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 3] ^= 255
    bare, archive = io.BytesIO(), io.BytesIO()
    np.save(bare, np.zeros(3))
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("digest.npy", b"no array")
    for content in (b"", b"PK", good[: len(good) // 2], bytes(flipped), bare.getvalue(), archive.getvalue()):
        beside.write_bytes(content)
        with pytest.raises(DataError, match="damaged per-image results"):
            read([path])


def test_a_damaged_header_of_an_array(write_run, make_images):
    """numpy reads it as Python's syntax, and raises what that raises."""
    path = write_run("B", images=make_images(0.5))
    beside = path.with_suffix(".images.npz")
    np.savez(beside, **make_images(0.5))
    beside.write_bytes(beside.read_bytes().replace(b"<u8", b",u8"))
    with pytest.raises(DataError, match="damaged per-image results: SyntaxError"):
        read([path])


def test_no_pickle_is_ever_opened(write_run, make_images, tmp_path):
    class Harm:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harm",)

    path = write_run("B", images=make_images(0.5))
    np.savez(path.with_suffix(".images.npz"), **make_images(0.5, digest=np.array([Harm()], object)))
    with pytest.raises(DataError, match="damaged"):
        read([path])
    path.with_suffix(".images.npz").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(DataError, match="damaged"):
        read([path])
    assert not (tmp_path / "harm").exists()
