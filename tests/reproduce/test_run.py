"""Running a table: its numbers, what is not done twice, what cannot be done."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from vs2_plugin.cli import train_sae
from vs2_plugin.cli.main import main
from vs2_plugin.demo.digits import write_digits
from vs2_plugin.demo.run import _clip_benchmark
from vs2_plugin.errors import DataError
from vs2_plugin.reproduce import run as module
from vs2_plugin.reproduce.reading import read
from vs2_plugin.reproduce.run import Reproduction
from vs2_plugin.results.images import Images, images_file

from ..harness.conftest import at, few_digits, installed
from .conftest import SMALL, run_here

AGAIN = ("reproduce", "small.yaml", "--stand_in", "digits", "--out", "out")


def commands(text: str, name: str) -> list[list[str]]:
    """The commands of that name in what was printed."""
    lines = [line.removeprefix("$ ") for line in text.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith(f"{name} ")]


def evaluated(text: str) -> list[str]:
    """The models that the printed evaluations name."""
    return [
        model
        for line in commands(text, "clip_benchmark")
        for model in line[line.index("--model") + 1 : line.index("--pretrained")]
    ]


def results(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in folder.glob("out/results/*/*.json")}


def test_the_numbers_are_those_of_the_results(finished):
    cells = json.loads((finished.out / "small.json").read_text())["cells"]
    found = {cell["column"]: cell for cell in cells if cell["row"] == "VS2"}
    accuracy, gains, best, explained = {}, {}, {}, []
    plain = np.load(next(finished.out.glob("results/*/local-dir:tiny-clip.images.npz")))
    for seed in (0, 1):
        file = next(finished.out.glob(f"results/*/vs2:*seed{seed}@gate=0.9.json"))
        images = np.load(file.with_suffix(".images.npz"))
        explained.append(images["fvu"])
        right, was = ({d: p == t for d, p, t in zip(*map(i.get, ("digest", "prediction", "target")), strict=True)}
                      for i in (images, plain))  # fmt: skip
        accuracy[str(seed)] = 100 * json.loads(file.read_text())["metrics"]["acc1"]
        of_class = dict(zip(images["digest"], images["target"], strict=True))
        by_class = [
            100 * np.mean([float(right[d]) - float(was[d]) for d in right if of_class[d] == number])
            for number in range(10)
        ]
        gains[str(seed)], best[str(seed)] = by_class[0], max(by_class)  # the class zero stands in for the tractor
    for column, expected in (("accuracy", accuracy), ("gain", gains), ("best gain", best)):
        assert found[column]["values"] == pytest.approx(expected)
        assert found[column]["measured"] == pytest.approx(np.mean(list(expected.values())))
        assert found[column]["spread"] == pytest.approx(np.std(list(expected.values()), ddof=1))
        assert found[column]["published"] is found[column]["difference"] is None
    assert not np.allclose(*explained, rtol=1e-3)  # the seeds are two SAEs
    assert {cell["measured"] for cell in cells if cell["row"] == "others"} == {None}


def test_what_is_printed_is_the_table_and_the_commands(finished):
    assert (finished.out / "small.md").read_text() in finished.output
    assert re.search(r"\| VS2 +\| accuracy +\| top-1 % +\| +\d\d\.\d\d \+- \d\.\d\d \|\n", finished.output)
    assert "Stand-in: the tiny CLIP" in finished.output and "64.52" not in finished.output
    assert len(commands(finished.output, "vs2-train-sae")) == len(commands(finished.output, "clip_benchmark")) == 1
    assert len(evaluated(finished.output)) == 3
    models = evaluated(finished.output)
    expected = [f"[{number} of 3] {model} on wds/digits" for number, model in enumerate(models, 1)]
    assert [line for line in finished.output.splitlines() if line.startswith("[")] == expected
    assert "vs2 report out/results" in finished.output
    assert "Traceback" not in finished.errors


def typed_here(lines, folder, programs):
    """Run in this process what a shell makes of the lines: programs of these names write down how they are called."""
    mains = {"vs2-train-sae": train_sae.main, "clip_benchmark": _clip_benchmark, "vs2": main}
    programs.mkdir()
    for name in mains:
        (programs / name).write_text(f"#!/bin/sh\n{{ printf '%s\\0' {name} \"$@\"; echo; env -0; echo; }} >> calls\n")
        (programs / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["bash", "-e"], input="\n".join(lines), cwd=folder, env=env, text=True, check=True)
    called = (folder / "calls").read_text().split("\0\n")[:-1]
    for call, exported in zip(called[::2], called[1::2], strict=True):
        name, *rest = call.split("\0")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            for variable, value in (one.split("=", 1) for one in exported.split("\0")):
                patch.setenv(variable, value)
            assert not mains[name](rest)


def test_the_printed_commands_can_be_typed(finished, tmp_path):
    """In a folder of their own, as a shell reads them, they give the same results."""
    (tmp_path / "small.yaml").write_text(SMALL.replace("seeds: [0, 1]", "seeds: [1]"))
    dry = run_here(*AGAIN[1:-1], str(tmp_path / "out"), "--dry_run", cwd=tmp_path)
    assert dry.returncode == 0 and not (tmp_path / "out").exists()
    lines = [line for line in dry.stdout.splitlines() if not line.startswith("cd ")]
    out = tmp_path / "out"
    out.mkdir()
    for name in ("digits", "tiny-clip"):
        (out / name).symlink_to(finished.out / name)
    typed_here(lines, out, tmp_path / "bin")
    typed, run = results(tmp_path), results(finished.folder)
    assert len(typed) == 2
    for name, file in typed.items():
        metrics, others = (json.loads(path.read_text())["metrics"] for path in (file, run[name]))
        # Alone, an SAE is trained by other matrix products than beside that of another seed.
        assert metrics.keys() == others.keys() and metrics["acc1"] == pytest.approx(others["acc1"], abs=0.01)


def test_what_exists_is_not_done_again(copied, capsys):
    assert main([*AGAIN, "--quiet"]) == 0
    text = capsys.readouterr().out
    assert text == "\n" + (copied / "out" / "small.md").read_text()
    assert main([*AGAIN, "--dry_run"]) == 0
    assert commands(capsys.readouterr().out, "vs2-train-sae") == []


def damage_digest(copied):
    for file in results(copied).values():
        file.write_text(re.sub(r'("vs2_checkpoint_digest": ")....', r"\g<1>ffff", file.read_text()))
    return 2  # the plain model has no checkpoint


def damage_results(copied):
    file = results(copied)["local-dir:tiny-clip"]
    file.write_text(file.read_text()[:100])
    return 1


def damage_images(copied):
    next(copied.glob("out/results/*/*seed1*.npz")).unlink()
    return 1


def damage_dataset(copied):
    file = results(copied)["local-dir:tiny-clip"]
    file.write_text(file.read_text().replace("wds/digits", "wds/others"))
    return 1


@pytest.mark.parametrize("damage", [damage_digest, damage_results, damage_images, damage_dataset])
def test_results_that_are_not_whole_or_of_another_checkpoint_are_evaluated_again(damage, copied, capsys):
    count = damage(copied)
    assert main([*AGAIN, "--dry_run"]) == 0
    text = capsys.readouterr().out
    assert len(evaluated(text)) == count and commands(text, "vs2-train-sae") == []


def test_a_missing_or_damaged_checkpoint_is_trained_again(copied, capsys):
    one, _ = sorted(copied.glob("out/store/checkpoints/*-seed*"))
    (one / "vs2.json").unlink()
    assert main([*AGAIN, "--dry_run"]) == 0
    text = capsys.readouterr().out
    (train,) = commands(text, "vs2-train-sae")
    assert {"--overwrite", "--no_amp", one.name} < set(train)
    assert [model for model in evaluated(text) if "seed" in model] == [f"vs2:local-dir:tiny-clip@{one.name}@gate=0.9"]


def test_after_an_interruption_nothing_is_evaluated_twice(tmp_path):
    strengths = "".join(f'  "{number}": {{options: {{lam: {number}}}}}\n' for number in range(1, 6))
    text = SMALL.partition("columns:")[0].replace("seeds: [0, 1]", "seeds: [0]")
    text += f"columns:\n  accuracy: {{}}\nmodel: 'vs2:{{backbone}}@gate=0.9'\nrows:\n{strengths}"
    (tmp_path / "small.yaml").write_text(text)
    write_digits(tmp_path / "digits")
    few_digits(tmp_path, "out/digits", 0, count=64)
    env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    command = installed("vs2", *AGAIN)
    first = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             start_new_session=True)  # fmt: skip
    deadline = time.monotonic() + 200
    while len(list(tmp_path.glob("out/results/*/*.npz"))) < 2:
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGINT)
    output, errors = first.communicate(timeout=60)
    assert first.returncode == 130
    assert "interrupted; finished work is kept in out" in errors and "run the same command to continue" in errors
    assert "Traceback" not in errors and "|" not in output.rpartition("$ clip_benchmark")[2]
    assert "nanobind" not in errors
    assert (tmp_path / "out/log.txt").read_text().startswith("\n$ clip_benchmark eval --model ")
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("out/results/*/*.npz")}
    assert 2 <= len(before) < 5

    second = run_here(*AGAIN[1:], cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert commands(second.stdout, "vs2-train-sae") == []
    assert len(evaluated(second.stdout)) == 5 - len(before)
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("out/results/*/*.npz")}
    assert len(after) == 5 and before.items() <= after.items()
    cells = json.loads((tmp_path / "out" / "small.json").read_text())["cells"]
    assert all(cell["measured"] > 0 for cell in cells)


MISSING = """\
title: Missing things
sae: {samples: 5000}
columns:
  digits: {dataset: wds/digits, backbone: "local-dir:CLIP,"}
  elsewhere: {dataset: wds/elsewhere, backbone: "local-dir:CLIP,"}
  no weights: {dataset: wds/digits, backbone: "ViT-B-32-quickgelu,openai"}
  no model: {dataset: wds/digits, backbone: "ViT-B-99,openai"}
rows:
  plain: {model: "{backbone}"}
  VS2: {model: "vs2:{backbone}"}
published:
  plain: [58, 58, 58, 58]
  VS2: [[1, 10], null, 64.52, null]
"""


def test_what_is_missing_is_told_for_each_cell_and_the_rest_goes_on(finished, tmp_path):
    (tmp_path / "missing.yaml").write_text(MISSING.replace("CLIP", str(finished.out / "tiny-clip")))
    shutil.copytree(finished.out / "digits", tmp_path / "digits")
    few_digits(tmp_path, "data/digits", 0, count=25)
    for split in ("train", "test"):  # as many shards as clip_benchmark has workers, by default
        folder = tmp_path / "data/digits" / split
        for number in (1, 2, 3):
            shutil.copy(folder / "0.tar", folder / f"{number}.tar")
        (folder / "nshards.txt").write_text("4\n")
    root = str(tmp_path / "data/{dataset}")
    run = ("missing.yaml", "--dataset_root", root, "--out", "o{u}t")
    done = run_here(*run, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "6 of 8 cells could not be measured" in done.stderr
    expected = {
        "'elsewhere'": "wds/elsewhere is missing",
        "'no weights'": "the weights of ViT-B-32-quickgelu,openai cannot be obtained",
        "'no model'": "open_clip has no model 'ViT-B-99'",
    }
    for text in (done.stdout, (tmp_path / "o{u}t" / "missing.md").read_text()):
        lines = [line for line in text.splitlines() if line.startswith("Not measured")]
        assert len(lines) == 3  # one of each reason
        for column, reason in expected.items():
            (line,) = [line for line in lines if line.startswith(f"Not measured, 2 cells (column {column}): ")]
            assert reason in line
    # How to get it stands once, at the end.
    for remedy in ("make webdataset shards in ", "write 'MODEL,PATH' for the backbone"):
        assert done.stderr.count(remedy) == 1 and remedy not in done.stdout
    assert done.stdout.count("# looking for the weights of ViT-B-32-quickgelu,openai") == 1
    # Said when it is found, the folder that only the user can fill before all others.
    early = [line for line in done.stderr.splitlines() if line.startswith("vs2: warning: missing: ")]
    assert [part in line for part, line in zip(("elsewhere", "ViT-B-32", "ViT-B-99"), early, strict=True)] == [True] * 3
    assert all(len(line) < 250 for line in early)
    cells = json.loads((tmp_path / "o{u}t" / "missing.json").read_text())["cells"]
    measured = {(c["row"], c["column"]): c for c in cells if c["measured"] is not None}
    assert list(measured) == [("plain", "digits"), ("VS2", "digits")]
    plain, steered = measured.values()
    assert plain["difference"] == pytest.approx(plain["measured"] - 58)
    assert steered["difference"] == pytest.approx(steered["measured"] - 10)
    assert re.search(
        r"\| VS2 +\| digits +\| top-1 % \| 1\.00 to 10\.00 \| +\d\d\.\d\d \| +\+\d\d\.\d\d \|", done.stdout
    )
    # A path cannot stand in a file's name: these models have commands of their own.
    assert len(commands(done.stdout, "clip_benchmark")) == 2


def test_a_training_that_fails_is_told_and_the_rest_goes_on(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(finished.out)
    (tmp_path / "table.yaml").write_text(MISSING.replace("CLIP", "tiny-clip"))
    table = read(tmp_path / "table.yaml")
    table = type(table)(table.path, "T", "", (), tuple(cell for cell in table.cells if cell.column == "digits"))

    def train(request, report):
        raise DataError("no\nluck")

    monkeypatch.setattr(module, "train", train)
    work = Reproduction([table], tmp_path / "out", "{dataset}")
    monkeypatch.setattr(work, "_command", lambda batch: "not this time")
    work.run()
    (text,), missing = work.finish()
    assert missing == 2
    assert "Not measured, 1 cell (plain / digits): not this time" in text
    assert "Not measured, 1 cell (VS2 / digits): no luck" in text


def test_what_a_loader_says_of_an_interruption_is_no_failed_training(copied, tmp_path, monkeypatch):
    from vs2_plugin.reproduce.stand_in import stand_in

    def train(request, report):
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("DataLoader worker (pid(s) 1) exited unexpectedly")

    monkeypatch.setattr(module, "train", train)
    work = Reproduction([stand_in(read(copied / "small.yaml"))], tmp_path / "out", "digits")
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        work._train(next(cell.sae for cell in work.cells if cell.sae), [0])
    assert work.problems == {}


def test_one_model_that_fails_does_not_keep_the_others_from_it(copied, monkeypatch):
    """The command stops at a model; those behind it are evaluated, and nobody else is blamed."""
    from vs2_plugin.reproduce.stand_in import stand_in

    at(copied / "out", monkeypatch)
    work = Reproduction([stand_in(read(copied / "small.yaml"))], Path(), "digits")
    ((*runs,),) = [
        [*dict.fromkeys(run for cell in work.cells for seed in cell.seeds for run in cell.evaluations(seed))]
    ]
    kept = {}
    for run in runs:
        kept[run.model] = work.results(run).read_bytes()
        work.results(run).unlink()
    calls = []

    def command(batch):
        calls.append(batch)
        for run in batch:
            if run == runs[bad]:
                return "no luck"
            work.results(run).write_bytes(kept[run.model])
        return None

    monkeypatch.setattr(work, "_command", command)
    bad = 1
    work.run()
    assert work.problems == {runs[1]: ("no luck",)}
    assert [len(batch) for batch in calls] == [3, 2, 1, 1]


def test_a_class_that_is_not_there_is_told(copied):
    from vs2_plugin.reproduce.run import _gain

    plain = results(copied)["local-dir:tiny-clip"]
    with pytest.raises(DataError, match="there is no class 'tractor'; the classes: zero, one"):
        _gain(plain, plain, "tractor")
    assert _gain(plain, plain, "one") == _gain(plain, plain, None) == 0


def test_a_gain_is_the_change_of_the_accuracy_on_a_classs_images(tmp_path):
    from vs2_plugin.reproduce.run import _gain

    target, share = np.array([0, 0, 1, 1, 1], np.int32), np.ones(5, np.float32)
    for name, predicted in (("plain", [0, 2, 0, 2, 1]), ("steered", [0, 0, 1, 2, 1])):
        prediction = np.array(predicted, np.int32)
        Images(
            digest=np.arange(5, dtype=np.uint64), target=target, prediction=prediction, confidence=share,
            rank=(prediction != target).astype(np.int32), target_probability=share, classes=("a", "b", "c"),
        ).write(images_file(tmp_path / f"{name}.json"))  # fmt: skip
    files = tmp_path / "plain.json", tmp_path / "steered.json"
    assert (_gain(*files, "a"), _gain(*files, None)) == (50, 50) and _gain(*files, "b") == pytest.approx(100 / 3)
    with pytest.raises(DataError, match="class 'c' has no image"):
        _gain(*files, "c")


def test_classes_without_names_are_not_counted_by_their_numbers(tmp_path):
    from vs2_plugin.reproduce.run import _gain

    number, share = np.array([2**31 - 1], np.int32), np.ones(1, np.float32)
    images = Images(
        digest=np.ones(1, np.uint64), target=number, prediction=number, rank=np.zeros(1, np.int32), confidence=share,
        target_probability=share,
    )  # fmt: skip
    images.write(images_file(tmp_path / "a.json"))
    with pytest.raises(DataError, match="name 0 and 0 classes; expected those of one data set"):
        _gain(tmp_path / "a.json", tmp_path / "a.json", None)


def test_training_on_the_images_that_are_evaluated_is_marked(tmp_path, monkeypatch):
    table = MISSING.partition("columns:")[0] + (
        'backbone: "local-dir:tiny-clip,"\ntransductive: [caltech101]\ncolumns: {A: {dataset: caltech101}}\n'
        'rows:\n  plain: {model: "{backbone}"}\n  VS2: {model: "vs2:{backbone}"}\n'
    )
    (tmp_path / "table.yaml").write_text(table)
    work = Reproduction([read(tmp_path / "table.yaml")], tmp_path / "out", "root")
    ((sae, seeds),) = work.trainings()
    assert work.request(sae, seeds).transductive
    found = type("Found", (), {"transductive": True})
    monkeypatch.setattr(work, "checkpoint", lambda name: found)
    monkeypatch.setattr(work, "_value", lambda cell, seed: 50.0)
    work.out.mkdir()
    (text,), missing = work.finish()
    assert missing == 0 and "Transductive, trained on the images that are evaluated: VS2 / A." in text


def test_all_that_is_missing_is_told_and_tried_once(tmp_path, monkeypatch, caplog):
    from vs2_plugin.reproduce.fetch import Missing

    tried = []

    def missing(*given):
        tried.append(given)
        return Missing(f"{given[0]} is gone", f"no {given[0]}", "get it")

    for name in ("missing_weights", "missing_encoder"):
        monkeypatch.setattr(module, name, missing)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.yaml").write_text(
        'title: T\nbackbone: "B,w"\nseeds: [0, 1]\nsae: {retrieval_encoder: dino}\n'
        "columns:\n  A: {dataset: wds/a}\n  B: {dataset: wds/b}\n"
        'rows:\n  plain: {model: "{backbone}"}\n  VS2: {model: "vs2:{backbone}"}\n'
    )
    work = Reproduction([read(tmp_path / "table.yaml")], tmp_path / "out", "root/{dataset}")
    work.run()
    (text,), missing = work.finish()
    assert missing == 4
    assert tried == [("B", "w"), ("dino",)]
    lines = [line.partition(": ")[::2] for line in text.splitlines() if line.startswith("Not measured")]
    assert {reason: which for which, reason in lines} == {
        "wds/a is missing": "Not measured, 2 cells (column 'A')",
        "wds/b is missing": "Not measured, 2 cells (column 'B')",
        "B is gone": "Not measured, 4 cells (all of the table)",
        "dino is gone": "Not measured, 2 cells (row 'VS2')",
    }
    told = list(work.missing().items())
    assert [reasons for _, reasons in told[:2]] == [["no folder root/a of wds/a"], ["no folder root/b of wds/b"]]
    assert told[2:] == [("get it", ["no B", "no dino"])]
    assert [one.getMessage() for one in caplog.records if one.levelname == "WARNING"] == [
        "missing: no folder root/a of wds/a", "missing: no folder root/b of wds/b", "missing: no B", "missing: no dino",
    ]  # fmt: skip


def test_a_page_of_results_is_recommended_only_where_there_are_some(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.yaml").write_text(
        'title: T\nbackbone: "ViT-B-99,w"\ndataset: wds/a\ncolumns: {A: {}}\nrows: {plain: {model: "{backbone}"}}\n'
    )
    assert main(["reproduce", "table.yaml", "--out", "out"]) == 1
    output = capsys.readouterr().out
    assert "The tables are in out" in output and "vs2 report" not in output
