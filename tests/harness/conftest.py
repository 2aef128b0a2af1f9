"""The stock command, in this process and in others, on the demo's digits."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest

from vs2_plugin.cli import main
from vs2_plugin.demo import run
from vs2_plugin.demo.digits import CLASSES
from vs2_plugin.demo.run import _clip_benchmark

from ..conftest import at

#: In float32: autocast is emulated, and slow, on processors without bfloat16 units.
DIGITS = ("--dataset", "wds/digits", "--dataset_root", "digits", "--num_workers", "0", "--quiet", "--no_amp")
TINY = "local-dir:tiny-clip"


def installed(name: str, *words: str) -> list[str]:
    """A command installed beside this Python."""
    script = shutil.which(name, path=os.path.dirname(sys.executable))
    assert script, f"{name} is not installed beside {sys.executable}"
    return [script, *words]


def run_script(name: str, *words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run an installed script as a user would."""
    env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **environment}
    return subprocess.run(installed(name, *words), cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="session")
def demo(once: Callable[..., Path]) -> SimpleNamespace:
    """A copy of the folder that ``vs2 demo`` leaves, and what it printed. Its SAEs are trained for half as long."""

    def fill(folder: Path) -> None:
        output, errors = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(errors):
            patch.setattr(run, "SAMPLES", run.SAMPLES // 2)
            assert main.main(["demo", "--out", str(folder / "demo")]) == 0
        (folder / "said.json").write_text(json.dumps([output.getvalue(), errors.getvalue()]))

    made = once("demo", fill)
    output, errors = json.loads((made / "said.json").read_text())
    return SimpleNamespace(folder=made / "demo", output=output, errors=errors)


@pytest.fixture
def in_demo(demo, monkeypatch) -> Path:
    """Work inside the demo's folder, with its store."""
    at(demo.folder, monkeypatch)
    return demo.folder


@pytest.fixture
def clip_benchmark(capsys):
    """The stock command in this process: a function from its words to (exit code, stderr)."""

    def run(*words: str) -> tuple[int, str]:
        capsys.readouterr()
        try:
            code = _clip_benchmark(words)
        except SystemExit as stop:
            code = stop.code
        return code or 0, capsys.readouterr().err

    return run


def few_digits(folder: Path, name: str, shard: int, count: int = 225) -> None:
    """A data set of one shard of the digits per split, or of its first ``count``, as ``folder/name``."""
    shutil.rmtree(folder / name, ignore_errors=True)
    for split in ("train", "test"):
        (folder / name / split).mkdir(parents=True)
        (folder / name / split / "nshards.txt").write_text("1")
        source = folder / "digits" / split / f"{shard}.tar"
        with tarfile.open(source) as whole, tarfile.open(folder / name / split / "0.tar", "w") as part:
            for member in whole.getmembers()[: 2 * count]:  # an image and its label each
                part.addfile(member, whole.extractfile(member))
    for file in ("classnames.txt", "zeroshot_classification_templates.txt"):
        shutil.copy(folder / "digits" / file, folder / name)


def rewrite(shard: Path, change: Callable[[str, bytes], bytes | None]) -> None:
    """Write a shard anew, with what ``change`` makes of each file's name and bytes; None leaves it out."""
    with tarfile.open(shard) as tar:
        files = [(member.name, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(shard, "w") as tar:
        for name, data in files:
            changed = change(name, data)
            if changed is not None:
                member = tarfile.TarInfo(name)
                member.size = len(changed)
                tar.addfile(member, io.BytesIO(changed))


@pytest.fixture
def captions(in_demo) -> tuple[str, ...]:
    """Digits with captions, a data set without classes; the words that name it."""
    digits_with_captions(in_demo)
    data = ("--dataset", "wds/captions", "--dataset_root", "captions", "--num_workers", "1", "--no_amp")
    return ("--pretrained", "", *data)


def digits_with_captions(place: Path) -> None:
    """Write them as ``place/captions``."""
    folder = place / "captions"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "test").mkdir(parents=True)
    (folder / "dataset_type.txt").write_text("retrieval")
    (folder / "test/nshards.txt").write_text("1")
    with tarfile.open(place / "digits/test/0.tar") as source, tarfile.open(folder / "test/0.tar", "w") as target:
        for member in source:
            data = source.extractfile(member)
            if member.name.endswith(".cls"):
                caption = f"a photo of the digit {CLASSES[int(data.read())]}".encode()
                member.name, member.size, data = member.name.replace(".cls", ".txt"), len(caption), io.BytesIO(caption)
            target.addfile(member, data)


#: What VS2_PER_IMAGE, which the demo sets, adds to the metrics, and the digest of it all.
ASIDE = ("vs2_results_digest", "vs2_seconds", "vs2_peak_memory", "vs2_mended", "vs2_broken")
ASIDE += tuple(f"vs2_{ece}{bins}" for ece in ("ece", "ece_before") for bins in ("", "_bins"))


def metrics(path: Path) -> dict:
    """The metrics in a results file, but for what was measured aside."""
    found = json.loads(path.read_text())["metrics"]
    return {name: value for name, value in found.items() if name not in ASIDE}
