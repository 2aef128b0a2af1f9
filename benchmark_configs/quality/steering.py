"""Which figure of an SAE tells how much steering along it gains, and how much is left beside centring.

    python benchmark_configs/quality/steering.py --out DIR [--embeddings FILE.npz ...]

SAEs of vs2-train-sae with other k, expansion factors, lengths and seeds are judged by their figures and by VS2 on test
images. Each is a line of DIR/steering.jsonl as soon as it is trained; those that are there are passed over.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from judge import Dictionary, judge, together
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from sources import Data, digits, embeddings
from table import gains, write

from vs2_plugin.report.drawing import LINES, PLAIN
from vs2_plugin.sae.config import TrainConfig
from vs2_plugin.sae.train import train_sae

SEEDS = (0, 1, 2)
#: k, expansion factor, activations seen.
DIGITS = [*product((4, 16, 64), (1, 4), (10_000, 100_000)), (16, 16, 100_000)]
EMBEDDINGS = list(product((8, 64, 256), (1, 4), (40_000,)))
FIGURES = {
    "explained": "explained variance", "kept": "predictions kept", "dead": "dead", "dense": "dense", "ms": "MS",
    "ms_above": "above shuffled", "probe_1": "one latent", "probe_5": "five latents", "collinear": "collinearity",
    "stability": "stability", "above_random": "stability over random",
}  # fmt: skip
#: (What VS2 gains over centring differs from it by the same for all SAEs of a data set.)
GAINS = {"gain": "VS2 at 1.05", "best": "VS2 at its best strength"}


def rows(data: Data, k: int, expansion: int, samples: int) -> list[dict[str, Any]]:
    """Train SAEs of one kind by all seeds, and judge them."""
    kinds = [TrainConfig(k=k, expansion_factor=expansion, samples=samples, seed=seed) for seed in SEEDS]
    found = [Dictionary.of(train_sae(data.unlabeled.numpy(), config, quiet=True).sae) for config in kinds]
    mean, share, random = together(found, data)
    kind = f"k {k}, x {expansion}, {samples:,}"
    shared = {"data": data.name, "kind": kind, "stability": mean, "stable": share, "stability_random": random}
    return [
        {**shared, "seed": config.seed, "k": k, "expansion": expansion, "samples": samples, **judge(one, data)}
        for config, one in zip(kinds, found, strict=True)
    ]


def correlations(lines: list[dict[str, Any]], path: Path) -> None:
    """Write Spearman's correlation of each figure with each gain, over all SAEs of a data set."""
    told = []
    for name in dict.fromkeys(line["data"] for line in lines):
        own = [gains(line) for line in lines if line["data"] == name]
        own = [{**line, "above_random": line["stability"] - line["stability_random"]} for line in own]
        told += [f"{name}, {len(own)} SAEs", "", "| Spearman's correlation | " + " | ".join(GAINS.values()) + " |"]
        told += ["|---|" + "---:|" * len(GAINS)]
        for figure, words in FIGURES.items():
            cells = [_correlation([_of(x, figure) for x in own], [x[gain] for x in own]) for gain in GAINS]
            told.append(f"| {words} | " + " | ".join(cells) + " |")
        told.append("")
    path.write_text("\n".join(told))


def _correlation(figures: list[float], gained: list[float]) -> str:
    constant = len(set(figures)) == 1 or len(set(gained)) == 1
    return "none: always the same" if constant else f"{spearmanr(figures, gained)[0]:+.2f}"


def _of(line: dict[str, Any], figure: str) -> float:
    value = float(line[figure])
    return 0.0 if np.isnan(value) else value


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Draw gain by explained variance, and what centring gains."""
    names = list(dict.fromkeys(line["data"] for line in lines))
    matplotlib.rcParams.update({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": "steering"})
    figure = Figure(figsize=(4.2 * len(names), 3.4), constrained_layout=True)
    for number, name in enumerate(names):
        own = [gains(line) for line in lines if line["data"] == name]
        axes = figure.add_subplot(1, len(names), number + 1, title=name, xlabel="explained variance of test images")
        axes.set_ylabel("change of accuracy at strength 1.05, points")
        for place, k in enumerate(sorted({line["k"] for line in own})):
            group = [line for line in own if line["k"] == k]
            axes.scatter([x["explained"] for x in group], [x["gain"] for x in group], s=14, label=f"VS2, k {k}",
                         color=LINES[place])  # fmt: skip
        centred = 100 * (own[0]["centring_1.05"] - own[0]["zero_shot"])
        axes.axhline(centred, color=PLAIN, linestyle="--", linewidth=1, label="centring")
        axes.axhline(0, color=PLAIN, linewidth=0.6)
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--embeddings", type=Path, nargs="*", default=[])
    parser.add_argument("--only", nargs="*", default=[], help="names of data sets")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "steering.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(line["data"], line["kind"]) for line in lines}
    makers = [(digits, DIGITS), *((partial(embeddings, file), EMBEDDINGS) for file in args.embeddings)]
    for make, grid in makers:
        data = make()
        for k, expansion, samples in grid if data.name in args.only or not args.only else []:
            if (data.name, f"k {k}, x {expansion}, {samples:,}") not in done and k <= expansion * data.test.shape[1]:
                lines += rows(data, k, expansion, samples)
                path.write_text("".join(json.dumps(line) + "\n" for line in lines))
                print(data.name, lines[-1]["kind"], flush=True)
    write(lines, args.out / "steering.md", "kind")
    correlations(lines, args.out / "correlations.md")
    draw(lines, args.out / "steering.svg")


if __name__ == "__main__":
    main()
