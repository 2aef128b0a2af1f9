"""A folder with digits, a tiny CLIP and its checkpoints, and the two commands in this process."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TINY = "local-dir:tiny-clip"
#: Under autocast, which is emulated, and slow, on processors without bfloat16 units.
AUTOCAST = ("--pretrained", "", "--dataset", "wds/few", "--dataset_root", "few", "--num_workers", "0")
#: In float32.
DATA = (*AUTOCAST, "--no_amp")
#: Batches of 64 in a quarter of the test digits.
BATCHES = 4


def harness(*models: str, output: str, data: tuple[str, ...] = DATA) -> None:
    """``clip_benchmark eval``, in the current folder."""
    from clip_benchmark import cli

    argv = ["clip_benchmark", "eval", "--model", *models, *data, "--quiet", "--output", output]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        cli.main()


def interrupt_write(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Ctrl-C in place of writing the result of that number, from 1."""
    from vs2_plugin.sweep import run

    inner, calls = run.write_run, []

    def interrupted(found):
        calls.append(found)
        if len(calls) == number:
            raise KeyboardInterrupt
        inner(found)

    monkeypatch.setattr(run, "write_run", interrupted)


def sweep(*models: str, output: str, words: tuple[str, ...] = (), data: tuple[str, ...] = DATA) -> int:
    """``vs2 sweep``, in the current folder: the exit code."""
    from vs2_plugin.cli.main import main

    return main(["sweep", "--model", *models, *data, "--output", output, *words])


def both_commands(
    folder: Path,
    strings: list[str],
    points: list[str],
    prefix: str = "",
    before: Callable[[], None] = lambda: None,
    data: tuple[str, ...] = DATA,
) -> None:
    """The points of a sweep by both commands: results in ``{prefix}harness`` and ``{prefix}sweep``. ``before`` is
    called before each command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("VS2_STORE", "store")
        (folder / f"{prefix}harness").mkdir()
        before()
        harness(TINY, *points, output=f"{prefix}harness/{{model}}.json", data=data)
        before()
        assert sweep(*strings, output=f"{prefix}sweep/{{model}}.json", data=data) == 0


def result(path: Path | str) -> dict:
    """A results file."""
    return json.loads(Path(path).read_text())


@pytest.fixture(scope="session")
def laboratory(tmp_path_factory) -> Path:
    """The folder, with SAEs at every block, one by PASS, and a second checkpoint called ``other``."""
    from vs2_plugin.cli import train_sae
    from vs2_plugin.demo.run import prepare

    folder = tmp_path_factory.mktemp("sweep")
    prepare(folder)
    for split in ("train", "test"):
        (folder / "few" / split).mkdir(parents=True)
        (folder / "few" / split / "nshards.txt").write_text("1")
        shutil.copy(folder / "digits" / split / "0.tar", folder / "few" / split / "0.tar")
    for file in ("classnames.txt", "zeroshot_classification_templates.txt"):
        shutil.copy(folder / "digits" / file, folder / "few")
    train = ["--model", TINY, *DATA, "--samples", "3000", "--quiet"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("VS2_STORE", "store")
        assert train_sae.main([*train, "--blocks", "all", "--gallery_labels"]) == 0
        assert train_sae.main([*train, "--pass_weight", "0.8", "--gallery_labels"]) == 0
        assert train_sae.main([*train, "--k", "8", "--name", "other"]) == 0
    return folder


@pytest.fixture
def here(laboratory, monkeypatch) -> Path:
    """Work inside the folder, with its store."""
    monkeypatch.chdir(laboratory)
    monkeypatch.setenv("VS2_STORE", "store")
    return laboratory
