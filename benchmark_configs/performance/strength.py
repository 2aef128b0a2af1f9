"""Seconds that the choice of a strength takes: ``vs2@alpha=auto`` and ``vs2s``, on images and classes made at random.

    python benchmark_configs/performance/strength.py [--device cuda] [--images 10000] [--classes 1000] [--rounds 5]
        [--methods vs2@alpha=auto vs2s]

A ViT-B-32 with random weights, an SAE of 3,072 latents, k 64, and a gallery of so many random activations and
embeddings. Each round brings new class embeddings, so that nothing that was kept can be used, and the methods take
turns. Prints a line of JSON.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from steering import MODEL, make_checkpoint, steered_model
from torch.nn.functional import normalize
from training import json_lines, now, peak

from vs2_plugin.checkpoint.store import Store
from vs2_plugin.clip.backbone import load_backbone


def main() -> None:
    """Measure each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--classes", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=["vs2@alpha=auto", "vs2s"])
    args = parser.parse_args()
    say = json_lines()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    took: dict[str, list[float]] = {method: [] for method in args.methods}
    with tempfile.TemporaryDirectory() as scratch:
        store = Store(Path(scratch))
        loaded = load_backbone(MODEL, "", device=str(device))
        make_checkpoint(store, "random", loaded, args.images, str(device))
        models = {}
        for text in args.methods:
            method, _, options = text.partition("@")
            name = f"{method}:{MODEL}@random" + (f"@{options}" if options else "")
            models[text] = steered_model(name, loaded, store, "random")
        for turn in range(-1, args.rounds):  # the first one warms up
            for text, model in models.items():
                classifier = normalize(torch.randn(512, args.classes, device=device), dim=0)
                started = now(device)
                model.set_classifier(classifier)
                if turn >= 0:
                    took[text].append(now(device) - started)
    rows = [
        {"method": text, "s": statistics.median(times), "spread_s": [min(times), max(times)]}
        for text, times in took.items()
    ]
    say({"images": args.images, "classes": args.classes, "methods": rows, "peak_mb": peak()})


if __name__ == "__main__":
    main()
