"""A small table, run once on the stand-in by the installed command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

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


def words(name: str, *rest: str) -> list[str]:
    """A command installed beside this Python."""
    script = shutil.which(name, path=os.path.dirname(sys.executable))
    assert script, f"{name} is not installed beside {sys.executable}"
    return [script, *rest]


def reproduce(*rest: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """``vs2 reproduce``, as a user would run it, away from any network."""
    env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", **environment}
    command = words("vs2", "reproduce", *rest)
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> SimpleNamespace:
    """The folder in which ``small.yaml`` was run, with ``out`` in it, and what was printed."""
    folder = tmp_path_factory.mktemp("reproduce")
    (folder / "small.yaml").write_text(SMALL)
    done = reproduce("small.yaml", "--stand_in", "digits", "--out", "out", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return SimpleNamespace(folder=folder, out=folder / "out", output=done.stdout, errors=done.stderr)


@pytest.fixture
def copied(finished, tmp_path, monkeypatch) -> Path:
    """A copy of that folder, to work in and to damage."""
    folder = tmp_path / "copied"
    shutil.copytree(finished.folder, folder)
    monkeypatch.chdir(folder)
    return folder
