"""Per-image results beside the results file, where they are asked for."""

import csv
import json
import math
import time
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import vs2_plugin
from vs2_plugin.data.images import image_digest
from vs2_plugin.harness import patches
from vs2_plugin.harness import recorder as per_image
from vs2_plugin.host import Evaluation
from vs2_plugin.report.summary import summarise
from vs2_plugin.results.images import Images
from vs2_plugin.results.runs import read, read_run

from .conftest import TINY, few_digits, metrics

NAME = "local-dir-tiny-clip_wds-digits"
DATA = ("--pretrained", "", "--dataset", "wds/few", "--dataset_root", "few")
DATA += ("--num_workers", "1", "--quiet", "--batch_size", "16", "--no_amp")
#: Four batches of them.
IMAGES = 64
MODELS = [TINY, f"vs2:{TINY}@{NAME}@gate=0.5", f"vs2pp:{TINY}@{NAME}", f"rag:{TINY}@{NAME}"]
#: Steered at the last block, further in, and at the output, with a gallery and without.
EVERYWHERE = [
    *MODELS[1:],
    *(f"{method}:{TINY}@{NAME}" for method in ("vs2", "clipsteer", "pass", "knn")),
    *(f"{method}:{TINY}@{NAME}@blocks=1+2" for method in ("vs2", "vs2pp")),
]
#: What is measured aside.
ASIDE = {"vs2_seconds", "vs2_peak_memory", "vs2_mended", "vs2_broken"}
ASIDE |= {f"vs2_{ece}{bins}" for ece in ("ece", "ece_before") for bins in ("", "_bins")}


@pytest.fixture
def evaluate(in_demo, clip_benchmark):
    few_digits(in_demo, "few", 1, count=IMAGES)

    def run(*models, data=DATA):
        for path in in_demo.glob("i-*"):
            path.unlink()
        code, error = clip_benchmark("eval", "--model", *models, *data, "--output", "i-{model}.json")
        assert code == 0, error
        return [(metrics(in_demo / f"i-{model}.json"), in_demo / f"i-{model}.images.npz") for model in models]

    return run


def test_those_of_an_earlier_run_do_not_stay_beside_results_without(evaluate, monkeypatch, clip_benchmark, in_demo):
    for model in MODELS[:2]:
        monkeypatch.setenv("VS2_PER_IMAGE", "1")
        ((_, path),) = evaluate(model)
        monkeypatch.delenv("VS2_PER_IMAGE")
        words = ("eval", "--model", model, *DATA, "--output", "i-{model}.json")
        assert clip_benchmark(*words, "--skip_existing")[0] == 0 and path.exists()
        assert clip_benchmark(*words)[0] == 0 and not path.exists()


def test_they_add_up_to_the_results(evaluate, monkeypatch):
    monkeypatch.setenv("VS2_PER_IMAGE", "1")
    digests = []
    for found, path in evaluate(*MODELS):
        images = np.load(path)
        assert len(images["digest"]) == IMAGES and images["classes"].tolist()[:2] == ["zero", "one"]
        assert (images["prediction"] == images["target"]).mean() == pytest.approx(found["acc1"])
        assert (images["rank"] == 0).mean() == pytest.approx(found["acc1"])
        assert (images["rank"] < 5).mean() == pytest.approx(found["acc5"])
        assert (images["confidence"] >= images["target_probability"]).all()
        assert ("fvu" in images) == ("vs2_mean_fvu" in found) == ("vs2_k" in found) and float(images["seconds"]) > 0
        if "fvu" in images:
            assert images["fvu"].mean() == pytest.approx(found["vs2_mean_fvu"], rel=1e-5)
            assert images["steered"].mean() == pytest.approx(found["vs2_coverage"])
        digests.append(images["digest"].tolist())
    assert all(one == digests[0] for one in digests) and len(set(digests[0])) == IMAGES


@pytest.mark.parametrize("value", [None, "", "0"])
def test_nobody_asked_and_nothing_is_written(value, evaluate, monkeypatch):
    monkeypatch.delenv("VS2_PER_IMAGE", raising=False)
    if value is not None:
        monkeypatch.setenv("VS2_PER_IMAGE", value)
    ((_, path),) = evaluate(MODELS[1])
    assert not path.exists()


def test_results_gain_what_is_measured_and_are_the_same_otherwise(evaluate, monkeypatch):
    without = [everything(path) for _, path in evaluate(TINY, *EVERYWHERE)]
    assert not any(found.keys() & ASIDE for found in without)
    monkeypatch.setenv("VS2_PER_IMAGE", "1")
    for (_, path), usual in zip(evaluate(TINY, *EVERYWHERE), without, strict=True):
        assert {name: value for name, value in everything(path).items() if name not in ASIDE} == usual


def everything(path):
    """All metrics of the results that per-image results lie beside, but for the digest of them."""
    found = json.loads(path.with_suffix("").with_suffix(".json").read_text())["metrics"]
    return {name: value for name, value in found.items() if name != "vs2_results_digest"}


@pytest.mark.parametrize("data", [DATA, DATA[:-1], (*DATA, "--batch_size", "7")], ids=["float32", "autocast", "sevens"])
def test_a_steered_run_knows_what_the_plain_one_gives_bit_for_bit(data, evaluate, monkeypatch):
    monkeypatch.setenv("VS2_PER_IMAGE", "1")
    (_, path), *steered = evaluate(TINY, *EVERYWHERE, data=data)
    plain, before = np.load(path), everything(path)
    assert "plain_prediction" not in plain and {"vs2_mended", "vs2_ece_before"} & before.keys() == set()
    was = plain["prediction"] == plain["target"]
    for _, path in steered:
        images, found = np.load(path), everything(path)
        assert images["plain_prediction"].dtype == np.int32 and images["plain_confidence"].dtype == np.float32
        assert images["digest"].tolist() == plain["digest"].tolist()
        assert images["plain_prediction"].tolist() == plain["prediction"].tolist()
        assert images["plain_confidence"].tolist() == plain["confidence"].tolist()
        assert found["vs2_ece_before"] == before["vs2_ece"] and found["vs2_ece_before_bins"] == before["vs2_ece_bins"]
        right = images["prediction"] == images["target"]
        assert found["vs2_mended"] == sum(right & ~was) and found["vs2_broken"] == sum(was & ~right)
        assert found["vs2_mended"] - found["vs2_broken"] == pytest.approx(IMAGES * (found["acc1"] - before["acc1"]))


def test_where_the_rest_of_the_tower_gives_other_bits_the_whole_tower_runs(evaluate, monkeypatch):
    from vs2_plugin.model import plain as module

    finish = module.finish
    monkeypatch.setattr(module, "finish", lambda model, site, x: finish(model, site, x) * 1.01)
    monkeypatch.setenv("VS2_PER_IMAGE", "1")
    (_, plain), (_, steered) = evaluate(*MODELS[:2])
    assert np.load(steered)["plain_confidence"].tolist() == np.load(plain)["confidence"].tolist()


@pytest.mark.parametrize("amp", [False, True])
def test_the_plain_tower_runs_as_seldom_as_it_can(amp, in_demo):
    """After the first batch of a shape not at all, if steering begins at its end; for a gallery it runs anyway."""
    images = torch.randn(5, 3, 32, 32)
    expected = {"vs2": 1, "vs2pp": 1, "rag": 1, "vs2@blocks=1+2": 3, "vs2pp@blocks=1+2": 0}
    for name, extra in expected.items():
        method, _, option = name.partition("@")
        model, *_ = vs2_plugin.load(f"{method}:{TINY}@{NAME}" + option.replace("blocks", "@blocks"))
        model.set_classifier(torch.randn(64, 10))
        runs, seen = [], []
        model.visual.conv1.register_forward_hook(lambda *args, runs=runs: runs.append(1))
        with torch.no_grad(), torch.autocast("cpu", enabled=amp):
            model.encode_image(images)
            usual = len(runs)
            model.record_images(True, lambda embedding, seen=seen: seen.append(embedding()))
            for _ in range(3):
                model.encode_image(images)
            assert len(runs) == 4 * usual + extra, name
            model.record_images(False)
            model.encode_image(images)
        assert len(runs) == 5 * usual + extra and len(seen) == 3
        assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


def test_the_time_of_the_plain_model_does_not_count(evaluate, monkeypatch):
    def slow(self, classifier, embedding, see=per_image.Recorder.see_plain):
        see(self, classifier, lambda: time.sleep(0.5) or embedding())

    monkeypatch.setenv("VS2_PER_IMAGE", "1")
    ((_, path),) = evaluate(MODELS[1])
    monkeypatch.setattr(per_image.Recorder, "see_plain", slow)
    started = time.monotonic()
    ((_, path),) = evaluate(MODELS[1])
    elapsed = time.monotonic() - started
    images, found = np.load(path), everything(path)
    assert found["vs2_seconds"] <= images["seconds"] <= elapsed - 2  # four batches


def test_the_bins_reach_the_table_of_all_results(evaluate, in_demo, clip_benchmark, monkeypatch):
    monkeypatch.setenv("VS2_PER_IMAGE", "1")
    paths = [path for _, path in evaluate(*MODELS[:2])]
    files = [str(path.with_suffix("").with_suffix(".json")) for path in paths]
    assert clip_benchmark("build", *files, "--output", "i-build.csv")[0] == 0
    with (in_demo / "i-build.csv").open() as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    for model, path in zip(MODELS, paths, strict=False):
        found = everything(path)
        assert {name for name in rows[model] if rows[model][name] and name in ASIDE} == found.keys() & ASIDE
        for name in ("vs2_ece", "vs2_ece_before") if "vs2_ece_before" in found else ("vs2_ece",):
            bins = json.loads(rows[model][f"{name}_bins"])
            assert bins == found[f"{name}_bins"] == sorted(bins, key=lambda row: row[1])
            assert sum(count for count, _, _ in bins) == IMAGES
            ece = sum(count * abs(confidence - accuracy) for count, confidence, accuracy in bins) / IMAGES
            assert ece == pytest.approx(found[name], abs=2e-6)


def test_the_report_of_a_steered_run_needs_no_plain_run(evaluate, in_demo, monkeypatch):
    monkeypatch.setenv("VS2_PER_IMAGE", "1")
    evaluate(*MODELS)
    rows = []
    for _ in range(2):
        (section,) = summarise(read(in_demo.glob("i-*.json"))[0])
        rows.append(section.groups[0].rows)
        (in_demo / f"i-{TINY}.json").unlink(missing_ok=True)
    told = [(row.label, row.top1, row.run.number("mean_per_class_recall"), row.interval, row.ece) for row in rows[0]]
    assert told == [
        (row.label, row.top1, pytest.approx(row.run.number("mean_per_class_recall")), row.interval, row.ece)
        for row in rows[1]
    ]
    for with_plain, alone in zip(*rows, strict=True):
        assert (with_plain.mended, with_plain.broken) == (alone.mended, alone.broken)
        assert (with_plain.change, with_plain.change_interval) == (alone.change, alone.change_interval)
        assert with_plain.ece_before == alone.ece_before and with_plain.classes == alone.classes


def test_time_memory_and_calibration_stand_beside_accuracy(evaluate, monkeypatch):
    monkeypatch.setenv("VS2_PER_IMAGE", "1")
    for _, path in evaluate(*MODELS[:2]):
        found, images = everything(path), np.load(path)
        right = images["prediction"] == images["target"]
        bins = np.minimum((images["confidence"] * 15).astype(int), 14)
        expected = sum(
            abs(right[bins == one].mean() - images["confidence"][bins == one].mean()) * (bins == one).mean()
            for one in set(bins)
        )
        assert found["vs2_ece"] == pytest.approx(expected, abs=1e-6)
        assert 0 < found["vs2_seconds"] <= images["seconds"] and found["vs2_peak_memory"] > 10**7


def test_a_model_that_is_not_recorded_keeps_no_images(in_demo):
    model, *_ = vs2_plugin.load(f"vs2:{TINY}", dataset="wds/digits")
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        model.encode_image(images)
        assert not any(len(values) for values in model.per_image().values())
        model.record_images(True)
        model.encode_image(images)
        model.encode_image(images[:2])
    assert {name: len(values) for name, values in model.per_image().items()} == {"fvu": 7, "steered": 7}


# ---- its figures, from logits alone


def softmax(row):
    weights = [math.exp(value - max(row)) for value in row]
    return [weight / sum(weights) for weight in weights]


def first(row):
    return max(range(len(row)), key=row.__getitem__)


def bins_of(confidence, right):
    """Of 15 bins those that hold images: [images, mean confidence, accuracy]; and the calibration error."""
    found = []
    for number in range(15):
        mine = [i for i, value in enumerate(confidence) if number < 15 * value <= number + 1]
        if mine:
            found.append(
                [len(mine), *(sum(map(float, map(of.__getitem__, mine))) / len(mine) for of in (confidence, right))]
            )
    return found, sum(count * abs(mean - accuracy) for count, mean, accuracy in found) / len(confidence)


def recorded(logits, target, classes=7, batches=((0, 30), (30, 40))):
    """A recorder that has seen 40 images, and the plain model's logits for them."""
    rng = torch.Generator().manual_seed(4)
    images, embedding = torch.rand(40, 3, 4, 4, generator=rng), torch.randn(40, 5, generator=rng)
    classifier, recorder = torch.randn(5, classes, generator=rng) / 40, per_image.Recorder()
    parts = [slice(*ends) for ends in batches]
    seen = list(recorder.watch([(images[part], target[part]) for part in parts]))
    assert [len(batch) for batch, _ in seen] == [end - start for start, end in batches]
    for part in parts:
        recorder.see_plain(classifier, lambda part=part: embedding[part])
    recorder.finish(logits, target, {})
    return recorder, images, (100 * embedding / embedding.norm(dim=1, keepdim=True) @ classifier).tolist()


@pytest.mark.parametrize("recording", ["0", "1"])
def test_per_image_results_of_an_earlier_run_go_where_a_run_records_none(recording, tmp_path, monkeypatch):
    result, images = tmp_path / "x.json", tmp_path / "x.images.npz"
    images.write_bytes(b"of an earlier run")
    monkeypatch.setenv("VS2_PER_IMAGE", recording)
    monkeypatch.setattr(Evaluation, "of", lambda args: SimpleNamespace(output_file=str(result)))
    content = {"dataset": "d", "model": "B", "task": "t", "metrics": {"mean_average_precision": 0.5}}  # several labels
    args = Namespace(model="B", skip_existing=False, split="test")
    patches._run(lambda args: result.write_text(json.dumps(content)), args)
    assert not images.exists() and read_run(result).headline == 0.5


def test_the_figures_follow_from_the_logits(tmp_path):
    rng = torch.Generator().manual_seed(3)
    logits, target = 2 * torch.randn(40, 7, generator=rng), torch.arange(40) % 7
    recorder, images, before = recorded(logits, target)
    recorder.classes = list("abcdefg")
    found = recorder.facts()
    recorder.save(str(tmp_path / "x.json"))
    kept, rows, labels = Images.read(tmp_path / "x.images.npz"), logits.tolist(), target.tolist()
    assert kept.digest.tolist() == [image_digest(image) for image in images]
    assert kept.target.tolist() == labels and kept.prediction.tolist() == list(map(first, rows))
    assert kept.rank.tolist() == [sum(value > row[label] for value in row) for row, label in zip(rows, labels)]
    assert {*kept.rank.tolist()} == {*range(7)}
    assert kept.confidence.tolist() == pytest.approx([max(softmax(row)) for row in rows])
    assert kept.target_probability.tolist() == pytest.approx([softmax(r)[label] for r, label in zip(rows, labels)])
    assert kept.plain_prediction.tolist() == list(map(first, before))
    assert kept.plain_confidence.tolist() == pytest.approx([max(softmax(row)) for row in before], rel=1e-4)
    assert kept.classes == tuple("abcdefg")
    right = [first(row) == label for row, label in zip(rows, labels)]
    was = [first(row) == label for row, label in zip(before, labels)]
    assert found["vs2_mended"] == sum(now and not then for now, then in zip(right, was)) > 0
    assert found["vs2_broken"] == sum(then and not now for now, then in zip(right, was)) > 0
    for name, confidence, correct in (("ece", kept.confidence, right), ("ece_before", kept.plain_confidence, was)):
        bins, error = bins_of(confidence.tolist(), correct)
        assert found[f"vs2_{name}"] == pytest.approx(error) and len(bins) > 3
        assert [row[0] for row in found[f"vs2_{name}_bins"]] == [row[0] for row in bins]
        told = found[f"vs2_{name}_bins"]
        assert told == [pytest.approx(row, abs=6e-7) for row in bins]
        assert told == [[count, round(mean, 6), round(accuracy, 6)] for count, mean, accuracy in told]


def test_equal_logits_stand_in_the_order_of_the_top_five():
    logits = torch.zeros(40, 7)
    logits[:, 5], logits[:, 6] = 1, -1
    order = logits.topk(5, dim=1).indices.tolist()
    target = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0] * 5)
    recorder, *_ = recorded(logits, target)
    expected = [row.index(label) if label in row else max(5, sum(logits[0] > logits[0, label]).item())
                for row, label in zip(order, target.tolist())]  # fmt: skip
    assert recorder._images.rank.tolist() == expected and {5, 6} & {*expected}


def test_two_classes_are_enough_and_several_labels_of_an_image_are_passed_over():
    recorder, *_ = recorded(torch.eye(2).repeat(20, 1), torch.zeros(40, dtype=torch.long), classes=2)
    assert recorder._images.rank.tolist() == [0, 1] * 20
    recorder = per_image.Recorder()
    recorder.finish(torch.zeros(4, 3), torch.zeros(4, 3), {})
    assert recorder.facts().keys() == {"vs2_seconds", "vs2_peak_memory"}


def test_what_is_left_out_of_the_time_is_only_that(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(per_image.time, "monotonic", lambda: now[0])
    recorder = per_image.Recorder()
    now[0] += 5
    with recorder._unmeasured():
        now[0] += 3
    with recorder._unmeasured():
        now[0] += 4
    now[0] += 2
    assert recorder.facts()["vs2_seconds"] == 7.0


def test_without_a_file_of_the_system_the_peak_is_that_of_the_whole_process(monkeypatch):
    resource = pytest.importorskip("resource")
    if torch.cuda.is_available():
        pytest.skip("it is the GPU's")

    def missing(*given):
        raise OSError

    monkeypatch.setattr(per_image.Path, "read_text", missing)
    for platform, unit in (("linux", 1024), ("darwin", 1)):
        monkeypatch.setattr(per_image.sys, "platform", platform)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert per_image._peak() == pytest.approx(unit * peak, rel=0.01)
