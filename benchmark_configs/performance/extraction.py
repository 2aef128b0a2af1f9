"""Extraction of activations beside the plain forward, the start of a training on a cache hit, and peak memory.

    python benchmark_configs/performance/extraction.py throughput FOLDER [--images 512] [--rounds 3]
    python benchmark_configs/performance/extraction.py hit FOLDER [--started SECONDS]
    python benchmark_configs/performance/extraction.py memory FILE [--count 1000000] [--samples 100000]

Each prints a line of JSON. ``throughput`` writes JPEG images (400 x 300 pixels) as webdataset shards into FOLDER, with
a file of random weights, and runs them through ViT-B-32, twice in each round: the plain forward on batches that are in
memory, and this package's extraction from the shards into the cache. It also says how much processor time loading and
the forward take, from which follows what extraction can reach where they share the cores. ``hit`` runs
``vs2-train-sae`` on FOLDER up to the first training step; the second time, the activations are cached. ``memory``
writes float16 activations to FILE and trains an SAE on them: peak memory with the pages of that file, and without.
"""

from __future__ import annotations

import argparse
import io
import resource
import tarfile
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from training import Say, json_lines, peak

MODEL, BATCH, SHARDS, WIDTH = "ViT-B-32", 64, 4, 768
WEIGHTS = "weights.safetensors"


def write_images(folder: Path, count: int) -> None:
    """Shards of smooth random images, in the layout that clip_benchmark reads."""
    from PIL import Image

    rng = np.random.default_rng(0)
    (folder / "train").mkdir(parents=True)
    for shard in range(SHARDS):
        with tarfile.open(folder / "train" / f"{shard}.tar", "w") as tar:
            for number in range(shard, count, SHARDS):
                coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
                file = io.BytesIO()
                coarse.resize((400, 300), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
                member = tarfile.TarInfo(f"{number:06d}.jpg")
                member.size = file.tell()
                file.seek(0)
                tar.addfile(member, file)
    (folder / "train" / "nshards.txt").write_text(f"{SHARDS}\n")


def processor_seconds() -> float:
    """Processor time of this process so far, and of those that it has waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


@torch.no_grad()
def throughput(folder: Path, count: int, rounds: int) -> dict:
    """Seconds of the plain forward and of extraction, in turns."""
    from vs2_plugin.clip.backbone import load_backbone
    from vs2_plugin.clip.sites import default_site, output_site
    from vs2_plugin.data.activations import ActivationCache, activations_at, extract
    from vs2_plugin.data.images import open_images

    write_images(folder, count)
    torch.manual_seed(0)
    loaded = load_backbone(MODEL, "")
    save_file(loaded.model.state_dict(), folder / WEIGHTS)
    images = open_images("wds/synthetic", str(folder), "train", loaded.transform)
    sites = [default_site(loaded.model), output_site(loaded.model)]  # as vs2-train-sae: activation and embedding
    widths = {site.hookpoint: site.width for site in sites}
    started, before = time.perf_counter(), processor_seconds()
    batches = [batch.images for batch in images.batches(BATCH, 2)]
    loading, loading_work = time.perf_counter() - started, processor_seconds() - before

    def plain() -> None:
        for batch in batches:
            with torch.autocast("cpu"):
                loaded.model.encode_image(batch)

    def through_vs2() -> None:
        with tempfile.TemporaryDirectory() as scratch:
            encode, cache = activations_at(loaded.model, sites, amp=True), ActivationCache(Path(scratch))
            settings = {"device": "cpu", "batch_size": BATCH, "num_workers": 2, "dtype": np.dtype("float16")}
            extract(encode, widths, images, cache, {}, **settings, quiet=True)

    took: dict[str, list[float]] = {"plain": [], "extraction": []}
    forward_work = []
    for run in (plain, through_vs2) * (rounds + 1):
        started, before = time.perf_counter(), processor_seconds()
        run()
        took["plain" if run is plain else "extraction"].append(time.perf_counter() - started)
        if run is plain:
            forward_work.append(processor_seconds() - before)
    plain_s, extraction_s = (seconds[1:] for seconds in took.values())  # the first round warms up
    ratios = [base / own for base, own in zip(plain_s, extraction_s, strict=True)]
    forward = float(np.median(forward_work[1:]))
    return {
        "images": count,
        "loading_images_per_second": count / loading,
        "loading_processor_ms": 1e3 * loading_work / count,
        "forward_processor_ms": 1e3 * forward / count,
        "possible_where_forward_takes_all_cores": forward / (forward + loading_work),
        "plain_images_per_second": [count / seconds for seconds in plain_s],
        "extraction_images_per_second": [count / seconds for seconds in extraction_s],
        "extraction_over_plain": float(np.median(ratios)),
        "spread": [min(ratios), max(ratios)],
    }


class _FirstStepError(BaseException):
    pass


def hit(folder: Path, began: float) -> dict:
    """Seconds from the start of the process, and of the command in it, to the first training step."""
    from vs2_plugin.cli import train_sae
    from vs2_plugin.sae import train

    def first_step(*args: object) -> None:
        raise _FirstStepError

    train._Run.step = first_step
    words = ["--model", MODEL, "--pretrained", str(folder / WEIGHTS)]
    words += ["--dataset", "wds/synthetic", "--dataset_root", str(folder)]
    started = time.time()
    try:
        train_sae.main([*words, "--store", str(folder / "store"), "--quiet"])
    except _FirstStepError:
        return {"from_process_start": time.time() - began, "from_command_start": time.time() - started}
    raise RuntimeError("vs2-train-sae ended without a training step")


class _Sampler(threading.Thread):
    """Looks 50 times a second how much memory is this process's own: not pages of files."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0.0

    def run(self) -> None:
        while True:
            lines = Path("/proc/self/status").read_text().splitlines()
            self.most = max(self.most, *(int(line.split()[1]) / 1e3 for line in lines if line.startswith("RssAnon")))
            time.sleep(0.02)


def memory(file: Path, count: int, samples: int) -> dict:
    """Peak memory of a training on ``count`` activations in a file."""
    from vs2_plugin.sae import TrainConfig, train_sae

    block = np.random.default_rng(0).standard_normal((min(count, 20_000), WIDTH), dtype=np.float32).astype(np.float16)
    with file.open("wb") as written:  # values do not matter here
        for _ in range(0, count, len(block)):
            block.tofile(written)
    del block
    sampler = _Sampler()
    sampler.start()
    activations = np.memmap(file, np.float16, mode="r").reshape(-1, WIDTH)
    train_sae(activations, TrainConfig(samples=samples), quiet=True)
    return {"count": len(activations), "peak_mb": peak(), "own_peak_mb": sampler.most}


def main() -> None:
    """Measure one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("throughput", "hit", "memory"))
    parser.add_argument("path", type=Path)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--started", type=float, default=time.time(), help="when the process was started, as time()")
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--samples", type=int, default=100_000)
    args = parser.parse_args()
    say: Say = json_lines()
    try:
        if args.part == "throughput":
            say(throughput(args.path, args.images, args.rounds))
        elif args.part == "hit":
            say(hit(args.path, args.started))
        else:
            say(memory(args.path, args.count, args.samples))
    except Exception as error:
        say({"failed": f"{type(error).__name__}: {error}"})
        raise


if __name__ == "__main__":
    main()
