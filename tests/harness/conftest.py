"""The stock command, in this process and in others, on the demo's digits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

DIGITS = ("--dataset", "wds/digits", "--dataset_root", "digits", "--num_workers", "1", "--quiet")
TINY = "local-dir:tiny-clip"


def run_script(name: str, *words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run an installed script as a user would."""
    script = shutil.which(name, path=os.path.dirname(sys.executable))
    assert script, f"{name} is not installed beside {sys.executable}"
    return run_python(script, *words, cwd=cwd, program=[], **environment)


def run_python(
    *words: str, cwd: Path, program: list[str] | None = None, **environment: str
) -> subprocess.CompletedProcess:
    """Run this Python in a process of its own."""
    program = [sys.executable] if program is None else program
    env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **environment}
    return subprocess.run([*program, *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> SimpleNamespace:
    """The folder that ``vs2 demo`` leaves, made by the installed command, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    done = run_script("vs2", "demo", "--out", str(folder), cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return SimpleNamespace(folder=folder, output=done.stdout)


@pytest.fixture
def in_demo(demo, monkeypatch) -> Path:
    """Work inside the demo's folder, with its store."""
    monkeypatch.chdir(demo.folder)
    monkeypatch.setenv("VS2_STORE", "store")
    return demo.folder


@pytest.fixture
def clip_benchmark(monkeypatch, capsys):
    """The stock command in this process: a function from its words to (exit code, stderr)."""

    def run(*words: str) -> tuple[int, str]:
        from clip_benchmark import cli

        monkeypatch.setattr(sys, "argv", ["clip_benchmark", *words])
        capsys.readouterr()
        try:
            code = cli.main()
        except SystemExit as stop:
            code = stop.code
        return code or 0, capsys.readouterr().err

    return run


def metrics(path: Path) -> dict:
    """The metrics in a results file."""
    return json.loads(path.read_text())["metrics"]
