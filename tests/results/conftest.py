"""Result files as clip_benchmark and this package write them, from seeded random predictions."""

import json
import shutil

import numpy as np
import pytest

CLASSES = ["cat", "dog", "fox", "owl", "bee", "ant"]


@pytest.fixture(scope="session")
def make_images():
    """A function that gives the arrays of a run: images are the same for all, their order is the run's own."""

    def make(accuracy, order_seed=0, count=600, classes=CLASSES, sae=False, before=None, **changes):
        rng = np.random.default_rng(7)
        digest = rng.integers(0, 2**64, count, dtype=np.uint64)
        target = rng.integers(0, len(classes), count).astype(np.int32)
        difficulty, other, fvu = rng.random(count), rng.integers(1, len(classes), count), rng.gamma(4, 0.05, count)
        correct = difficulty < accuracy
        prediction = np.where(correct, target, (target + other) % len(classes)).astype(np.int32)
        confidence = (0.4 + 0.6 * rng.random(count)).astype(np.float32)
        arrays = {
            "digest": digest,
            "target": target,
            "prediction": prediction,
            "confidence": confidence,
            "target_probability": np.where(correct, confidence, 0.1).astype(np.float32),
            "rank": (~correct).astype(np.int32),
        }
        if sae:
            arrays |= {"fvu": fvu.astype(np.float32), "steered": np.ones(count, bool)}
        if before is not None:  # what the plain model of that accuracy gives, recorded in the same run
            plain = make(before, count=count, classes=classes)
            undo = np.argsort(np.random.default_rng(0).permutation(count))
            arrays |= {f"plain_{name}": plain[name][undo] for name in ("prediction", "confidence")}
        order = np.random.default_rng(order_seed).permutation(count)
        arrays = {name: array[order] for name, array in arrays.items()}
        return arrays | {
            "seconds": np.float64(1.5), "peak_memory": np.int64(2_000_000_000), "classes": np.array(classes), **changes
        }  # fmt: skip

    return make


def writer(root):
    """A function that writes one result, with its per-image results where they are given, and returns its path."""

    def write(model, acc1=0.5, images=None, folder="results", name=None, **content):
        where = root / folder
        where.mkdir(exist_ok=True)
        path = where / f"{name or model.replace('/', '-')}.json"
        metrics = {"acc1": acc1, "acc5": 0.9, "mean_per_class_recall": acc1, **content.pop("metrics", {})}
        if images is not None:
            metrics["acc1"] = float((images["prediction"] == images["target"]).mean())
            np.savez_compressed(path.with_suffix(".images.npz"), **images)
        result = {
            "dataset": "wds/animals",
            "model": model,
            "pretrained": "laion",
            "task": "zeroshot_classification",
            "metrics": metrics,
            "language": "en",
            **content,
        }
        path.write_text(json.dumps(result))
        return path

    return write


@pytest.fixture
def write_run(tmp_path):
    """That function, for the folder of a test."""
    return writer(tmp_path)


@pytest.fixture(scope="session")
def steered():
    """A function that gives the metrics that a steered model adds."""

    def facts(method="vs2", labels="none", **more):
        found = {"method": method, "labels": labels, "checkpoint": "sae", "site": "block.11", "coverage": 1.0, **more}
        return {f"vs2_{name}": value for name, value in found.items()}

    return facts


@pytest.fixture(scope="session")
def all_results(tmp_path_factory, make_images, steered):
    """A folder of results in which every part of the report finds its data; not to be written to."""
    root = tmp_path_factory.mktemp("all")
    write_run = writer(root)
    write_run("B", images=make_images(0.5))
    runs = (
        ("vs2", None, "none", 0.6),
        ("vs2", 0.9, "none", 0.57),
        ("vs2", 0.99, "none", 0.59),
        ("pass", None, "train", 0.62),
        ("other", None, "oracle", 0.8),
    )
    for seed, (method, gate, labels, accuracy) in enumerate(runs, 1):
        facts = steered(method, labels, alpha=1.05, gamma=1.5, lam=2.1, coverage=gate or 1.0)
        if gate:
            facts |= {"vs2_gate": gate, "vs2_gate_threshold": 0.3}
        write_run(
            f"{method}:B" + (f"@gate={gate}" if gate else ""),
            images=make_images(accuracy, seed, sae=True),
            metrics=facts,
        )
    for gamma in (1.5, 2.0):
        for lam in (1.0, 2.0):
            write_run(
                f"vs2:B@gamma={gamma:g}@lam={lam:g}", 0.5 + 0.02 * gamma * lam,
                metrics=steered(alpha=lam * (gamma - 1), gamma=gamma, lam=lam),
            )  # fmt: skip
    for n in (10, 50):
        write_run(f"selective:B@n={n}", 0.6, metrics=steered("selective", n=n))
    return root / "results"


@pytest.fixture
def results(all_results, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(all_results, tmp_path / "results")
