"""Time of ``encode_image`` steered over plain: ViT-B-32 with random weights, batches of random images.

    python benchmark_configs/performance/steering.py [--device cuda] [--methods vs2 vs2pp ...] [--batch_size 64 256]
        [--gallery 50000 1000000] [--rounds 15] [--profile] [--out steering.json]

Plain and steered calls take turns in one process, each pair in random order; the figures are medians and quartiles of
the ratio of a pair, by the clock and, less disturbed by other processes, by processor time. The SAE (n = 3072, k = 64)
and the galleries are random too: the work does not depend on their values. Methods that look up neighbours are measured
with each gallery, others with the first. On a GPU, a call is a part of many between two waits for it. Results are
written after each measurement; ``--profile`` prints what steering adds, by operator and kernel.
"""

import argparse
import copy
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn
from training import now

from vs2_plugin.checkpoint.checkpoint import save_checkpoint
from vs2_plugin.checkpoint.records import SiteSAE, TrainingData
from vs2_plugin.checkpoint.store import Store
from vs2_plugin.clip.backbone import Loaded, load_backbone
from vs2_plugin.clip.sites import Sites
from vs2_plugin.clip.tower import Tower
from vs2_plugin.gallery.contents import GalleryContents, GalleryPart, RetrievalEncoder
from vs2_plugin.gallery.files import GalleryFiles
from vs2_plugin.model.steered import SteeredCLIP
from vs2_plugin.modelstring import parse
from vs2_plugin.sae.topk import SaeConfig, TopKSAE
from vs2_plugin.steering.context import Task

MODEL = "ViT-B-32"
METHODS = ["vs2", "vs2@gate=0.99", "vs2pp", "vs2pp@gate=0.99", "clipsteer", "rag", "knn"]
#: Name -> the dtype of autocast; None: none.
PRECISIONS = {
    "cpu": {"autocast": torch.bfloat16, "float32": None},
    "cuda": {"autocast float16": torch.float16, "autocast bfloat16": torch.bfloat16, "float32": None},
}
LAP = 0.02  # seconds of calls that one time is taken of, on a GPU
CALLS = 10  # that are profiled
ROWS = 1 << 16


def random_rows(path: Path, count: int, width: int, device: str) -> None:
    """Write half-precision random numbers ``[count, width]``, which the device makes."""
    array = np.lib.format.open_memmap(path, "w+", np.float16, (count, width))
    for start in range(0, count, ROWS):
        rows = torch.randn(min(ROWS, count - start), width, device=device)
        array[start : start + len(rows)] = rows.half().cpu().numpy()


def make_checkpoint(store: Store, name: str, loaded: Loaded, count: int, device: str) -> None:
    """A checkpoint of random numbers."""
    torch.manual_seed(0)
    site = Sites.of(loaded.model).default
    sae = TopKSAE(SaeConfig(site.width, 4 * site.width, 64))
    folder = store.root / f"extracted-{name}"
    folder.mkdir(parents=True)
    random_rows(folder / f"{site.hookpoint}.npy", count, site.width, device)
    random_rows(folder / "embedding.clip.npy", count, 512, device)
    np.save(folder / "digests.npy", np.random.default_rng(0).integers(0, 2**63, count, dtype=np.uint64))
    part = GalleryPart("random", count, None, "random")
    contents = GalleryContents((part,), (site.hookpoint,), {"clip": RetrievalEncoder(512)}, labels=False)
    quantiles = {"0.9": 0.5, "0.99": 1.0}
    facts = SiteSAE(site.hookpoint, "plain", "none", site.width, [0.0] * site.width, 0.5, quantiles, {}, {})
    save_checkpoint(
        store.folder(name),
        backbone=MODEL,
        pretrained="",
        tower=Tower.of(loaded.model, loaded.transform),
        data=TrainingData(("random",), count),
        saes=[(facts, sae)],
        created={},
        gallery=GalleryFiles(contents, [{path.stem: path for path in folder.glob("*.npy")}]),
    )


def steered_model(text: str, loaded: Loaded, store: Store, name: str) -> SteeredCLIP:
    """A model with the same weights as the one loaded, and steering."""
    own = Loaded(copy.deepcopy(loaded.model), loaded.transform, loaded.tokenizer)
    model = SteeredCLIP(parse(text), own, lambda task: store.find(name))
    model.bind(Task("random"))
    return model


@torch.no_grad()
def seconds(model: nn.Module, images: torch.Tensor, dtype: torch.dtype | None, calls: int = 1) -> np.ndarray:
    """Of one call among so many, by the clock and of the processor."""
    device = images.device
    started = np.array([now(device), time.process_time()])
    for _ in range(calls):
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            model.encode_image(images)
    return (np.array([now(device), time.process_time()]) - started) / calls


def compare(
    plain: nn.Module, model: nn.Module, images: torch.Tensor, dtype: torch.dtype | None, rounds: int
) -> dict[str, object]:
    """Steered over plain, in pairs."""
    for warm in (plain, model, plain, model):
        seconds(warm, images, dtype)
    base = seconds(plain, images, dtype)[0]
    calls = 1 if images.device.type == "cpu" else min(20, max(1, round(LAP / base)))
    pairs = []
    for _ in range(rounds):
        order = [plain, model]
        random.shuffle(order)
        took = {id(one): seconds(one, images, dtype, calls) for one in order}
        pairs.append((took[id(plain)], took[id(model)]))
    ratios = np.array([steered / base for base, steered in pairs])
    (low, low_cpu), (ratio, ratio_cpu), (high, high_cpu) = np.percentile(ratios, [25, 50, 75], axis=0)
    base, steered = np.median(np.array(pairs)[:, :, 0], axis=0).tolist()
    return {
        "ratio": ratio,
        "quartiles": [low, high],
        "cpu_ratio": ratio_cpu,
        "cpu_quartiles": [low_cpu, high_cpu],
        "plain_s": base,
        "more_s": steered - base,
        "calls": calls,
    }


@torch.no_grad()
def times(model: nn.Module, images: torch.Tensor, dtype: torch.dtype | None) -> tuple[Counter[str], Counter[str]]:
    """Microseconds per call by kernel, and of the processor by operator."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if images.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as found:
        seconds(model, images, dtype, CALLS)
    kernels, operators = Counter[str](), Counter[str]()
    for event in found.key_averages():
        if event.device_type == torch.autograd.DeviceType.CUDA:  # not the operators, whose kernels these are
            kernels[event.key] += event.self_device_time_total / CALLS
        else:
            operators[event.key] += event.self_cpu_time_total / CALLS
    return kernels, operators


def added(plain: nn.Module, model: nn.Module, images: torch.Tensor, dtype: torch.dtype | None) -> Iterator[str]:
    """What steering adds, most first."""
    for what, base, steered in zip(
        ("GPU", "processor"), times(plain, images, dtype), times(model, images, dtype), strict=True
    ):
        more = {key: steered[key] - base[key] for key in steered}
        yield f"  {what}: {sum(base.values()):,.0f} us plain, {sum(steered.values()):,.0f} us steered; of it more:"
        for key, value in sorted(more.items(), key=lambda item: -item[1])[:12]:
            if value >= 1:
                yield f"  {value:10,.1f} us  {key[:90]}"


def main() -> None:
    """Measure, print, write."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--gallery", type=int, nargs="+", default=[50_000])
    arguments.add_argument("--batch_size", type=int, nargs="+", default=[64])
    arguments.add_argument("--methods", nargs="+", default=METHODS)
    arguments.add_argument("--precisions", nargs="+", help="of: " + ", ".join(PRECISIONS["cuda"]))
    arguments.add_argument("--profile", action="store_true", help="print what steering adds at the first batch size")
    arguments.add_argument("--out", type=Path)
    args = arguments.parse_args()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    machine = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    precisions = {name: PRECISIONS[device][name] for name in args.precisions or PRECISIONS[device]}
    classifier = nn.functional.normalize(torch.randn(512, 100, device=device), dim=0)
    random.seed(0)
    torch.manual_seed(0)
    facts = {"machine": machine, "torch": torch.__version__, "batch_size": args.batch_size, "gallery": args.gallery}
    results: list[dict] = []
    started = time.monotonic()

    def say(*words: object) -> None:
        print(f"[{time.monotonic() - started:5.1f} s]", *words, flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        store = Store(Path(scratch))
        loaded = load_backbone(MODEL, "", device=device)
        say("backbone loaded")
        for number, count in enumerate(args.gallery):
            make_checkpoint(store, f"gallery-{count}", loaded, count, device)
            say(f"gallery of {count:,} written")
            for name in args.methods:
                method, _, options = name.partition("@")
                text = f"{method}:{MODEL}@gallery-{count}" + (f"@{options}" if options else "")
                neighbours = parse(text).method.gallery == "neighbours"
                if number and not neighbours:
                    continue
                model = steered_model(text, loaded, store, f"gallery-{count}")
                model.set_classifier(classifier)
                for size in args.batch_size:
                    images = torch.randn(size, 3, 224, 224, device=device)
                    for precision, dtype in precisions.items():
                        row = {"method": name, "gallery": count if neighbours else None, "batch_size": size}
                        row |= {"precision": precision, "amp": dtype is not None}
                        row |= compare(loaded.model, model, images, dtype, args.rounds)
                        results.append(row)
                        low, high = row["quartiles"]
                        say(
                            f"{name:18} {count if neighbours else '':9} {size:4} {precision:17} {row['ratio']:.3f} "
                            f"[{low:.3f}, {high:.3f}] of {1e3 * row['plain_s']:.2f} ms, {1e3 * row['more_s']:+.3f} ms; "
                            f"processor {row['cpu_ratio']:.3f}"
                        )
                        if args.out:
                            args.out.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")
                if args.profile:
                    images, dtype = images[: args.batch_size[0]], next(iter(precisions.values()))
                    try:
                        print("\n".join(added(loaded.model, model, images, dtype)), flush=True)
                    except RuntimeError as error:  # a machine without counters
                        say(f"no profile: {error}")
                del model


if __name__ == "__main__":
    main()
