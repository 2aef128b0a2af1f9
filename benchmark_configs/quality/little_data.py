"""SAEs of few images, beside principal components: what is the best choice of k and expansion factor there?

    python benchmark_configs/quality/little_data.py --out DIR [--embeddings FILE.npz]

Explained variance of the test images and the gain of VS2, by the number of unlabeled images.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from judge import Dictionary, steer
from sources import Data, digits, embeddings

from vs2_plugin.sae.config import TrainConfig
from vs2_plugin.sae.fit import pca_fvu
from vs2_plugin.sae.source import Source
from vs2_plugin.sae.topk import fvu
from vs2_plugin.sae.train import train_sae

COUNTS = (50, 100, 300, 900)
#: k as a share of the width, and expansion factor; the first are the defaults.
SHAPES = ((1 / 8, 4), (1 / 8, 1), (1 / 32, 4), (1 / 32, 1))
SEEDS = (0, 1)


@torch.no_grad()
def rows(data: Data, count: int, samples: int) -> list[dict[str, object]]:
    """Train SAEs of all shapes on ``count`` images, and compare them with principal components on test images."""
    order = np.random.default_rng(0).permutation(len(data.unlabeled))[:count]
    x, width = data.unlabeled[order], data.test.shape[1]
    both = Source(torch.cat([x, data.test]).numpy(), "cpu")
    mean, zero, found = x.mean(0), data.accuracy(data.test), []
    centring = 100 * (data.accuracy(steer(data.test, data.test - mean, 1.05)) - zero)
    for share, expansion in SHAPES:
        k = max(1, int(width * share))
        pca = 1 - pca_fvu(both, np.arange(count), np.arange(count, len(data.test) + count), k)
        for seed in SEEDS:
            config = TrainConfig(k=k, expansion_factor=expansion, samples=samples, seed=seed)
            trained = train_sae(x.numpy(), config, quiet=True)
            own = Dictionary.of(trained.sae)
            code = own.code(data.test)
            rebuilt = code @ own.directions + own.bias
            explained = 1 - fvu(data.test, rebuilt).item()
            gain = 100 * (data.accuracy(steer(data.test, code @ own.directions, 1.05)) - zero)
            found.append({
                "data": data.name, "images": count, "k": k, "expansion": expansion, "seed": seed,
                "explained": explained, "pca": pca, "gain": gain, "centring": centring,
                "held_out": 1 - trained.figures.fvu, "held_out_pca": 1 - trained.figures.pca_fvu,
                "dead": trained.figures.dead,
            })  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--embeddings", type=Path, nargs="*", default=[])
    parser.add_argument("--samples", type=int, default=30_000)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, object]] = []
    for make in [digits, *(partial(embeddings, file) for file in args.embeddings)]:
        data = make()
        for count in COUNTS:
            lines += rows(data, count, args.samples)
            (args.out / "little_data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = ["| data | images | k | expansion | explained | k components | VS2, points | centring | warned |"]
    told += ["|---|" + "---:|" * 8]
    for key in dict.fromkeys((x["data"], x["images"], x["k"], x["expansion"]) for x in lines):
        own = [x for x in lines if (x["data"], x["images"], x["k"], x["expansion"]) == key]
        means = {name: np.mean([x[name] for x in own]) for name in ("explained", "pca", "gain", "centring")}
        warned = sum(x["held_out"] < x["held_out_pca"] for x in own)
        told.append("| " + " | ".join([
            *map(str, key), f"{means['explained']:.3f}", f"{means['pca']:.3f}", f"{means['gain']:+.1f}",
            f"{means['centring']:+.1f}", f"{warned} of {len(own)}",
        ]) + " |")  # fmt: skip
    (args.out / "little_data.md").write_text("\n".join(told) + "\n")


if __name__ == "__main__":
    main()
