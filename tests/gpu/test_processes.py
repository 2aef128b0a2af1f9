"""Several processes, as torchrun starts them, where there is a GPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from vs2_plugin.distributed import mean_row, total, wait

from .conftest import DATA, GPU, NAME, TINY, needs_gpu

pytestmark = pytest.mark.gpu
GPUS = max(1, torch.cuda.device_count())


def torchrun(count, *words, cwd, store):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", *words]
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, "VS2_STORE": store}, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return done


@needs_gpu
def test_sums_go_by_nccl(tmp_path):
    dist.init_process_group("nccl", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        rows = torch.arange(6.0, device=GPU).view(3, 2)
        assert torch.equal(total(rows.clone()), rows) and torch.equal(mean_row(rows), rows.mean(0))
        wait()
    finally:
        dist.destroy_process_group()


def test_processes_share_gpus(here):
    """Twice as many processes as there are GPUs train what one process does."""
    words = ["--model", TINY, *DATA, "--samples", "5000", "--gallery_labels", "--no_amp"]
    torchrun(2 * GPUS, "-m", "vs2_plugin.cli.train_sae", *words, cwd=here, store="shared")
    manifests = [here / store / "checkpoints" / NAME / "vs2.json" for store in ("store", "shared")]
    one, shared = (json.loads(manifest.read_text())["sites"] for manifest in manifests)
    fvu = {site["hookpoint"]: site["fvu"] for site in one if site["variant"] == "plain"}
    assert [site["fvu"] for site in shared] == [pytest.approx(fvu[site["hookpoint"]], abs=0.02) for site in shared]


def test_the_harness_divides_its_runs(here):
    shutil.rmtree(here / "divided", ignore_errors=True)
    (here / "divided").mkdir()
    script = str(Path(sys.executable).with_name("clip_benchmark"))
    words = ["eval", "--model", TINY, f"vs2:{TINY}", "--pretrained", "", *DATA, "--output", "divided/{model}.json"]
    torchrun(GPUS, "--no_python", script, *words, "--distributed", cwd=here, store="store")
    assert len(list((here / "divided").glob("*.json"))) == 2
