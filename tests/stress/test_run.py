"""``vs2 stress`` on the demo's digits: what it says is what becomes of the very same models on those images."""

import csv
from itertools import pairwise

import numpy as np
import pytest
import torch

import vs2_plugin
from vs2_plugin.cli.main import main
from vs2_plugin.data.images import image_digest
from vs2_plugin.demo.digits import CLASSES, TEMPLATES, read_digits
from vs2_plugin.method import Method
from vs2_plugin.plugins import registry
from vs2_plugin.stress import run
from vs2_plugin.stress.outcomes import Outcome
from vs2_plugin.stress.request import StressRequest
from vs2_plugin.stress.subsets import batch, few, long_tail, of_classes

from .conftest import DIGITS, TINY


@pytest.fixture
def stubborn(monkeypatch):
    """A stream method that sees no class that was not predicted in the last five images, but for the first five."""

    def build(context):
        last = []

        def read(x):
            logits = 100 * x @ context.classifier
            if len(last) >= 5:
                absent = torch.ones(len(CLASSES), dtype=torch.bool)
                absent[last[-5:]] = False
                logits = logits.masked_fill(absent, -100.0)
            last.append(int(logits.argmax()))
            return logits

        return read

    monkeypatch.setitem(registry().methods, "stubborn", Method("stubborn", build, site="logits", protocol="stream"))


def test_models_on_subsets_against_zero_shot_on_the_same_images(stubborn, in_demo, capsys):
    models = [f"vs2:{TINY}@alpha=1", f"dn:{TINY}@unlabeled=test", f"stubborn:{TINY}"]
    words = ["--present", "0.5", "--tail", "10", "--images", "60", "--batches", "3", "--draws", "2"]
    words += ["--output", "stressed"]
    assert main(["stress", "--model", *models, "--pretrained", "", *DIGITS[:-2], "--no_amp", *words]) == 0
    said = capsys.readouterr().out
    with open(in_demo / "stressed/stress.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["model"] for row in rows} == {TINY, *models}
    assert "order of the stream: by class" in said and "dn @unlabeled=test (transductive)" in said
    assert (in_demo / "stressed/stress.png").stat().st_size > 10_000

    def found(model, axis):
        return [row for row in rows if row["model"] == model and row["axis"] == axis]

    for model in models:
        wholes = found(model, "all")
        assert len(wholes) == 2 and len(found(model, "tail")) == 2 and len(found(model, "images")) == 2
        assert all(row["zero_shot"] == zero["accuracy"] for row, zero in zip(wholes, found(TINY, "all"), strict=True))
        assert {int(row["images"]) for row in found(model, "images")} == {60}
        assert {int(row["classes"]) for row in found(model, "present")} == {5}
        assert {(row["images"], row["classes"]) for row in found(model, "batch")} == {("64", "3")}
    # What does not depend on other images is the same in every draw of all images; a stream class by class is not.
    assert len({row["accuracy"] for row in found(models[0], "all")}) == 1
    ordered, mixed = (np.mean([float(row["accuracy"]) for row in found(models[2], axis)]) for axis in ("order", "all"))
    assert not found(models[0], "order") and ordered != mixed
    # A method that sees all test images sees those of the subset, and no others.
    pictures, digits = read_digits("test")
    order = [number for shard in range(4) for number in range(shard, len(digits), 4)]  # as the shards hold them
    model, transform, _ = vs2_plugin.load(models[1], classes=CLASSES, prompts=TEMPLATES, amp=False)
    order = sorted(order, key=lambda number: image_digest(transform(pictures[number])))  # draws do not depend on shards
    images, labels = [pictures[number] for number in order], np.array(digits)[order]
    for row in found(models[1], "images"):
        rows = few(labels, 60, int(row["draw"]))
        predictions = model.classify([images[index] for index in rows]).labels.numpy()
        assert float(row["accuracy"]) == pytest.approx((predictions == labels[rows]).mean())


def test_an_outcome_is_of_the_images_of_its_subset():
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 2])
    zero_shot, predicted = np.array([0, 1, 2, 0, 1, 2, 0, 0, 0, 0]), np.array([0, 0, 1, 1, 2, 0, 2, 2, 2, 2])
    rows = np.array([4, 0, 2, 1, 3])  # right: all but 4 and 2
    [found] = run._judged("m", "image", labels, zero_shot, [("present", "0.5", 1, rows)], lambda rows: predicted[rows])
    assert found == Outcome("m", "image", "present", "0.5", 1, 5, 2, 3 / 5, (2 / 3 + 1 / 2) / 2, 2 / 5)


def test_every_draw_has_its_own_subsets():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), 20))
    limits = {"present": (0.5,), "tail": (10.0,), "images": (40, 80, 100), "batches": (2,), "draws": 2}
    request = StressRequest(model=("dn:X",), dataset="x", **limits)
    found = {(axis, value, draw): rows for axis, value, draw, rows in run._subsets(labels, request)}
    assert [key for key in found if key[2] == 1] == [
        ("all", "", 1), ("present", "0.5", 1), ("tail", "10", 1), ("images", "40", 1), ("batch", "2", 1)
    ]  # fmt: skip
    assert sorted(found["all", "", 0]) == sorted(found["all", "", 1]) == list(range(80))
    for draw in range(2):
        assert np.array_equal(found["present", "0.5", draw], of_classes(labels, 0.5, draw))
        assert np.array_equal(found["tail", "10", draw], long_tail(labels, 10, draw))
        assert np.array_equal(found["images", "40", draw], few(labels, 40, draw))
        assert np.array_equal(found["batch", "2", draw], batch(labels, 64, 2, 2, draw))
    orders = [(axis, value, draw, list(labels[rows])) for axis, value, draw, rows in run._orders(labels, request)]
    for axis, value, _, classes in orders:
        assert (axis, value) == ("order", "by class") and sorted(classes) == sorted(labels)
        assert sum(one != other for one, other in pairwise(classes)) == 3  # each class in one piece
    assert [draw for *_, draw, _ in orders] == [0, 1] and orders[0][3] != orders[1][3]


def test_what_there_are_too_few_images_for_is_said(caplog):
    labels = np.repeat(np.arange(4), 12)
    limits = {"present": (0.5, 0.25, 0.1), "tail": (12.0, 100.0), "images": (47, 48), "batches": (2,)}
    run._warn_of_few(labels, StressRequest(model=("dn:X",), dataset="x", **limits))
    assert [record.getMessage() for record in caplog.records] == [
        "--present 0.1 of 4 classes is less than one class: one is taken",
        "--tail 100: the smallest class has 12 image(s), so the most frequent class has at most 12 times as many "
        "images as the rarest",
        "--images 48 is left out: there are only 48 images",
        "--batches 2: so many classes may have only 24 images, not 64",
    ]


def test_two_names_of_one_outcome_before_the_end_of_the_tower(in_demo):
    images = list(read_digits("train")[0][:200])
    vs2_plugin.train(images, model=TINY, pretrained="", blocks=(0,), name="inner", samples=2000, quiet=True)
    models = [f"vs2:{TINY}@inner@alpha=1", f"vs2:{TINY}@inner@gamma=2@lam=1"]
    words = ["--present", "0.5", "--draws", "1", "--output", "twice", "--quiet"]
    assert main(["stress", "--model", *models, "--pretrained", "", *DIGITS[:-2], "--no_amp", *words]) == 0
    with open(in_demo / "twice/stress.csv", encoding="utf-8") as file:
        rows = [{**row, "model": ""} for row in csv.DictReader(file) if row["model"] in models]
    assert len(rows) >= 4 and rows[: len(rows) // 2] == rows[len(rows) // 2 :]


def test_several_values_of_an_option_are_for_a_sweep(in_demo, capsys):
    assert main(["stress", "--model", f"vs2:{TINY}@alpha=0,1", "--pretrained", "", *DIGITS[:-2]]) == 2
    assert "expected one value for each option; vs2 sweep takes several" in capsys.readouterr().err
