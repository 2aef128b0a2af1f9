"""Extraction of activations beside the plain forward, and peak memory.

    python benchmark_configs/performance/extraction.py throughput FOLDER [--images 1024] [--rounds 5] [--device cuda]
        [--batch_size 64] [--workers 2]
    python benchmark_configs/performance/extraction.py memory FOLDER [--count 1000000] [--samples 100000]

Each prints a line of JSON. ``throughput`` writes JPEG images (400 x 300 pixels) as webdataset shards into FOLDER, with
a file of random weights, and runs them through ViT-B-32 in each round: the plain forward on batches that are in memory
(on a GPU, in its memory); the plain forward in a loop over torch's DataLoader, which decodes them; and this package's
extraction into the cache, which decodes them too. On a GPU there are also the plain forward and the extraction of the
batches in the processor's memory, already decoded. It also says how much processor time loading, of it decoding and
resizing alone, and the forward take: where they share the cores, extraction cannot be faster than their sum. A line
is printed after each round; the last one holds all. ``memory`` writes
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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from training import Say, json_lines, now, peak

if TYPE_CHECKING:
    from torchvision.transforms import Compose

    from vs2_plugin.data.images import Batch
    from vs2_plugin.data.shards import LocalShards

MODEL, BATCH, WORKERS, WIDTH = "ViT-B-32", 64, 2, 768
DISTINCT = 1024  # images that are made; what comes after repeats them
DECODED = 512  # images whose decoding alone is timed
WEIGHTS = "weights.safetensors"


def write_images(
    folder: Path,
    count: int,
    grain: tuple[int, int] = (40, 30),
    size: tuple[int, int] = (400, 300),
    distinct: int | None = None,
) -> None:
    """Shards of smooth random images of a size (pixels), made of so many grains, in the layout of clip_benchmark. After
    so many distinct ones they are repeated."""
    from PIL import Image

    rng, shards = np.random.default_rng(0), max(4, count // 10_000)
    (folder / "train").mkdir(parents=True)
    made: list[bytes] = []
    for shard in range(shards):
        with tarfile.open(folder / "train" / f"{shard}.tar", "w") as tar:
            for number in range(shard, count, shards):
                if distinct is not None and len(made) == distinct:
                    file = io.BytesIO(made[number % distinct])
                else:
                    coarse = Image.fromarray(rng.integers(0, 256, (*grain[::-1], 3), dtype=np.uint8))
                    file = io.BytesIO()
                    coarse.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
                    if distinct is not None:
                        made.append(file.getvalue())
                member = tarfile.TarInfo(f"{number:06d}.jpg")
                member.size = len(file.getvalue())
                file.seek(0)
                tar.addfile(member, file)
                tar.members.clear()  # of each, an open tar file remembers a kilobyte
    (folder / "train" / "nshards.txt").write_text(f"{shards}\n")


def processor_seconds() -> float:
    """Processor time of this process so far, and of those that it has waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


@dataclass(frozen=True)
class Decoded:
    """Images that are in memory already, as extraction takes them."""

    count: int
    kept: Sequence[Batch]
    labels: bool = False

    def batches(self, batch_size: int, num_workers: int, first: int = 0) -> Iterator[Batch]:
        """All of them, whatever is asked for."""
        return iter(self.kept)


@torch.no_grad()
def throughput(args: argparse.Namespace, say: Say) -> None:
    """Images per second of the plain forward and of extraction, in turns. Said after each round."""
    from vs2_plugin.clip.backbone import load_backbone
    from vs2_plugin.clip.sites import Sites
    from vs2_plugin.data.cache import ActivationCache, extract
    from vs2_plugin.data.images import TrainingImages, open_images
    from vs2_plugin.data.naming import DataSet
    from vs2_plugin.training.extract import activations_at

    folder, count, device = args.path, args.images, torch.device(args.device)
    on_gpu = device.type != "cpu"
    write_images(folder, count, distinct=DISTINCT if on_gpu else None)
    torch.manual_seed(0)
    loaded = load_backbone(MODEL, "", device=args.device)
    save_file(loaded.model.state_dict(), folder / WEIGHTS)
    images = open_images(DataSet.of("wds/synthetic", str(folder)), "train", loaded.transform)
    sites = [Sites.of(loaded.model).default, Sites.of(loaded.model).output]  # as vs2-train-sae
    widths = {site.hookpoint: site.width for site in sites}
    started, before = time.perf_counter(), processor_seconds()
    kept = list(images.batches(args.batch_size, args.workers))
    loading, loading_work = time.perf_counter() - started, processor_seconds() - before
    resident = [batch.images.to(device) for batch in kept]

    def forward(batches: Iterable[torch.Tensor]) -> None:
        for batch in batches:
            with torch.autocast(device.type):
                loaded.model.encode_image(batch.to(device, non_blocking=True))

    def loop() -> None:
        forward(DataLoader(images.source, args.batch_size, num_workers=args.workers, pin_memory=on_gpu))

    def through_vs2(source: TrainingImages | Decoded) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            encode, cache = activations_at(loaded.model, sites, amp=True), ActivationCache(Path(scratch))
            settings = {"device": device, "batch_size": args.batch_size, "num_workers": args.workers}
            extract(encode, widths, source, cache, {}, **settings, dtype=np.dtype("float16"), quiet=True)

    runs = {"plain": lambda: forward(resident)}
    if on_gpu:
        runs["plain_decoded"] = lambda: forward(batch.images for batch in kept)
        runs["extraction_decoded"] = lambda: through_vs2(Decoded(count, kept))
    runs |= {"plain_loop": loop, "extraction": lambda: through_vs2(images)}
    took: dict[str, list[float]] = {name: [] for name in runs}
    forward_work: list[float] = []
    for number in range(args.rounds + 1):
        for name, run in runs.items():
            started, before = now(device), processor_seconds()
            run()
            seconds = now(device) - started
            if number:  # the first round warms up
                took[name].append(seconds)
                forward_work += [processor_seconds() - before] if name == "plain" else []
        if number:
            say({"images": count, "batch_size": args.batch_size, "workers": args.workers, **rates(took, count)})
    work = {"loading": loading_work, "forward": float(np.median(forward_work))}
    work["decoding"] = decoding_seconds(images.source, loaded.transform)
    facts = {f"{name}_processor_ms": 1e3 * seconds / count for name, seconds in work.items()}
    if not on_gpu:  # there, the processor does not do the forward's work
        for name, other in (("this_loading", "loading"), ("decoding_alone", "decoding")):
            facts[f"possible_with_{name}"] = work["forward"] / (work["forward"] + work[other])
    facts |= {"images": count, "batch_size": args.batch_size, "workers": args.workers}
    say({**facts, "loading_images_per_second": count / loading, **rates(took, count)})


def rates(took: dict[str, list[float]], count: int) -> dict:
    """Images per second of each, and extraction over the others, round by round."""
    found: dict = {f"{name}_images_per_second": [count / one for one in seconds] for name, seconds in took.items()}
    for own, base in (
        ("extraction", "plain"),
        ("extraction", "plain_loop"),
        ("extraction_decoded", "plain"),
        ("extraction_decoded", "plain_decoded"),
    ):
        if own in took:
            ratios = [one / other for one, other in zip(took[base], took[own], strict=True)]
            found[f"{own}_over_{base}"] = float(np.median(ratios))
            found[f"{own}_over_{base}_spread"] = [min(ratios), max(ratios)]
    return found


def decoding_seconds(source: LocalShards, transform: Compose) -> float:
    """Processor time to decode all images and to resize them, without anything else, in one process; told from some."""
    from PIL import Image

    resize = transform.transforms[0]
    files = []
    samples = source.samples[0].tolist()
    for number, offset, size in samples[:DECODED]:
        with open(source.files[number], "rb") as file:
            file.seek(offset)
            files.append(file.read(size))
    before = time.process_time()
    for file in files:
        resize(Image.open(io.BytesIO(file)).convert("RGB"))
    return (time.process_time() - before) * len(samples) / len(files)


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
    from vs2_plugin.data.naming import DataSet
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
        open_images(DataSet.of("wds/small", str(folder)), "train", to_tensor),
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
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    parser.add_argument("--batch_size", type=int, default=BATCH)
    parser.add_argument("--workers", type=int, default=WORKERS)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--samples", type=int, default=100_000)
    args = parser.parse_args()
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    say: Say = json_lines()
    try:
        if args.part == "throughput":
            throughput(args, say)
        else:
            say(memory(args.path, args.count, args.samples))
    except Exception as error:
        say({"failed": f"{type(error).__name__}: {error}"})
        raise


if __name__ == "__main__":
    main()
