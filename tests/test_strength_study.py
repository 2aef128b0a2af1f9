"""The study of automatic strength runs, its tables say what its runs do, and a run says what the package does."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vs2_plugin.clip.backbone import load_backbone
from vs2_plugin.sae.config import TrainConfig
from vs2_plugin.sae.train import train_sae
from vs2_plugin.strength import RULE, Scores, choose, neighbour_graph

from .studies import run_script

QUICK = ("--jobs", "1", "--quick")
TINY = Path(__file__).parents[1] / "vs2_plugin" / "demo" / "tiny_clip"
ALPHAS = [0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0]


def here(script, *words):
    """What a script prints."""
    printed = run_script("strength", script, *words)
    assert printed.isascii()
    return printed


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The folder of a quick study of the development half, and what the command printed."""
    out = tmp_path_factory.mktemp("study")
    return out, here("run.py", *QUICK, "--out", out, "--half", "development")


def test_a_second_call_runs_nothing_anew(study):
    out, printed = study
    folder = out / "quick" / "development"
    assert "7 runs done, 0 were there" in printed
    before = (folder / "runs.jsonl").read_bytes()
    results = (folder / "results.md").read_text()
    clip = out / "quick" / "clips" / "small" / "open_clip_model.safetensors"
    trained = clip.stat().st_mtime_ns
    assert "0 runs done, 7 were there" in here("run.py", *QUICK, "--out", out, "--half", "development")
    assert (folder / "runs.jsonl").read_bytes() == before
    assert (folder / "results.md").read_text() == results
    assert clip.stat().st_mtime_ns == trained


def test_the_tables_follow_from_the_runs(study):
    folder = study[0] / "quick" / "development"
    *runs, session = read(folder / "runs.jsonl")
    assert session["session"]["runs"] == len(runs) == 7
    results = json.loads((folder / "results.json").read_text())
    assert {run["group"] for run in runs} == {"centre", "CLIP", "classes", "gallery", "latents", "k"}
    assert {one["setting"] for one in results["settings"]} == {run["setting"] for run in runs}
    text = (folder / "results.md").read_text()
    for run in runs:
        accuracy = run["accuracy"]
        assert ("vs2 auto, prior" in accuracy) == (run["classes"] != "balanced")
        assert len(accuracy) == 15 + (run["classes"] != "balanced") + (run["group"] == "centre")
        [one] = [one for one in results["settings"] if one["setting"] == run["setting"]]
        assert {name: method["mean"] for name, method in one["methods"].items()} == accuracy
        for name, method in one["methods"].items():
            assert method["change"]["mean"] == pytest.approx(accuracy[name] - accuracy["zero-shot"])
        start = f"| {run['setting']} | {accuracy['zero-shot']:.1f} | {accuracy['vs2']:.1f} |"
        row = next(line for line in text.splitlines() if line.startswith(start))
        cells = [cell for cell in row.strip("| ").split(" | ")[1:] if cell != "-"]
        assert cells == [f"{value:.1f}" for value in accuracy.values()]
        for name, choice in run["choices"].items():
            assert len(choice["information"]) == len(choice["candidates"]) == (20 if name == "vs2s" else 10)
            assert accuracy[name] == run["curves"][name][choice["index"]]
            assert accuracy["zero-shot"] == run["curves"][name][0]
    changes = [run["accuracy"]["vs2s"] - run["accuracy"]["zero-shot"] for run in runs]
    assert results["summary"]["means"]["all"]["vs2s"]["change"] == pytest.approx(np.mean(changes))
    assert (folder / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_intervals_are_over_seeds_and_paired(study, tmp_path):
    """Five seeds of two settings, of known differences."""
    run = read(study[0] / "quick" / "development" / "runs.jsonl")[0]
    differences = {  # of vs2 auto and of vs2s from zero-shot, and of the best in hindsight
        "one": ([-2, -1.5, -2, -2.5, -2], [-2, -1, -2, -2, -2.5], [0, 0, 0, 0, 0]),
        "two": ([3, 4, 5, 4, 4], [4, 5, 6, 5, 5.5], [5, 5, 5, 5, 5]),
    }
    with open(tmp_path / "runs.jsonl", "w") as file:
        for setting, rows in differences.items():
            for seed, (auto, selective, best) in enumerate(zip(*rows, strict=True)):
                plain = 50 + 7 * seed
                told = {"vs2 auto": plain + auto, "vs2s": plain + selective, "vs2 hindsight": plain + best}
                accuracy = {**dict.fromkeys(run["accuracy"], plain), **told}
                made = {**run, "setting": setting, "seed": seed, "accuracy": accuracy, "curves": {}}
                file.write(json.dumps(made) + "\n")
                file.write(json.dumps({**run, "setting": setting, "seed": seed}) + "\n")  # the first counts
        file.write('{"setting": "one", "se')  # cut short
    here("table.py", tmp_path / "runs.jsonl")
    results = json.loads((tmp_path / "results.json").read_text())
    summary = results["summary"]
    half = 2.7764451 * np.std(differences["one"][0], ddof=1) / 5**0.5
    one, two = results["settings"]
    assert one["methods"]["vs2 auto"]["change"] == pytest.approx({"mean": -2, "low": -2 - half, "high": -2 + half})
    assert one["methods"]["vs2 auto"]["sd"] == pytest.approx(
        np.std([50 + 7 * seed + d for seed, d in enumerate(differences["one"][0])], ddof=1)
    )
    assert [loss["setting"] for loss in summary["losses"]["vs2 auto"]] == ["one"]
    assert [loss["setting"] for loss in summary["losses"]["vs2s"]] == ["one"]
    assert summary["recovered"]["vs2 auto"] == pytest.approx({"gain": 1, "hindsight": 2.5, "share": 0.4})
    assert summary["selective"]["surely_better"] == ["two"] and summary["selective"]["surely_worse"] == []
    assert summary["selective"]["mean"] == pytest.approx((0.1 + 1.1) / 2)
    text = (tmp_path / "results.md").read_text()
    assert "-2.0 (-2.4 to -1.6)" in text and "40 % recovered" in text


def test_choices_are_those_of_the_rule_as_it_is_when_tables_are_made(study, tmp_path):
    """Evidence that speaks for the fourth candidate, and one that is better but not sure."""
    run = read(study[0] / "quick" / "development" / "runs.jsonl")[0]
    choice = run["choices"]["vs2 auto"]
    told = {name: [0] * 10 for name in Scores._fields}
    told |= {"information": [0, 0, 0, 1, 2, *[0] * 5], "information_errors": [0, 0, 0, 9, 0.1, *[0] * 5]}
    told["entropy"] = [2] * 10
    made = {**run, "choices": {**run["choices"], "vs2 auto": {**choice, **told, "index": 7}}}
    (tmp_path / "runs.jsonl").write_text(json.dumps(made) + "\n")
    here("table.py", tmp_path / "runs.jsonl")
    [one] = json.loads((tmp_path / "results.json").read_text())["settings"]
    assert one["chosen"]["vs2 auto"] == ["0.75"]
    assert one["methods"]["vs2 auto"]["mean"] == run["curves"]["vs2 auto"][3]
    printed = here("rule.py", tmp_path / "runs.jsonl")
    own = next(line for line in printed.splitlines() if line.endswith("<-"))
    gain = run["curves"]["vs2 auto"][3] - run["accuracy"]["zero-shot"]
    constants = ", ".join(f"{name} {value:g}" for name, value in RULE._asdict().items())
    assert own.startswith(f"{constants}: ") and f" {gain:+.2f} " in own


@pytest.mark.parametrize("script", ["table.py", "rule.py"])
def test_a_file_without_runs_is_refused(script, study, tmp_path, capsys):
    run = read(study[0] / "quick" / "development" / "runs.jsonl")[0]
    del run["curves"]  # as an earlier version wrote it
    (tmp_path / "old.jsonl").write_text(json.dumps(run) + "\n")
    for name in ("absent.jsonl", "old.jsonl"):
        with pytest.raises(SystemExit, match="2"):
            here(script, tmp_path / name)
        assert f"{name}: no runs in it; expected the runs.jsonl" in capsys.readouterr().err


def test_a_run_is_what_the_package_gives(study):
    """vs2 and its automatic strength, computed anew from the stored activations with dense codes."""
    root = study[0] / "quick"
    runs = {run["setting"]: run for run in read(root / "development" / "runs.jsonl") if "setting" in run}
    run = runs["printed digits, noisy, k = 8"]
    stored = np.load(root / "activations" / "tiny-printed-digits-noisy.npz")
    assert len(stored["test"]) == run["test_images"] == 500 and run["images"] == 900
    rows = np.random.default_rng(0).permutation(len(stored["pool"]))[:900]
    gallery = stored["pool"][rows]
    sae = train_sae(gallery, TrainConfig(k=8, samples=8_000, seed=0), quiet=True).sae
    loaded = load_backbone(f"local-dir:{TINY}", "")
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    with torch.no_grad():
        texts = loaded.model.encode_text(loaded.tokenizer([f"a photo of the digit {name}" for name in names]))
        weights = F.normalize(texts, dim=-1).T

        def embed(x, alpha):
            pre = (x - sae.b_dec) @ sae.encoder.weight.T + sae.encoder.bias
            code = pre.where(pre >= pre.topk(8, dim=1).values[:, -1:], torch.tensor(0.0)).relu()
            moved = x + alpha * code @ sae.W_dec
            moved *= x.norm(dim=1, keepdim=True) / moved.norm(dim=1, keepdim=True)
            return loaded.model.visual.ln_post(moved) @ loaded.model.visual.proj

        unlabeled, test = torch.from_numpy(gallery).float(), torch.from_numpy(stored["test"])
        graph = neighbour_graph(embed(unlabeled, 0).half())
        ways = [(embed(unlabeled, alpha) @ weights).argmax(1) for alpha in ALPHAS]
        found = choose([{"alpha": alpha} for alpha in ALPHAS], ways, graph, 10)
        labels = torch.from_numpy(stored["test_labels"])
        right = [(embed(test, alpha) @ weights).argmax(1) == labels for alpha in ALPHAS]
    accuracy = [100 * one.double().mean().item() for one in right]
    # An image or two may lie between two classes.
    assert run["curves"]["vs2 auto"] == pytest.approx(accuracy, abs=0.41)
    assert max(accuracy) - accuracy[0] > 2
    assert run["choices"]["vs2 auto"]["information"] == pytest.approx(found.scores.information, abs=0.01)
    assert run["choices"]["vs2 auto"]["index"] == found.index
    assert run["accuracy"]["vs2 auto"] == pytest.approx(accuracy[found.index], abs=0.41)


# ---- embeddings of a CLIP


def made_embeddings(classes, images, shift, seed=0):
    """Image and class embeddings, and labels: noisy class directions with a common shift towards the first."""
    rng = np.random.default_rng(seed)
    text = np.linalg.qr(rng.standard_normal((32, classes)))[0].T
    labels = np.arange(classes * images) % classes
    image = text[labels] + 0.12 * rng.standard_normal((len(labels), 32)) + shift * text[0]
    return image, labels, text


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory):
    """A file of embeddings whose zero-shot classes a shift has spoiled, and the folder of its study."""
    folder = tmp_path_factory.mktemp("embeddings")
    unlabeled, _, text = made_embeddings(6, 60, 1.0)
    test, labels, _ = made_embeddings(6, 40, 1.0)
    np.savez(
        folder / "mine.npz", unlabeled=(7 * unlabeled).astype(np.float16), test=test.astype(np.float32),
        test_labels=labels, text=text.astype(np.float32),
    )  # fmt: skip
    here("run.py", *QUICK, "--embeddings", folder / "mine.npz", "--out", folder / "out")
    return folder


def test_a_file_of_embeddings_is_studied_as_it_is(embeddings):
    rows = json.loads((embeddings / "out/quick/embeddings.json").read_text())
    methods = ["zero-shot", "vs2", "auto", "vs2s", "centring", "DN"]
    assert [(row["method"], row["seed"]) for row in rows] == [(name, 0) for name in methods]
    assert {(row["setting"], row["classes"], row["unlabeled"], row["test"]) for row in rows} == {("mine", 6, 360, 240)}
    by_method = {row["method"]: row for row in rows}
    with np.load(embeddings / "mine.npz") as file:
        image, text, labels = (file[name].astype(float) for name in ("test", "text", "test_labels"))
        mean = np.mean([row / np.linalg.norm(row) for row in file["unlabeled"].astype(float)], axis=0)
    image /= np.linalg.norm(image, axis=1, keepdims=True)

    def accuracy(image, text):
        return 100 * np.mean((image @ text.T).argmax(1) == labels)

    assert by_method["zero-shot"]["accuracy"] == pytest.approx(accuracy(image, text), abs=0.5)
    assert by_method["centring"]["accuracy"] == pytest.approx(accuracy(image - 1.05 / 2.05 * mean, text), abs=0.5)
    own = text - text.mean(0) / 4
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    assert by_method["DN"]["accuracy"] == pytest.approx(accuracy(image - mean / 4, own), abs=0.5)
    auto = by_method["auto"]
    assert auto["alpha"] > 0 and auto["accuracy"] > by_method["zero-shot"]["accuracy"] + 5
    index = auto["evidence"]["index"]
    assert auto["accuracy"] == auto["accuracies"][index] and auto["accuracies"][0] == by_method["zero-shot"]["accuracy"]
    assert len(by_method["vs2s"]["accuracies"]) == 20 and "standard errors" in auto["reason"]
    again = here("run.py", *QUICK, "--embeddings", embeddings / "mine.npz", "--out", embeddings / "out")
    assert json.loads((embeddings / "out/quick/embeddings.json").read_text()) == rows
    assert f"| mine | 6 | 360 | 240 | {rows[0]['accuracy']:.1f} | " in again


def test_settings_are_made_of_embeddings_with_labels(tmp_path):
    """A draw of real size, with few passes: classes that the halves do not share, and names of absent ones."""
    image, labels, text = made_embeddings(32, 4, 0.0)
    np.savez(tmp_path / "all.npz", image=image, label=labels, text=text, text_b=text[:, ::-1])
    words = ("--embeddings", tmp_path / "all.npz", "--out", tmp_path, "--only", "10 random classes, 2")
    seen = {}
    for half in ("development", "report"):
        printed = here("run.py", *QUICK, *words, "--half", half)
        rows = [row for row in json.loads((tmp_path / "quick/embeddings.json").read_text()) if row["half"] == half]
        seen[half] = [row["accuracy"] for row in rows if row["method"] == "zero-shot"]
        settings = list(dict.fromkeys(row["setting"] for row in rows))
        name = "10 random classes, 2 images"
        assert settings == [name, f"{name}, text_b", f"{name}, 6 absent"]
        assert [row["classes"] for row in rows[::6]] == [10, 10, 16] and rows[0]["unlabeled"] == rows[0]["test"] == 20
        assert printed.count(f"| {name}") == 3
        assert seen[half][0] > 90 > 50 > seen[half][1]
    assert len(json.loads((tmp_path / "quick/embeddings.json").read_text())) == 36


WRONG = {
    "no file": (None, "No such file"),
    "no arrays": ({}, "holds nothing; expected an .npz with unlabeled"),
    "no labels": ({"test_labels": None}, "holds unlabeled, test, text; expected"),
    "widths": ({"test": np.ones((4, 3))}, "test is float64 (4, 3)"),
    "one row": ({"unlabeled": np.ones((1, 5))}, "unlabeled is float64 (1, 5)"),
    "too few": ({}, "2 activations are too few to train an SAE"),
    "NaN": ({"text": np.full((3, 5), np.nan)}, "text holds NaN"),
    "zeros": ({"test": np.zeros((4, 5))}, "test holds rows of zeros"),
    "labels": ({"test_labels": np.array([0, 1, 2, 3])}, "goes from 0 to 3; expected 0 to 2"),
    "negative": ({"test_labels": np.array([0, -1, 2, 1])}, "goes from -1 to 2"),
    "other labels": ({"test_labels": np.array([0.0, 1, 2, 1])}, "test_labels is float64 (4,)"),
    "count": ({"test_labels": np.array([0, 1])}, "test_labels is int64 (2,)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_embeddings_that_cannot_be_used_are_refused(case, tmp_path, capsys):
    change, message = WRONG[case]
    arrays = {"unlabeled": np.ones((2, 5)), "test": np.ones((4, 5)), "test_labels": np.array([0, 1, 2, 1])}
    arrays = {**arrays, "text": np.ones((3, 5)), **(change or {})}
    if case != "no file":
        arrays = {} if case == "no arrays" else {name: array for name, array in arrays.items() if array is not None}
        np.savez(tmp_path / "mine.npz", **arrays)
    for content in (None, "no archive"):
        if content is not None:
            (tmp_path / "mine.npz").write_text(content)
        with pytest.raises(SystemExit, match="2"):
            here("run.py", *QUICK, "--embeddings", tmp_path / "mine.npz", "--out", tmp_path / "out")
        error = capsys.readouterr().err
        assert (message if content is None else "mine.npz: ") in error and "Traceback" not in error
