"""The demo's digits and tiny CLIP in a folder of their own, and vs2-train-sae on them."""

import shutil

import pytest

from vs2_plugin.cli import train_sae

WORDS = ["--model", "local-dir:tiny-clip", "--dataset", "wds/digits", "--dataset_root", "digits"]
FEW = ["--samples", "2000", "--num_workers", "0", "--quiet", "--no_amp"]


@pytest.fixture
def folder(workplace, tmp_path, monkeypatch):
    """The working folder, with a store in it."""
    shutil.copytree(workplace, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VS2_STORE", str(tmp_path / "store"))
    return tmp_path


@pytest.fixture
def train():
    """The command, on the digits and with few samples; gives its exit code."""
    return lambda *words: train_sae.main([*WORDS, *FEW, *words])
