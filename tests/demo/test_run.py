"""The parts of the demo; tests/harness/test_demo.py runs the whole."""

import json
import os
import sys
from pathlib import Path

import pytest

from vs2_plugin.demo import run
from vs2_plugin.demo.run import MODEL, SYSTEMS, prepare, table, with_checkpoint
from vs2_plugin.errors import DataError, Vs2Error


def test_its_own_files_are_made_anew_and_a_strangers_left_alone(tmp_path):
    folder = tmp_path / "demo"
    prepare(folder)
    assert {path.name for path in folder.iterdir()} == {"digits", "tiny-clip", "results"}
    (folder / "results/old.json").write_text("old")
    (folder / "benchmark.csv").write_text("old")
    prepare(folder)
    assert {path.name for path in folder.iterdir()} == {"digits", "tiny-clip", "results"}
    assert list((folder / "results").iterdir()) == []
    (folder / "thesis.tex").write_text("precious")
    (folder / "results/old.json").write_text("old")
    with pytest.raises(DataError, match=r"holds thesis.tex, which the demo did not write; name an empty or new folder"):
        prepare(folder)
    assert (folder / "thesis.tex").read_text() == "precious" and (folder / "results/old.json").exists()


def test_a_checkpoint_stands_behind_the_backbone():
    assert with_checkpoint(f"vs2:{MODEL}@gate=0.9", "a,b") == f"vs2:{MODEL}@a,b@gate=0.9"
    assert with_checkpoint(MODEL, "a,b") == MODEL


@pytest.fixture
def write(tmp_path):
    """A function that writes a result."""

    def result(model, acc1, **more):
        about = {"dataset": "wds/digits", "pretrained": "", "task": "zeroshot_classification", "language": "en"}
        metrics = {"acc1": acc1, "mean_per_class_recall": acc1 / 2, **more}
        (tmp_path / f"{model}.json").write_text(json.dumps({**about, "model": model, "metrics": metrics}))

    return result


ROWS = {"plain": MODEL, "VS2": f"vs2:{MODEL}", "vote": f"knn:{MODEL}"}


def test_the_table_of_one_seed(write, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "SYSTEMS", ROWS)
    write(MODEL, 0.5, acc5=0.9)
    write(f"vs2:{MODEL}", 0.62, acc5=0.95, vs2_coverage=0.5)
    write(f"knn:{MODEL}", 0.45)
    assert table(tmp_path).splitlines() == [
        "| 897 test images | top-1 % | top-5 % | recall % | change of top-1 | coverage % |",
        "|---|---:|---:|---:|---:|---:|",
        "| plain | 50.00 | 90.00 | 25.00 |  |  |",
        "| VS2 | 62.00 | 95.00 | 31.00 | +12.00 | 50.0 |",
        "| vote | 45.00 |  | 22.50 | -5.00 |  |",
    ]


def test_the_table_of_several_seeds_has_mean_and_deviation_of_the_sample(write, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "SYSTEMS", {"plain": MODEL, "VS2": f"vs2:{MODEL}"})
    write(MODEL, 0.5)
    for seed, accuracy in ((1, 0.6), (2, 0.7)):
        write(f"vs2:{MODEL}@digits-seed{seed}", accuracy)
    title, _, plain, steered = table(tmp_path, [1, 2]).splitlines()
    assert title.startswith("| 897 test images, mean (sd) over SAE seeds 1, 2 | ")
    assert plain == "| plain | 50.00 |  | 25.00 |  |  |"  # one run, which no SAE takes part in
    assert steered == "| VS2 | 65.0 (7.1) |  | 32.5 (3.5) | +15.0 (7.1) |  |"


@pytest.mark.parametrize("quiet", [True, False])
def test_a_command_that_fails_ends_the_demo(quiet, tmp_path, monkeypatch, capsys):
    from clip_benchmark import cli

    def fail():
        assert sys.argv == ["clip_benchmark", "eval", "a word"]
        assert Path.cwd() == tmp_path / "demo" and os.environ["VS2_STORE"] == "store" != before["VS2_STORE"]
        print("said")
        print("a\nno luck\n", file=sys.stderr)
        raise SystemExit(3)

    before, place = dict(os.environ), Path.cwd()
    monkeypatch.setattr(cli, "main", fail)
    monkeypatch.setattr(run, "_steps", lambda seeds: iter([["vs2", "b"], ["clip_benchmark", "eval", "a word"]]))
    words = []
    with pytest.raises(Vs2Error, match=r"exit code 3: no luck$" if quiet else r"exit code 3$"):
        run.demo(tmp_path / "demo", {"vs2": words.append}, quiet)
    said = capsys.readouterr()
    assert words == [["b"]] and "$ vs2 b\n" in said.out and "$ clip_benchmark eval 'a word'\n" in said.out
    assert ("said" in said.out) == ("no luck" in said.err) == (not quiet)
    assert dict(os.environ) == before and Path.cwd() == place and sys.argv[0] != "clip_benchmark"


def test_mistakes_are_told_before_anything_is_written(monkeypatch, tmp_path, capsys):
    from vs2_plugin.cli.main import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    mistakes = {("--seed", "-1"): "seed is -1; expected a whole number from 0", ("--out", "file"): "--out 'file'"}
    for words, told in mistakes.items():
        assert main(["demo", *words]) == 2
        assert told in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_seeds_are_those_that_were_asked_for_each_once(monkeypatch, tmp_path):
    from vs2_plugin.cli.main import main

    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(run, "demo", lambda *given: asked.append(given))
    assert main(["demo", "--out", str(tmp_path), "--seed", "3", "1", "3", "--quiet"]) == 0
    assert main(["demo"]) == 0
    assert [given[2:] for given in asked] == [(True, [3, 1]), (False, [0])] and asked[0][0] == tmp_path
    assert asked[0][1].keys() == {"vs2", "vs2-train-sae"}


def test_its_models_are_ours_with_the_tiny_clip():
    from vs2_plugin.modelstring import is_steered, parse

    assert list(SYSTEMS.values()).count(MODEL) == 1 and len(set(SYSTEMS.values())) == len(SYSTEMS)
    assert {parse(model).backbone for model in SYSTEMS.values() if is_steered(model)} == {MODEL}
