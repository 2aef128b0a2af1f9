"""Several processes, as torchrun starts them, against one."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from vs2_plugin.cli import train_sae
from vs2_plugin.demo.run import _clip_benchmark
from vs2_plugin.distributed import ALONE, Processes
from vs2_plugin.sae.product import FLOAT32, Precision

TRAIN = ["--model", "local-dir:tiny-clip", "--dataset", "wds/digits", "--dataset_root", "digits", "--no_amp"]
TRAIN += ["--samples", "10000", "--max_images", "250", "--batch_size", "32", "--pass_weight", "0.8"]
TRAIN += ["--num_workers", "0"]


@pytest.mark.parametrize(("count", "unit", "world"), [(10, 1, 3), (10, 4, 2), (0, 4, 2), (3, 1, 5), (100, 64, 4)])
def test_blocks_follow_each_other_and_hold_everything_once(count, unit, world):
    blocks = [Processes(rank, world).block(count, unit) for rank in range(world)]
    assert [number for block in blocks for number in block] == list(range(count))
    assert all(block.start % unit == 0 for block in blocks if block)


def test_one_process_has_everything():
    assert ALONE.first and ALONE.block(7, 3) == range(7)


STEP = """
import torch
from vs2_plugin import SaeConfig, TopKSAE
from vs2_plugin.distributed import joined
from vs2_plugin.sae.product import FLOAT32, Precision
from vs2_plugin.sae.step import ClassMeans, set_gradients

gradients = {}
with joined() as processes:
    rounded = Precision(torch.bfloat16, torch.bfloat16)
    for running, precision in ((False, FLOAT32), (True, FLOAT32), ("rounded", rounded)):
        torch.manual_seed(0)
        sae = TopKSAE(SaeConfig(16, 48, 4))
        x, labels = torch.randn(31, 16) + 3, torch.randint(0, 5, (31,))
        dead = torch.arange(48) % 7 == 0
        mine = slice(processes.rank, None, processes.world)
        set_gradients(sae, x[mine], dead, 0.5, precision, ClassMeans(0.8, 5, running is True), labels[mine])
        gradients[running] = [parameter.grad for parameter in sae.parameters()]
    if processes.first and processes.world == 2:
        torch.save(gradients, "two.pt")
"""


#: What torchrun calls. Its processes begin where everything is loaded, which is what takes long.
LAUNCH = """
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from vs2_plugin.cli import train_sae
from vs2_plugin.sae.product import FLOAT32, Precision
from vs2_plugin.training import run

Precision.fastest = lambda *shape: FLOAT32  # each share is rounded by itself

def work():
    exec({step!r}, {{}})
    assert train_sae.main({train}) == 0

once = {{"min_nodes": 1, "max_nodes": 1, "nproc_per_node": 2, "start_method": "fork"}}
elastic_launch(LaunchConfig(**once, rdzv_backend="c10d", rdzv_endpoint="localhost:0"), work)()
"""


@pytest.fixture(scope="module")
def folder(workplace, tmp_path_factory):
    return shutil.copytree(workplace, tmp_path_factory.mktemp("processes"), dirs_exist_ok=True)


@pytest.fixture(scope="module")
def printed(folder):
    """What two processes print, that take a step and then train, into the store ``two``."""
    env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1", "VS2_STORE": "two"}
    code = LAUNCH.format(step=STEP, train=TRAIN)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_have_the_gradients_of_one(folder, printed):
    """Uneven shares, PASS (class means of a batch, and running ones) and AuxK included."""
    import torch

    exec(STEP, one := {})
    two = torch.load(folder / "two.pt")
    for running in (False, True):
        for single, joint in zip(one["gradients"][running], two[running], strict=True):
            assert single.abs().max() > 0
            torch.testing.assert_close(joint, single, rtol=1e-4, atol=1e-6)
    for single, joint in zip(one["gradients"]["rounded"], two["rounded"], strict=True):
        assert (joint - single).norm() <= 0.02 * single.norm()


def test_two_processes_extract_and_train_what_one_does(folder, printed, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("VS2_STORE", "one")
    monkeypatch.setattr(Precision, "fastest", lambda *shape: FLOAT32)
    assert train_sae.main(TRAIN) == 0
    assert printed.count("wrote ") == 1  # the first process speaks for both

    caches = [sorted((folder / store / "activations").iterdir()) for store in ("one", "two")]
    assert [path.name for path in caches[0]] == [path.name for path in caches[1]]  # no parts are left
    for file in caches[0][0].glob("*.npy"):
        assert np.array_equal(np.load(file), np.load(caches[1][0] / file.name)), file.name
    name = "checkpoints/local-dir-tiny-clip_wds-digits/vs2.json"
    one, two = (json.loads((folder / store / name).read_text())["sites"][0] for store in ("one", "two"))
    assert two["fvu"] == pytest.approx(one["fvu"], abs=1e-3)
    assert two["training"]["train_count"] == one["training"]["train_count"] == 225


def test_the_harness_divides_its_runs(folder, monkeypatch):
    """clip_benchmark's own --distributed gives each process some of the runs. They do not meet: here they are one after
    the other."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("VS2_STORE", "one")
    monkeypatch.setenv("WORLD_SIZE", "2")
    models = ["local-dir:tiny-clip", "pass:local-dir:tiny-clip", "pass:local-dir:tiny-clip@alpha=0"]
    words = ["eval", "--model", *models, "--pretrained", "", "--dataset", "wds/digits", "--dataset_root", "digits"]
    words += ["--num_workers", "0", "--no_amp", "--quiet", "--output", "results/{model}.json", "--distributed"]
    there = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        _clip_benchmark(words)
        there.append(len(list((folder / "results").glob("*.json"))))
    assert there == [2, 3]
    found = [json.loads((folder / "results" / f"{model}.json").read_text())["metrics"] for model in models]
    assert found[0]["acc1"] == found[2]["acc1"] != found[1]["acc1"]
    assert found[1]["vs2_method"] == "pass"
