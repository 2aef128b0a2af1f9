"""A folder with digits, a tiny CLIP and its checkpoints, and the two commands in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from vs2_plugin.demo.run import _clip_benchmark

from ..harness.conftest import TINY, at, few_digits

_DATA = ("--pretrained", "", "--dataset", "wds/few", "--num_workers", "0", "--dataset_root")
#: Under autocast, which is emulated, and slow, on processors without bfloat16 units: of few images.
AUTOCAST = (*_DATA, "fewer")
#: In float32.
DATA = (*_DATA, "few", "--no_amp")
#: Batches of 64 images that are evaluated.
BATCHES = 2


def harness(*models: str, output: str, data: tuple[str, ...] = DATA) -> None:
    """``clip_benchmark eval``, in the current folder."""
    _clip_benchmark(["eval", "--model", *models, *data, "--quiet", "--output", output])


def interrupt_write(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Ctrl-C in place of writing the result of that number, from 1."""
    from vs2_plugin.sweep import run

    inner, calls = run.write_run, []

    def interrupted(found):
        calls.append(found)
        if len(calls) == number:
            raise KeyboardInterrupt
        return inner(found)

    monkeypatch.setattr(run, "write_run", interrupted)


def sweep(*models: str, output: str, words: tuple[str, ...] = (), data: tuple[str, ...] = DATA) -> int:
    """``vs2 sweep``, in the current folder: the exit code."""
    from vs2_plugin.cli.main import main

    return main(["sweep", "--model", *models, *data, "--output", output, *words])


def both_commands(
    folder: Path,
    strings: Sequence[str],
    points: Sequence[str],
    prefix: str = "",
    before: Callable[[], None] = lambda: None,
    data: tuple[str, ...] = DATA,
) -> None:
    """A sweep, and some of its points by the stock command: results in ``{prefix}sweep`` and ``{prefix}harness``.
    ``before`` is called before each command."""
    with pytest.MonkeyPatch.context() as patch:
        at(folder, patch)
        (folder / f"{prefix}harness").mkdir()
        before()
        harness(TINY, *points, output=f"{prefix}harness/{{model}}.json", data=data)
        before()
        assert sweep(*strings, output=f"{prefix}sweep/{{model}}.json", data=data) == 0


def result(path: Path | str) -> dict:
    """A results file."""
    return json.loads(Path(path).read_text())


@pytest.fixture(scope="session")
def laboratory(once: Callable[..., Path]) -> Path:
    """The folder, with SAEs at every block, one by PASS, and a second checkpoint called ``other``."""
    return once("sweep", _fill)


def _fill(folder: Path) -> None:
    from vs2_plugin.cli import train_sae
    from vs2_plugin.demo.run import prepare

    prepare(folder)
    few_digits(folder, "few", 0, count=64 * BATCHES)
    few_digits(folder, "fewer", 0, count=40)
    train = ["--model", TINY, *DATA, "--samples", "3000", "--quiet"]
    with pytest.MonkeyPatch.context() as patch:
        at(folder, patch)
        assert train_sae.main([*train, "--blocks", "all", "--gallery_labels"]) == 0
        assert train_sae.main([*train, "--pass_weight", "0.8", "--gallery_labels"]) == 0
        assert train_sae.main([*train, "--k", "8", "--name", "other"]) == 0


@pytest.fixture
def here(laboratory, monkeypatch) -> Path:
    """Work inside the folder, with its store."""
    at(laboratory, monkeypatch)
    return laboratory
