"""A small table, run once on the stand-in, and the command that runs tables, in this process."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest

from vs2_plugin.cli.main import main
from vs2_plugin.demo.run import _clip_benchmark

SMALL = """\
title: A small table
seeds: [0, 1]
dataset: cifar100
backbone: "ViT-B-32-quickgelu,openai"
prompts: "a photo of the digit {c}"
sae: {recipe: paper, expansion_factor: 4, k: 64}
columns:
  accuracy: {}
  gain: {metric: gain, class: tractor}
  best gain: {metric: gain}
rows:
  VS2: {model: "vs2:{backbone}@gate=0.9"}
  others: {model: null}
published:
  VS2: [64.52, 25, null]
"""


@contextmanager
def harness_here() -> Iterator[None]:
    """Within the block, evaluations run the stock command in this process."""

    def evaluate(command: list[str], log: Path, quiet: bool, look: Callable[[], None]) -> str | None:
        look()
        try:
            code = _clip_benchmark(command[1:])
        except SystemExit as stop:
            code = stop.code
        look()
        return f"exit code {code}" if code else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vs2_plugin.reproduce.run.run_command", evaluate)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield


def run_here(*rest: str, cwd: Path) -> SimpleNamespace:
    """``vs2 reproduce`` in this process, with the stock command in it too, and what a process would give."""
    output, errors = io.StringIO(), io.StringIO()
    with harness_here(), pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(errors):
        patch.chdir(cwd)
        code = main(["reproduce", *rest])
    return SimpleNamespace(returncode=code, stdout=output.getvalue(), stderr=errors.getvalue())


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> SimpleNamespace:
    """The folder in which ``small.yaml`` was run, with ``out`` in it, and what was printed."""
    folder = tmp_path_factory.mktemp("reproduce")
    (folder / "small.yaml").write_text(SMALL)
    done = run_here("small.yaml", "--stand_in", "digits", "--out", "out", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return SimpleNamespace(folder=folder, out=folder / "out", output=done.stdout, errors=done.stderr)


@pytest.fixture
def copied(finished, tmp_path, monkeypatch) -> Path:
    """A copy of that folder, to work in and to damage."""
    folder = tmp_path / "copied"
    shutil.copytree(finished.folder, folder)
    monkeypatch.chdir(folder)
    return folder
