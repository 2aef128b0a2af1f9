"""The demo's digits and tiny CLIP in a folder of their own, and vs2-train-sae on them."""

import shutil

import pytest

from vs2_plugin.cli import train_sae
from vs2_plugin.demo.digits import write_digits
from vs2_plugin.demo.run import _TINY_CLIP

WORDS = ["--model", "local-dir:tiny-clip", "--dataset", "wds/digits", "--dataset_root", "digits"]
FEW = ["--samples", "2000", "--num_workers", "0", "--quiet", "--no_amp"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with a store in it."""
    write_digits(tmp_path / "digits")
    shutil.copytree(_TINY_CLIP, tmp_path / "tiny-clip")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VS2_STORE", str(tmp_path / "store"))
    return tmp_path


@pytest.fixture
def train():
    """The command, on the digits and with few samples; gives its exit code."""
    return lambda *words: train_sae.main([*WORDS, *FEW, *words])
