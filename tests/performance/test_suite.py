"""The benchmark suite runs, and the work that it times is counted here. No time is asserted."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vs2_plugin.clip.sites import Sites
from vs2_plugin.data.cache import ActivationCache, extract
from vs2_plugin.data.images import TrainingImages
from vs2_plugin.sae.config import TrainConfig
from vs2_plugin.sae.product import Precision, multiplies_int8
from vs2_plugin.sae.step import set_gradients
from vs2_plugin.sae.topk import SaeConfig, TopKSAE
from vs2_plugin.sae.train import train_sae
from vs2_plugin.steering.amplify import Amplify
from vs2_plugin.steering.gate import Gate
from vs2_plugin.training.extract import activations_at

SUITE = Path(__file__).parents[2] / "benchmark_configs" / "performance"
D, LATENTS, K, BATCH = 64, 512, 8, 256


def test_the_one_command_writes_figures_of_all_that_is_installed(tmp_path):
    out = tmp_path / "performance.json"
    names = ["floor", "vs2", "latentsae"]
    command = [sys.executable, SUITE / "run.py", "--quick", "--only", "training", "--rounds", "2", "--out", tmp_path]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [*command, "--implementations", *names], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert {"cpu", "cores", "memory_gb", "date", "command", "load_before"} < set(results["machine"])
    libraries = results["machine"]["libraries"]
    assert libraries["threads"] >= 1 and libraries["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert [row["implementation"] for row in results["training"]] == names
    for row in results["training"]:
        assert (row["d"], row["n"], row["k"], row["batch"]) == (64, 256, 8, 256)
        if "failed" in row:  # a library that is not installed
            assert row["implementation"] == "latentsae" and "No module named" in row["failed"]
            continue
        assert [len(turn) for turn in row["turns"]] == [3, 3]
        low, high = row["spread"]
        assert 0 < low <= row["samples_per_second"] <= high
        assert 0 < row["imported_mb"] <= row["peak_mb"] and row["times_floor"] > 0
    table = out.with_suffix(".md").read_text()
    assert table in done.stdout and "| vs2 |" in table and results["machine"]["cpu"] in table


class Products(TorchDispatchMode):
    """Counts products of matrices by the multiplications that each takes."""

    def __init__(self):
        super().__init__()
        self.counted = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        result = function(*args, **(kwargs or {}))
        if name in ("mm", "addmm", "bmm", "baddbmm", "linear"):
            one, other = args[1:3] if name in ("addmm", "baddbmm") else args[:2]
            columns = other.shape[0] if name == "linear" else other.shape[-1]
            self.counted.append(math.prod(one.shape) * columns)
        elif name == "qlinear_pointwise":
            self.counted.append(math.prod(args[0].shape) * result.shape[1])
        return result


def dense_step(sae, x):
    """The same training step, by autograd of dense codes."""
    pre = torch.nn.functional.linear(x - sae.b_dec, sae.encoder.weight, sae.encoder.bias)
    values, indices = pre.topk(K)
    codes = torch.zeros_like(pre).scatter(1, indices, values.relu())
    (x - codes @ sae.W_dec - sae.b_dec).pow(2).sum().backward()


@pytest.fixture
def sae():
    torch.manual_seed(0)
    return TopKSAE(SaeConfig(D, LATENTS, K))


def products(step):
    """How many products of a batch with all latents a step takes."""
    with Products() as seen:
        step()
    return seen.counted.count(BATCH * D * LATENTS)


@pytest.mark.parametrize("product", [None, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("rows", [None, torch.bfloat16], ids=str)
def test_a_training_step_takes_one_dense_product(sae, product, rows):
    if product == torch.int8 and not multiplies_int8():
        pytest.skip("torch has no products of 8-bit integers here")
    x = torch.randn(BATCH, D)
    assert products(lambda: set_gradients(sae, x, precision=Precision(product, rows))) == 1
    assert products(lambda: dense_step(sae, x)) == 6  # as many as there are in the dense form


def test_a_training_takes_one_dense_product_per_step():
    """Looks at held-out activations are in batches of another size."""
    activations = np.random.default_rng(0).standard_normal((900, D), dtype=np.float32)
    config = TrainConfig(expansion_factor=LATENTS // D, k=K, samples=5 * BATCH, sae_batch_size=BATCH)
    assert products(lambda: train_sae(activations, config, quiet=True)) == 5


@pytest.mark.parametrize("tau", [None, 0.5])
@pytest.mark.parametrize("base", ["x", "b_dec"])
@torch.no_grad()
def test_a_steered_batch_takes_one_dense_product_with_what_is_told_of_it(sae, base, tau):
    gate = Gate(Amplify(sae, 1.5, base), sae, torch.zeros(D), tau)
    assert products(lambda: gate(torch.randn(BATCH, D))) == 1
    assert gate.facts["mean_fvu"] > 0


def test_extraction_takes_one_forward_per_batch_and_two_bytes_per_value(make_clip, tmp_path):
    model = make_clip()
    forwards = []
    model.visual.register_forward_hook(lambda *args: forwards.append(1))
    count, batch_size = 22, 4
    images = TrainingImages(list(torch.rand(count, 3, 32, 32)), None, None)
    sites = [Sites.of(model).default, Sites.of(model).output]
    widths = {site.hookpoint: site.width for site in sites}
    found = extract(
        activations_at(model, sites, amp=False),
        widths,
        images,
        ActivationCache(tmp_path),
        {},
        device="cpu",
        batch_size=batch_size,
        num_workers=0,
        dtype=np.dtype("float16"),
        quiet=True,
    )
    assert len(forwards) == math.ceil(count / batch_size)
    for name, width in widths.items():
        assert found.columns[name].nbytes == count * width * 2
        header = (found.folder / f"{name}.npy").stat().st_size - count * width * 2
        assert 0 < header < 256


@pytest.fixture
def suite(monkeypatch):
    """Imports a script of the suite, which import each other by their names."""
    monkeypatch.syspath_prepend(SUITE)
    own = [path.stem for path in SUITE.glob("*.py")]
    for name in own:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module
    for name in own:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_turns_take_the_time_of_steps_or_of_many_between_two_waits(suite, tmp_path, on_gpu):
    """A GPU's way, tried on a CPU: batches stay in memory, a time is of a lap, and a training follows another."""
    training, write = suite("training"), suite("synthetic").write
    write(tmp_path / "wide", 16, 96)
    write(tmp_path / "narrow", 8, 96)
    order = {"d": 8, "n": 64, "k": 4, "batch": 32, "activations": str(tmp_path / "narrow")}
    said, lines = [], iter(["\n", "\n", json.dumps(order)])
    orders = training.Orders(lines)

    def made(path, shape):
        return training.Turns(path, shape, 3, 0.02, torch.device("cpu"), orders, said.append, on_gpu)

    dense = training.IMPLEMENTATIONS["dense"]
    assert training.train(dense, training.Shape(16, 64, 4, 32), tmp_path / "wide", made) == {}
    turns = [facts for facts in said if "seconds" in facts]
    assert len(turns) == 2 and all(0 < len(turn["seconds"]) <= 3 for turn in turns)
    assert all((turn["lap"] >= 1) if on_gpu else (turn["lap"] == 1) for turn in turns)
    path = orders.following.pop("activations")
    assert training.train(dense, training.Shape(**orders.following), Path(path), made) == {}
    assert [facts for facts in said if "ready" in facts] == [{"ready": True}] * 2
    failed = training.train(dense, training.Shape(8, 64, 65, 32), Path(path), made)
    assert "out of range" in failed["failed"]  # k above n, and the process is there for the next one


def test_extraction_of_images_in_memory_is_that_of_the_same_files(suite, make_clip, tmp_path):
    decoded = suite("extraction").Decoded
    model = make_clip()
    images = TrainingImages(list(torch.rand(5, 3, 32, 32)), None, None)
    sites = [Sites.of(model).default]
    found = [
        extract(
            activations_at(model, sites, amp=False),
            {site.hookpoint: site.width for site in sites},
            source,
            ActivationCache(tmp_path / type(source).__name__),
            {},
            device="cpu",
            batch_size=2,
            num_workers=0,
            dtype=np.dtype("float16"),
            quiet=True,
        )
        for source in (images, decoded(5, list(images.batches(2, 0))))
    ]
    assert found[0].contents == found[1].contents


def test_a_gallery_is_searched_and_recall_told(suite, monkeypatch, capfd):
    gallery = suite("gallery")
    said = []
    monkeypatch.setattr(gallery, "json_lines", lambda: said.append)
    words = ["--device", "cpu", "--count", "300", "--width", "16", "--rounds", "1", "--searches", "exact"]
    monkeypatch.setattr(sys, "argv", ["gallery.py", *words])
    gallery.main()
    exact = said[0]["searches"][0]
    assert exact["recall"] == 1 and exact["ms"] > 0 and exact["search"] == "exact on cpu"


def test_tables_of_a_gpu_name_it_and_hold_a_column_per_floor(suite):
    run = suite("run")
    rows = [
        {"implementation": name, "d": 8, "n": 64, "k": 4, "batch": 32, "turns": [[0.5]], "peak_mb": 1, "imported_mb": 1}
        for name in ("floor", "floor_bfloat16", "vs2")
    ]
    run.summarize(rows)
    failed = {"implementation": "saev", "d": 8, "n": 64, "k": 4, "batch": 32, "turns": [], "failed": "no"}
    gpu = {"name": "A GPU", "memory_gb": 1, "cuda": "13.0"}
    machine = {"cpu": "one", "cores": 2, "memory_gb": 3, "python": "3", "date": "2026-11-26"}
    machine["libraries"] = {"versions": {"torch": "2"}, "threads": 2, "gpu": gpu}
    text = run.tables({"machine": machine, "device": "cuda", "quick": False, "training": [*rows, failed]})
    assert "A GPU, 1 GB, CUDA 13.0" in text and "x floor time | x floor_bfloat16 time" in text
    assert "| vs2 | 64 [64, 64] | 1.00 | 1.00 | 1 | 1 |" in text and "saev (no)" in text
