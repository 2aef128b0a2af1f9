"""Time of ``encode_image`` steered over plain: ViT-B-32 with random weights, batches of random images.

    python benchmark_configs/performance/steering.py [--rounds 15] [--gallery 50000] [--out steering.json]

Plain and steered calls take turns in one process, each pair in random order; the figures are medians and quartiles of
the ratio of a pair, by the clock and, less disturbed by other processes, by processor time. The SAE (n = 3072, k = 64)
and the gallery are random too: the work does not depend on their values.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from vs2_plugin.checkpoint.checkpoint import SiteSAE, TrainingData, save_checkpoint
from vs2_plugin.checkpoint.store import Store
from vs2_plugin.clip.backbone import load_backbone
from vs2_plugin.clip.sites import Sites
from vs2_plugin.clip.tower import Tower
from vs2_plugin.gallery.contents import GalleryContents, GalleryPart, RetrievalEncoder
from vs2_plugin.gallery.files import GalleryFiles
from vs2_plugin.harness.loader import load
from vs2_plugin.sae.topk import SaeConfig, TopKSAE

MODEL = "ViT-B-32"
METHODS = ["vs2", "vs2@gate=0.99", "vs2pp", "vs2pp@gate=0.99", "clipsteer", "rag", "knn"]
NAME = "benchmark"


def make_checkpoint(store: Store, count: int) -> None:
    """A checkpoint of random numbers."""
    torch.manual_seed(0)
    loaded = load_backbone(MODEL, "")
    site = Sites.of(loaded.model).default
    sae = TopKSAE(SaeConfig(site.width, 4 * site.width, 64))
    rng = np.random.default_rng(0)
    folder = store.root / "extracted"
    folder.mkdir(parents=True)
    arrays = {
        site.hookpoint: rng.standard_normal((count, site.width), dtype=np.float32).astype(np.float16),
        "embedding.clip": rng.standard_normal((count, 512), dtype=np.float32).astype(np.float16),
        "digests": rng.integers(0, 2**63, count, dtype=np.uint64),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    part = GalleryPart("random", count, None, "random")
    contents = GalleryContents((part,), (site.hookpoint,), {"clip": RetrievalEncoder(512)}, labels=False)
    quantiles = {"0.9": 0.5, "0.99": 1.0}
    facts = SiteSAE(site.hookpoint, "plain", "none", site.width, [0.0] * site.width, 0.5, quantiles, {}, {})
    save_checkpoint(
        store.folder(NAME),
        backbone=MODEL,
        pretrained="",
        tower=Tower.of(loaded.model, loaded.transform),
        data=TrainingData(("random",), count),
        saes=[(facts, sae)],
        created={},
        gallery=GalleryFiles(contents, [{name: folder / f"{name}.npy" for name in arrays}]),
    )


@torch.no_grad()
def seconds(model: torch.nn.Module, images: torch.Tensor, amp: bool) -> np.ndarray:
    """Of one call, by the clock and of the processor."""
    if images.device.type == "cuda":
        torch.cuda.synchronize()
    started = np.array([time.perf_counter(), time.process_time()])
    with torch.autocast(images.device.type, enabled=amp):
        model.encode_image(images)
    if images.device.type == "cuda":
        torch.cuda.synchronize()
    return np.array([time.perf_counter(), time.process_time()]) - started


def main() -> None:
    """Measure, print, write."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--gallery", type=int, default=50_000)
    arguments.add_argument("--batch_size", type=int, default=64)
    arguments.add_argument("--methods", nargs="+", default=METHODS)
    arguments.add_argument("--out", type=Path)
    args = arguments.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    images = torch.randn(args.batch_size, 3, 224, 224, device=device)
    classifier = torch.nn.functional.normalize(torch.randn(512, 100, device=device), dim=0)
    random.seed(0)
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        store = Store(Path(scratch))
        make_checkpoint(store, args.gallery)
        for name in args.methods:
            method, _, options = name.partition("@")
            torch.manual_seed(0)
            text = f"{method}:{MODEL}@{NAME}" + (f"@{options}" if options else "")
            model, _, _ = load(text, device=device, store=store, dataset="random")
            model.set_classifier(classifier)
            torch.manual_seed(0)
            plain = load_backbone(MODEL, "", device=device).model
            for amp in (True, False):
                for warm in (plain, model, plain, model):
                    seconds(warm, images, amp)
                pairs = []
                for _ in range(args.rounds):
                    order = [plain, model]
                    random.shuffle(order)
                    took = {id(one): seconds(one, images, amp) for one in order}
                    pairs.append((took[id(plain)], took[id(model)]))
                ratios = np.array([steered / base for base, steered in pairs])
                (low, low_cpu), (ratio, ratio_cpu), (high, high_cpu) = np.percentile(ratios, [25, 50, 75], axis=0)
                base = float(np.median([base[0] for base, _ in pairs]))
                results.append(
                    {
                        "method": name,
                        "amp": amp,
                        "ratio": ratio,
                        "quartiles": [low, high],
                        "cpu_ratio": ratio_cpu,
                        "cpu_quartiles": [low_cpu, high_cpu],
                        "plain_s": base,
                    }
                )
                print(
                    f"{name:18} {'autocast' if amp else 'float32 ':8}  {ratio:.3f} [{low:.3f}, {high:.3f}] of "
                    f"{base:.3f} s; processor {ratio_cpu:.3f} [{low_cpu:.3f}, {high_cpu:.3f}]",
                    flush=True,
                )
    if args.out:
        facts = {"machine": machine, "torch": torch.__version__, "batch_size": args.batch_size, "gallery": args.gallery}
        args.out.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
