"""A checkpoint that was trained on the GPU, and what the tests there share.

Without a GPU all of them are skipped, unless ``--replayed`` has the CPU stand for one: that shows whether the tests
themselves still fit the package. Then only those are skipped that a GPU alone can pass.
"""

from __future__ import annotations

import pytest
import torch

from vs2_plugin.devices import emulates_bfloat16

from ..harness.conftest import TINY, at, clip_benchmark, few_digits  # noqa: F401

#: Of a quarter of the test digits. A CPU that emulates bfloat16 would need many times as long for autocast.
DATA = ("--dataset", "wds/few", "--dataset_root", "few", "--num_workers", "1", "--quiet")
DATA += ("--no_amp",) if emulates_bfloat16() else ()
NAME = "local-dir-tiny-clip_wds-few"
#: The device of all tests here.
GPU = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(GPU == "cpu", reason="it is about what a GPU alone does")


@pytest.fixture(autouse=True, scope="session")
def gpu(request):
    """Skip without one."""
    if GPU == "cpu" and not request.config.getoption("--replayed"):
        pytest.skip("torch finds no GPU that it can use by CUDA")


@pytest.fixture(autouse=True)
def exact(gpu):
    """Products and convolutions in float32 throughout: torch makes convolutions in TF32 unless told."""
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = True


@pytest.fixture(scope="session")
def laboratory(gpu, once):
    """The folder: digits, tower, and a store with SAEs at two blocks, those of PASS too, trained on the GPU."""

    def fill(folder):
        from vs2_plugin.cli import train_sae
        from vs2_plugin.demo.run import prepare

        prepare(folder)
        few_digits(folder, "few", 0)
        with pytest.MonkeyPatch.context() as patch:
            at(folder, patch)
            recipe = ("--blocks", "2", "last", "--pass_weight", "0", "0.8", "--samples", "5000", "--gallery_labels")
            assert train_sae.main(["--model", TINY, *DATA, *recipe, "--no_amp"]) == 0

    return once("gpu", fill)


@pytest.fixture
def here(laboratory, monkeypatch):
    """Work inside the folder, with its store."""
    at(laboratory, monkeypatch)
    return laboratory


@pytest.fixture
def without_gpu(monkeypatch):
    """A function after which this process finds no GPU."""
    return lambda: monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
