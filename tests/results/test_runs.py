"""Reading result files: what is accepted, and what damaged or foreign files say."""

import csv
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from vs2_plugin.errors import DataError
from vs2_plugin.results.runs import DIGEST, Run, digest_of, read, read_run, sign, write_run, write_table


def test_a_result_and_what_lies_beside_it(write_run, make_images, steered):
    path = write_run("vs2:B", images=make_images(0.6, sae=True), metrics=steered(gamma=1.5))
    write_run("B", 0.5)
    (run,), passed_over = read([path])
    assert (run.dataset, run.parts.backbone, run.method, run.labels) == ("wds/animals", "B", "vs2", "none")
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
    assert len(set(passed_over)) == 2
    assert "open_clip_config.json is not a results file of clip_benchmark" in passed_over[0]


def test_of_copies_one_is_read_but_plain_results_beside_others_stay(write_run, make_images, steered, tmp_path):
    paths = [write_run("vs2:B", 0.6, folder=folder, metrics=steered()) for folder in ("a", "a/old", "b")]
    for path in paths:
        sign(path)
    write_run("B", folder="a")
    write_run("B", folder="b")
    write_run("B", folder="b", name="again")
    runs, passed_over = read([tmp_path])
    assert sorted(str(run.path.parent.name) for run in runs if run.method is None) == ["a", "b"]
    assert [run.path for run in runs if run.method is not None] == [paths[0]]
    assert f"{paths[1]}: it has the results of {paths[0]}" in passed_over and len(passed_over) == 3


def test_nested_lists_of_any_depth_are_read_or_refused(write_run):
    path = write_run("B")
    content = path.read_text().rstrip("}")
    for depth in range(600, 1000, 5):
        path.write_text(f'{content}, "nested": {"[" * depth}{"]" * depth}}}}}')
        try:
            assert len(read([path.parent])[0]) == 1
        except DataError as error:
            assert "not JSON" in str(error)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no such pipes")
def test_a_pipe_in_a_folder_is_passed_over(write_run):
    path = write_run("B")
    os.mkfifo(path.with_name("pipe.json"))
    assert "pipe.json: it is no file; expected a results file" in read([path.parent])[1][0]


@pytest.mark.parametrize(
    "content", ["", "no json", "[1]", "{}", '{"dataset": 1, "model": "m", "task": "t", "metrics": {}}', "[" * 100_000]
)
def test_a_file_that_was_named_and_is_no_result_is_an_error(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r'expected|is not a results file of clip_benchmark: .*"metrics"'):
        read([path])


def test_bytes_that_are_no_text_missing_files_and_empty_folders(tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"is not JSON"):
        read([tmp_path / "x.json"])
    with pytest.raises(DataError, match=r"cannot be read .No such file"):
        read([tmp_path / "y.json"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no results found; expected .* clip_benchmark eval"):
        read([tmp_path / "empty"])


@pytest.mark.parametrize("acc1", [True, 58.8, -0.1, float("nan"), float("inf"), "0.5", [0.5]])
def test_an_accuracy_that_is_none(write_run, acc1):
    with pytest.raises(DataError, match=rf"acc1 is {re.escape(str(acc1))}; expected a number, a share from 0 to 1"):
        read([write_run("B", metrics={"acc1": acc1})])


def test_one_wrong_result_in_a_folder_does_not_stop_the_others(write_run, make_images):
    wrong = write_run("A", images=make_images(0.5))
    np.savez(wrong.with_suffix(".images.npz"), **make_images(0.9))
    write_run("B", 58.8)
    good = write_run("C", 0.5)
    (run,), passed_over = read([good.parent])
    assert run.path == good
    assert ["A.images.npz does not belong" in passed_over[0], "B.json: acc1 is 58.8" in passed_over[1]] == [True, True]


def test_numbers_that_are_none(write_run):
    metrics = {"acc5": float("nan"), "extra": "text", "flag": True, "vs2_seconds": 10**400, "vs2_ece": 0.1}
    path = write_run("B", metrics={**metrics, "vs2_ece_bins": [[10**400, 0.5, 0.5]]})
    ((run,), _) = read([path])
    assert [run.number(name) for name in ("acc5", "extra", "flag", "missing", "vs2_seconds")] == [None] * 5
    assert run.seconds is None and run.calibration() is None
    path.write_text(path.read_text().replace("0.5]]", f"1{'0' * 5000}]]"))  # more digits than Python makes a number of
    assert read_run(path).calibration() is None


def test_per_image_results_of_another_model_of_nearly_the_same_accuracy(write_run, make_images):
    images = make_images(0.5, before=0.45)
    plain, right = (images[name] == images["target"] for name in ("plain_prediction", "prediction"))
    told = {"vs2_mended": int((~plain & right).sum()), "vs2_broken": int((plain & ~right).sum())}
    path = write_run("B", images=images, metrics=told)
    assert read([path])[0][0].images is not None
    np.savez(path.with_suffix(".images.npz"), **make_images(0.5, before=0.4))
    with pytest.raises(DataError, match=r"does not belong to the run of B.json: in it \d+ images are mended and 0"):
        read([path])


def test_per_image_results_of_another_run(write_run, make_images):
    path = write_run("B", images=make_images(0.5))
    np.savez(path.with_suffix(".images.npz"), **make_images(0.9))
    with pytest.raises(
        DataError, match=r"does not belong to the run of B.json: its predictions are right for 8.*, the results"
    ):
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
    assert [run.parts.backbone, *run.parts.words] == segments


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


def test_what_is_written_is_read_again_and_stands_in_the_table(tmp_path):
    metrics = {"acc1": 0.5, "vs2_method": "vs2", "vs2_gamma": 1.5}
    steered = Run(tmp_path / "a.json", "wds/x", "vs2:B@gamma=1.5", "w", "zeroshot_classification", "en", metrics)
    plain = Run(tmp_path / "b.json", "wds/x", "B", "w", "zeroshot_classification", "en", {"acc1": 0.4})
    (tmp_path / "a.images.npz").write_bytes(b"of the results that lay there before")
    for run in (plain, steered):
        written, again = write_run(run), read_run(run.path)
        assert (again.model, again.metrics, again.language) == (run.model, written.metrics, "en")
        assert run.metrics.items() <= written.metrics.items()
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "b.json"}
    write_table(tmp_path / "table.csv", [plain, steered])
    with (tmp_path / "table.csv").open() as file:
        first, second = csv.DictReader(file)
    assert first["model_fullname"] == "B w" and first["vs2_gamma"] == "" and second["vs2_gamma"] == "1.5"


@pytest.mark.parametrize(
    ("metrics", "headline"),
    [({"acc1": 0.5, "mean_average_precision": 0.7}, 0.5), ({"mean_average_precision": 0.7}, 0.7), ({}, None)],
)
def test_the_headline_of_a_result(metrics, headline):
    assert Run(Path("x"), "d", "B", "", "t", "en", metrics).headline == headline


@pytest.mark.parametrize(
    ("facts", "protocol"),
    [({}, "image"), ({"vs2_checkpoint": "a"}, "unlabeled"), ({"vs2_protocol": "stream"}, "stream")],
)
def test_the_protocol_that_older_results_do_not_name(facts, protocol):
    assert Run(Path("x"), "d", "vs2:B", "", "t", "en", {"vs2_method": "vs2", **facts}).protocol == protocol


# ---- changed after they were written


def edited(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, indent=3))
    return read_run(path).changed


CHANGES = {
    "accuracy": lambda content: content["metrics"].update(acc1=0.51),
    "an option": lambda content: content["metrics"].update(vs2_alpha=2),
    "a metric less": lambda content: content["metrics"].pop("acc5"),
    "a metric more": lambda content: content["metrics"].update(acc10=1.0),
    "data set": lambda content: content.update(dataset="wds/other"),
    "model": lambda content: content.update(model="vs2:C"),
    "weights": lambda content: content.update(pretrained=""),
    "task": lambda content: content.update(task="linear_probe"),
    "language": lambda content: content.update(language="fr"),
    "digest": lambda content: content["metrics"].update({DIGEST: "0" * 16}),
    "digest of another kind": lambda content: content["metrics"].update({DIGEST: [1]}),
    "absurd number": lambda content: content["metrics"].update(acc5=10**400),
    "nested": lambda content: content["metrics"].update(extra=json.loads("[" * 500 + "]" * 500)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_result_that_was_changed_is_told_from_one_as_it_was_written(change, write_run, steered):
    path = write_run("vs2:B", metrics=steered(alpha=1.05))
    assert not read_run(path).changed  # without a digest, there is no telling
    sign(path)
    assert not edited(path, lambda content: None) and read_run(path).fact("alpha") == 1.05
    assert edited(path, CHANGES[change])
    [run], _ = read([path])
    assert run.changed


def test_sweeps_write_the_digest_of_steered_results_and_none_of_plain_ones(tmp_path):
    about = ("wds/x", "vs2:B", "laion", "zeroshot_classification", "en")
    steered = write_run(Run(tmp_path / "a.json", *about, {"acc1": 1 / 3, "vs2_method": "vs2"}))
    assert read_run(steered.path) == steered or read_run(steered.path).metrics == steered.metrics
    assert steered.metrics[DIGEST] == digest_of(json.loads(steered.path.read_text()))
    assert not read_run(steered.path).changed
    before = steered.path.read_bytes()
    sign(steered.path)
    assert steered.path.read_bytes() == before
    plain = write_run(Run(tmp_path / "b.json", *about, {"acc1": 0.5}))
    assert DIGEST not in plain.metrics and DIGEST not in read_run(plain.path).metrics


def test_the_digest_is_that_of_earlier_versions():
    content = {"dataset": "wds/x", "model": "vs2:B", "task": "t", "metrics": {"acc1": 1 / 3, DIGEST: ""}}
    assert digest_of(content) == "bacc70544503e223"


def test_a_result_behind_a_link_gets_its_digest_where_it_lies(write_run, steered, tmp_path):
    path, link = write_run("vs2:B", metrics=steered()), tmp_path / "link.json"
    link.symlink_to(path)
    sign(link)
    assert link.is_symlink() and DIGEST in read_run(path).metrics


def test_where_nothing_can_be_written_the_results_stay_as_they_are(tmp_path):
    sign(tmp_path / "missing.json")
    sign(Path(os.devnull))
    assert list(tmp_path.iterdir()) == []
