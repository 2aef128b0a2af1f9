"""Extraction of activations beside the plain forward, and peak memory.

    python benchmark_configs/performance/extraction.py throughput FOLDER [--images 1024] [--rounds 5]
    python benchmark_configs/performance/extraction.py memory FOLDER [--count 1000000] [--samples 100000]

Each prints a line of JSON. ``throughput`` writes JPEG images (400 x 300 pixels) as webdataset shards into FOLDER, with
a file of random weights, and runs them through ViT-B-32 three times in each round: the plain forward on batches that
are in memory; the plain forward in a loop over torch's DataLoader, which decodes them; and this package's extraction
into the cache, which decodes them too. It also says how much processor time loading, of it decoding and resizing alone,
and the forward take: where they share the cores, extraction cannot be faster than their sum. ``memory`` writes
tiny images as shards into FOLDER, extracts a random product of each in the place of a tower's activations, and trains
an SAE on them: peak memory of both, of this process and its loaders, without the pages of mapped files.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from training import Say, json_lines, peak

if TYPE_CHECKING:
    from torchvision.transforms import Compose

    from vs2_plugin.data.shards import LocalShards

MODEL, BATCH, WORKERS, WIDTH = "ViT-B-32", 64, 2, 768
WEIGHTS = "weights.safetensors"


def write_images(
    folder: Path, count: int, grain: tuple[int, int] = (40, 30), size: tuple[int, int] = (400, 300)
) -> None:
    """Shards of smooth random images of a size (pixels), made of so many grains, in the layout of clip_benchmark."""
    from PIL import Image

    rng, shards = np.random.default_rng(0), max(4, count // 10_000)
    (folder / "train").mkdir(parents=True)
    for shard in range(shards):
        with tarfile.open(folder / "train" / f"{shard}.tar", "w") as tar:
            for number in range(shard, count, shards):
                coarse = Image.fromarray(rng.integers(0, 256, (*grain[::-1], 3), dtype=np.uint8))
                file = io.BytesIO()
                coarse.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
                member = tarfile.TarInfo(f"{number:06d}.jpg")
                member.size = file.tell()
                file.seek(0)
                tar.addfile(member, file)
                tar.members.clear()  # of each, an open tar file remembers a kilobyte
    (folder / "train" / "nshards.txt").write_text(f"{shards}\n")


def processor_seconds() -> float:
    """Processor time of this process so far, and of those that it has waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


@torch.no_grad()
def throughput(folder: Path, count: int, rounds: int) -> dict:
    """Seconds of the plain forward and of extraction, in turns."""
    from vs2_plugin.clip.backbone import load_backbone
    from vs2_plugin.clip.sites import Sites
    from vs2_plugin.data.cache import ActivationCache, activations_at, extract
    from vs2_plugin.data.images import open_images

    write_images(folder, count)
    torch.manual_seed(0)
    loaded = load_backbone(MODEL, "")
    save_file(loaded.model.state_dict(), folder / WEIGHTS)
    images = open_images("wds/synthetic", str(folder), "train", loaded.transform)
    sites = [Sites.of(loaded.model).default, Sites.of(loaded.model).output]  # as vs2-train-sae
    widths = {site.hookpoint: site.width for site in sites}
    started, before = time.perf_counter(), processor_seconds()
    batches = [batch.images for batch in images.batches(BATCH, WORKERS)]
    loading, loading_work = time.perf_counter() - started, processor_seconds() - before

    def forward(batches: Iterable[torch.Tensor]) -> None:
        for batch in batches:
            with torch.autocast("cpu"):
                loaded.model.encode_image(batch)

    def plain() -> None:
        forward(batches)

    def plain_loop() -> None:
        forward(DataLoader(images.source, batch_size=BATCH, num_workers=WORKERS))

    def through_vs2() -> None:
        with tempfile.TemporaryDirectory() as scratch:
            encode, cache = activations_at(loaded.model, sites, amp=True), ActivationCache(Path(scratch))
            settings = {"device": "cpu", "batch_size": BATCH, "num_workers": WORKERS, "dtype": np.dtype("float16")}
            extract(encode, widths, images, cache, {}, **settings, quiet=True)

    runs = {"plain": plain, "plain_loop": plain_loop, "extraction": through_vs2}
    took: dict[str, list[float]] = {name: [] for name in runs}
    forward_work = []
    for name, run in list(runs.items()) * (rounds + 1):
        started, before = time.perf_counter(), processor_seconds()
        run()
        took[name].append(time.perf_counter() - started)
        if name == "plain":
            forward_work.append(processor_seconds() - before)
    took = {name: seconds[1:] for name, seconds in took.items()}  # the first round warms up
    work = float(np.median(forward_work[1:]))
    decoding = decoding_seconds(images.source, loaded.transform)
    found = {
        "images": count,
        "loading_images_per_second": count / loading,
        "loading_processor_ms": 1e3 * loading_work / count,
        "decoding_processor_ms": 1e3 * decoding / count,
        "forward_processor_ms": 1e3 * work / count,
        "possible_with_this_loading": work / (work + loading_work),
        "possible_with_decoding_alone": work / (work + decoding),
    }
    for name, seconds in took.items():
        found[f"{name}_images_per_second"] = [count / one for one in seconds]
    for name in ("plain", "plain_loop"):
        ratios = [base / own for base, own in zip(took[name], took["extraction"], strict=True)]
        found[f"extraction_over_{name}"] = float(np.median(ratios))
        found[f"extraction_over_{name}_spread"] = [min(ratios), max(ratios)]
    return found


def decoding_seconds(source: LocalShards, transform: Compose) -> float:
    """Processor time to decode all images and to resize them, without anything else, in one process."""
    from PIL import Image

    resize = transform.transforms[0]
    files = []
    for number, offset, size in source.samples[0].tolist():
        with open(source.files[number], "rb") as file:
            file.seek(offset)
            files.append(file.read(size))
    before = time.process_time()
    for file in files:
        resize(Image.open(io.BytesIO(file)).convert("RGB"))
    return time.process_time() - before


class _Sampler(threading.Thread):
    """Looks 10 times a second how much memory is this process's and its children's own: not pages of files."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0.0

    def run(self) -> None:
        while True:
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            self.most = max(self.most, sum(map(self._own, ["self", *children])))
            time.sleep(0.1)

    @staticmethod
    def _own(process: str) -> float:
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            return 0.0
        # What processes share after a fork is counted once: each has its part.
        return sum(int(line.split()[1]) / 1e3 for line in lines if line.startswith("Pss_Anon:"))


def memory(folder: Path, count: int, samples: int) -> dict:
    """Peak memory of an extraction of ``count`` images, and of a training on as many activations."""
    from torchvision.transforms.functional import to_tensor

    from vs2_plugin.data.cache import ActivationCache, extract
    from vs2_plugin.data.images import open_images
    from vs2_plugin.sae.config import TrainConfig
    from vs2_plugin.sae.train import train_sae

    write_images(folder, count, (4, 4), (8, 8))
    sampler = _Sampler()
    sampler.start()
    torch.manual_seed(0)
    mixed = torch.randn(3 * 8 * 8, WIDTH)
    extracted = extract(
        lambda images: {"mixed": images.flatten(1) @ mixed},
        {"mixed": WIDTH},
        open_images("wds/small", str(folder), "train", to_tensor),
        ActivationCache(folder),
        {},
        device="cpu",
        batch_size=BATCH,
        num_workers=WORKERS,
        dtype=np.dtype("float16"),
        quiet=True,
    )
    extraction, sampler.most = sampler.most, 0.0
    train_sae(extracted.columns["mixed"], TrainConfig(samples=samples), quiet=True)
    return {
        "count": len(extracted),
        "extraction_own_peak_mb": extraction,
        "training_own_peak_mb": sampler.most,
        "peak_mb": peak(),
    }


def main() -> None:
    """Measure one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("throughput", "memory"))
    parser.add_argument("path", type=Path)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--samples", type=int, default=100_000)
    args = parser.parse_args()
    say: Say = json_lines()
    try:
        if args.part == "throughput":
            say(throughput(args.path, args.images, args.rounds))
        else:
            say(memory(args.path, args.count, args.samples))
    except Exception as error:
        say({"failed": f"{type(error).__name__}: {error}"})
        raise


if __name__ == "__main__":
    main()
