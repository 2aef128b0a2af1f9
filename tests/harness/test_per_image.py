"""Per-image results beside the results file, where they are asked for."""

import json

import numpy as np
import pytest
import torch

import vs2_plugin

from .conftest import TINY, few_digits, metrics

NAME = "local-dir-tiny-clip_wds-digits"
DATA = ("--pretrained", "", "--dataset", "wds/few", "--dataset_root", "few", "--num_workers", "1", "--quiet")
MODELS = [TINY, f"vs2:{TINY}@{NAME}@gate=0.5", f"vs2pp:{TINY}@{NAME}", f"rag:{TINY}@{NAME}"]


@pytest.fixture
def evaluate(in_demo, clip_benchmark):
    few_digits(in_demo, "few", 1)

    def run(*models, **files):
        for path in in_demo.glob("i-*"):
            path.unlink()
        code, error = clip_benchmark("eval", "--model", *models, *DATA, "--output", "i-{model}.json")
        assert code == 0, error
        return [(metrics(in_demo / f"i-{model}.json"), in_demo / f"i-{model}.images.npz") for model in models]

    return run


def test_they_add_up_to_the_results(evaluate, monkeypatch):
    monkeypatch.setenv("VS2_PER_IMAGE", "1")
    digests = []
    for found, path in evaluate(*MODELS):
        images = np.load(path)
        assert len(images["digest"]) == 224 and images["classes"].tolist()[:2] == ["zero", "one"]
        assert (images["prediction"] == images["target"]).mean() == pytest.approx(found["acc1"])
        assert (images["rank"] == 0).mean() == pytest.approx(found["acc1"])
        assert (images["rank"] < 5).mean() == pytest.approx(found["acc5"])
        assert (images["confidence"] >= images["target_probability"]).all()
        assert ("fvu" in images) == ("vs2_mean_fvu" in found) and float(images["seconds"]) > 0
        if "fvu" in images:
            assert images["fvu"].mean() == pytest.approx(found["vs2_mean_fvu"], rel=1e-5)
            assert images["steered"].mean() == pytest.approx(found["vs2_coverage"])
        digests.append(images["digest"].tolist())
    assert all(one == digests[0] for one in digests) and len(set(digests[0])) == 224


@pytest.mark.parametrize("value", [None, "", "0"])
def test_nobody_asked_and_nothing_is_written(value, evaluate, monkeypatch):
    monkeypatch.delenv("VS2_PER_IMAGE", raising=False)
    if value is not None:
        monkeypatch.setenv("VS2_PER_IMAGE", value)
    ((_, path),) = evaluate(MODELS[1])
    assert not path.exists()


def test_results_gain_what_is_measured_and_are_the_same_otherwise(evaluate, monkeypatch):
    without = [found for found, _ in evaluate(*MODELS[:3])]
    monkeypatch.setenv("VS2_PER_IMAGE", "1")
    for (found, _), usual in zip(evaluate(*MODELS[:3]), without, strict=True):
        assert found == usual


def test_time_memory_and_calibration_stand_beside_accuracy(evaluate, monkeypatch):
    monkeypatch.setenv("VS2_PER_IMAGE", "1")
    for _, path in evaluate(*MODELS[:2]):
        found = json.loads(path.with_suffix("").with_suffix(".json").read_text())["metrics"]
        images = np.load(path)
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
