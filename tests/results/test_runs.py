"""Reading result files: what is accepted, and what damaged or foreign files say."""

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from vs2_plugin.errors import DataError
from vs2_plugin.results.runs import Run, read


def test_a_result_and_what_lies_beside_it(write_run, make_images, steered):
    path = write_run("vs2:B", images=make_images(0.6, sae=True), metrics=steered(gamma=1.5))
    write_run("B", 0.5)
    (run,), passed_over = read([path])
    assert (run.dataset, run.backbone, run.method, run.labels) == ("wds/animals", "B", "vs2", "none")
    assert run.fact("gamma") == 1.5 and run.fact("nope") is None and run.number("vs2_method") is None
    assert run.images.classes[0] == "cat" and len(run.images.fvu) == 600 and run.images.seconds == 1.5
    assert passed_over == []


def test_folders_are_searched_and_nothing_is_read_twice(write_run, tmp_path):
    first = write_run("B")
    write_run("B", folder="results/deeper")
    (tmp_path / "results" / "open_clip_config.json").write_text("{}")
    (tmp_path / "results" / "torn.json").write_text('{"dataset": ')
    runs, passed_over = read([tmp_path, first, tmp_path / "results"])
    assert len(runs) == 2
    assert len({reason for reason in passed_over}) == 2
    assert "open_clip_config.json is not a results file of clip_benchmark" in passed_over[0]


@pytest.mark.parametrize(
    "content", ["", "no json", "[1]", "{}", '{"dataset": 1, "model": "m", "task": "t", "metrics": {}}', "[" * 100_000]
)
def test_a_file_that_was_named_and_is_no_result_is_an_error(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(DataError, match='expected|is not a results file of clip_benchmark: .*"metrics"'):
        read([path])


def test_bytes_that_are_no_text_missing_files_and_empty_folders(tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="is no JSON"):
        read([tmp_path / "x.json"])
    with pytest.raises(DataError, match="cannot be read .No such file"):
        read([tmp_path / "y.json"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no results found; expected .* clip_benchmark eval"):
        read([tmp_path / "empty"])


def test_accuracy_outside_its_range(write_run):
    with pytest.raises(DataError, match="acc1 is 58.8; expected a share from 0 to 1"):
        read([write_run("B", 58.8)])


def test_numbers_that_are_none(write_run):
    path = write_run("B", metrics={"acc5": float("nan"), "extra": "text", "flag": True})
    ((run,), _) = read([path])
    assert [run.number(name) for name in ("acc5", "extra", "flag", "missing")] == [None] * 4


CHANGES = {
    "digest is int64": {"digest": np.zeros(600, np.int64)},
    "digest is uint64 of shape \\[0\\]": {"digest": np.zeros(0, np.uint64)},
    "target is int32 of shape \\[599\\] for 600 images": {"target": np.zeros(599, np.int32)},
    "target names a class outside the 6 classes": {"target": np.full(600, 6, np.int32)},
    "prediction names a class outside": {"prediction": np.full(600, -1, np.int32)},
    "rank is float64": {"rank": np.zeros(600)},
    "confidence holds values that are no finite numbers": {"confidence": np.full(600, np.nan, np.float32)},
    "confidence lies outside 0 to 1": {"confidence": np.full(600, 3, np.float32)},
    "fvu is float32 of shape \\[600, 1\\]": {"fvu": np.zeros((600, 1), np.float32)},
    "steered is int64": {"steered": np.zeros(600, np.int64)},
    "plain_prediction names a class outside": dict(
        plain_prediction=np.full(600, 6, np.int32), plain_confidence=np.zeros(600, np.float32)
    ),
    "plain_confidence lies outside 0 to 1": dict(
        plain_prediction=np.zeros(600, np.int32), plain_confidence=np.full(600, 3, np.float32)
    ),
    "of the plain model it holds plain_prediction only": {"plain_prediction": np.zeros(600, np.int32)},
    "plain_confidence is float32 of shape \\[599\\]": {"plain_confidence": np.zeros(599, np.float32)},
    "classes is float64": {"classes": np.zeros(6)},
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


def test_per_image_results_of_another_run(write_run, make_images):
    path = write_run("B", images=make_images(0.5))
    np.savez(path.with_suffix(".images.npz"), **make_images(0.9))
    with pytest.raises(DataError, match="not of the run of B.json: its predictions are right for 8.*, the results say"):
        read([path])


@pytest.mark.parametrize(
    ("model", "method", "segments"),
    [
        ("ViT-B-32", None, ["ViT-B-32"]),
        ("local-dir:a@b", None, ["local-dir:a@b"]),
        ("vs2:ViT-B-32@sae@gate=0.9", "vs2", ["ViT-B-32", "sae", "gate=0.9"]),
        ("vs2:hf-hub:org/m", "vs2", ["hf-hub:org/m"]),
        ("ViT-B-32@gamma=2", "vs2", ["ViT-B-32", "gamma=2"]),  # --model_type vs2
        ("hf-hub:org/m@gamma=2", "vs2", ["hf-hub:org/m", "gamma=2"]),
    ],
)
def test_the_parts_of_a_model_string(model, method, segments):
    run = Run(Path("x"), "d", model, "", "t", "en", {"vs2_method": method} if method else {})
    assert run.segments == segments and run.backbone == segments[0]
    assert run.given == dict(part.split("=") for part in segments[1:] if "=" in part)


def test_what_a_steered_run_recorded_of_the_plain_model(write_run, make_images, steered):
    path = write_run("vs2:B@gate=0.9", images=make_images(0.6, 3, sae=True, before=0.5), metrics=steered())
    expected = make_images(0.5, 3)
    ((run,), _) = read([path])
    plain = run.plain
    assert (plain.model, plain.method, plain.dataset, plain.plain) == ("B", None, run.dataset, None)
    for name in ("digest", "target", "prediction", "confidence"):
        assert getattr(plain.images, name).tolist() == expected[name].tolist()
    right = expected["prediction"] == expected["target"]
    recall = np.mean([right[expected["target"] == label].mean() for label in range(6)])
    assert plain.metrics == {"acc1": right.mean(), "mean_per_class_recall": pytest.approx(recall)}
    assert plain.images.fvu is plain.images.seconds is plain.images.peak_memory is None
    assert read([write_run("vs2:B", images=make_images(0.6), metrics=steered())])[0][0].plain is None
