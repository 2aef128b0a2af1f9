"""The studies of rivals and of SAEs run, on a small file of embeddings, and their numbers are of what is in it."""

import json
from functools import partial
from importlib import import_module

import numpy as np
import pytest

from .studies import run_script


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Embeddings ``[80, 32]`` of four classes, apart enough that most are classified right."""
    rng = np.random.default_rng(0)
    text = rng.normal(size=(4, 32))
    label = np.arange(80) % 4
    path = tmp_path_factory.mktemp("studies") / "small.npz"
    np.savez(path, text=text, label=label, image=text[label] + 1.5 * rng.normal(size=(80, 32)) + 0.5)
    return path


def right(file):
    """The share of the images, the second half of each class, that CLIP classifies right, in percent."""
    with np.load(file) as held:
        image, text, label = (held[name][40:] if name != "text" else held[name] for name in ("image", "text", "label"))
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (image, text)]
    return 100 * ((unit[0] @ unit[1].T).argmax(1) == label).mean()


def test_rivals_beside_each_other(file):
    methods = ("centre", "vs2", "dn", "zlap", "tda:vs2s", "stata", "inmap")
    printed = run_script("rivals", "run.py", "embeddings", file, "--unlabeled", 10, "--only", "", *methods)
    rows = [line.split(" | ") for line in printed.splitlines()[2:]]
    assert {row[1].strip("`").partition("@")[0] for row in rows} == {"", *methods}
    assert float(rows[0][2]) == pytest.approx(right(file)) and all(0 <= float(row[2]) <= 100 for row in rows)


def test_rivals_on_subsets(file):
    small = {name: (lambda labels, draw: np.arange(40) * 2, 2) for name in ("all", "some")}
    changed = {"METHODS": ("dn", "tda", "inmap@steps=5@sinkhorn=20"), "SUBSETS": small, "BATCHES": small}
    printed = run_script("rivals", "stress.py", file, "all", **changed)
    assert printed.count("40 images, 2 draws: CLIP ") == 4 and printed.count("    inmap@steps=5@sinkhorn=20 ") == 4


def small(file):
    return partial(import_module("sources").embeddings, file)()


def test_ways_to_train_beside_each_other(file, tmp_path):
    few = ("--samples", 500, "--no_digits", "--only", "plain", "matryoshka", "batch_topk", "archetypal", "off_l1_1")
    run_script("quality", "variants.py", "--out", tmp_path, "--embeddings", file, *few)
    lines = [json.loads(line) for line in (tmp_path / "variants.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == [0, 1, 2] * 5
    assert all(line["zero_shot"] == pytest.approx(right(file) / 100) for line in lines)
    assert (tmp_path / "variants.md").read_text().count("| matryoshka |") == 1


def test_figures_of_saes_beside_what_steering_gains(file, tmp_path):
    shapes, others = [(4, 2, 300), (8, 2, 500)], ("batch_topk",)
    changed = {"EMBEDDINGS": shapes, "OTHERS": others, "SEEDS": (0, 1), "digits": partial(small, file)}
    run_script("quality", "steering.py", "--out", tmp_path, **changed)
    lines = [json.loads(line) for line in (tmp_path / "steering.jsonl").read_text().splitlines()]
    assert [line["training"] for line in lines] == ["plain", "plain", "PASS", "PASS"] * 2 + ["batch_topk"] * 2
    for name in ("steering.md", "correlations.md", "centring.md", "steering.svg"):
        assert (tmp_path / name).stat().st_size > 100


def test_saes_of_few_images_beside_principal_components(file, tmp_path):
    changed = {"COUNTS": (20, 40), "SEEDS": (0,), "digits": partial(small, file)}
    run_script("quality", "little_data.py", "--out", tmp_path, "--samples", 300, **changed)
    lines = [json.loads(line) for line in (tmp_path / "little_data.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == [20] * 4 + [40] * 4
    assert len((tmp_path / "little_data.md").read_text().splitlines()) == 2 + 8
