"""Which figure of an SAE tells how much steering along it gains, and how much is left beside centring.

    python benchmark_configs/quality/steering.py --out DIR [--embeddings FILE.npz ...]

SAEs of vs2-train-sae with other k, expansion factors, lengths and seeds, by PASS too, and those of variants.py are
judged by their figures and by what VS2, vs2s and PASS give on test images. Each is a line of DIR/steering.jsonl as soon
as it is trained; those that are there are passed over.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
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
from variants import VARIANTS, Trainer

from vs2_plugin.report.drawing import LINES, PLAIN
from vs2_plugin.sae.config import TrainConfig
from vs2_plugin.sae.train import train_sae

SEEDS = (0, 1, 2)
#: k, expansion factor, activations seen: first 1 and 4 epochs, last the shape that is trained in other ways too.
DIGITS = [
    *product((16,), (4,), (900, 3_600)), *product((4, 16, 64), (1, 4), (10_000, 100_000)), (16, 16, 100_000),
    (16, 4, 100_000),
]  # fmt: skip
EMBEDDINGS = [*product((64,), (4,), (2_000, 8_000)), *product((8, 64, 256), (1, 4), (40_000,)), (64, 4, 40_000)]
OTHERS = ("off_l1_0.1", "matryoshka", "batch_topk", "archetypal")
FIGURES = {
    "explained": "explained variance", "kept": "predictions kept", "recovered": "accuracy recovered", "dead": "dead",
    "dense": "dense", "ms": "MS", "ms_above": "above shuffled", "probe_1": "one latent", "probe_5": "five latents",
    "collinear": "collinearity", "stability": "stability", "above_random": "stability over random",
}  # fmt: skip
#: (What is gained over centring differs from the gain by the same for all SAEs of a data set.)
METHODS, AT = ("VS2", "vs2s", "PASS"), ("1.05", "best", "auto")


def kinds(data: Data) -> list[tuple[str, str, tuple[int, int, int]]]:
    """Return the trainings: by which means, what they are called, and their shapes."""
    grid = DIGITS if data.name == "digits" else EMBEDDINGS
    shapes = [shape for shape in dict.fromkeys(grid) if shape[0] <= shape[1] * data.test.shape[1]]
    named = {shape: "k {}, x {}, {:,}".format(*shape) for shape in shapes}
    found = [(training, named[shape], shape) for shape in shapes for training in ("plain", "PASS")]
    return found + [(name, f"{named[grid[-1]]}, {name}", grid[-1]) for name in OTHERS]


def rows(data: Data, training: str, kind: str, shape: tuple[int, int, int]) -> list[dict[str, Any]]:
    """Train SAEs of one kind by all seeds, and judge them."""
    k, expansion, samples = shape
    configs = [TrainConfig(k=k, expansion_factor=expansion, samples=samples, seed=seed) for seed in SEEDS]
    found = [train(data, training, config) for config in configs]
    mean, share, random = together(found, data)
    shared = {"data": data.name, "training": training, "kind": kind, "k": k, "expansion": expansion, "samples": samples}
    shared |= {"stability": mean, "stable": share, "stability_random": random}
    return [
        {**shared, "seed": config.seed, **judge(one, data)} for config, one in zip(configs, found, strict=True)
    ]


def train(data: Data, training: str, config: TrainConfig) -> Dictionary:
    """Train an SAE: plainly, by PASS, with the labels, or in another way."""
    if training in VARIANTS:
        if training != "plain":
            return Trainer(data.unlabeled, config, VARIANTS[training]).run()
        return Dictionary.of(train_sae(data.unlabeled.numpy(), config, quiet=True).sae)
    few = data.classifier.shape[1] > 100  # images of a class in a batch
    config = replace(config, pass_weight=0.8, pass_means="running" if few else "batch")
    return Dictionary.of(train_sae(data.unlabeled.numpy(), config, labels=data.unlabeled_labels, quiet=True).sae)


def with_pass(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines of SAEs that saw no labels, each with what is gained along that of PASS of the same shape."""
    twins = {(line["data"], line["kind"], line["seed"]): gains(line) for line in lines if line["training"] == "PASS"}
    found = []
    for line in lines:
        twin = twins.get((line["data"], line["kind"], line["seed"]), {})
        if line["training"] != "PASS":
            found.append({**line, **{name: value for name, value in twin.items() if name.startswith("PASS ")}})
    return found


def gained(lines: Sequence[dict[str, Any]], data: str, method: str) -> list[dict[str, Any]]:
    """Return the lines of a data set that a method steers along, with what is gained."""
    own = [gains(line) for line in lines if line["data"] == data and (line["training"] == "PASS") == (method == "PASS")]
    return [{**line, "above_random": line["stability"] - line["stability_random"]} for line in own]


def correlations(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Write Spearman's correlation of each figure with each gain, over all SAEs that a method steers along."""
    told = []
    for data in dict.fromkeys(line["data"] for line in lines):
        columns = list(product(METHODS, AT))
        told += [data, "", "| Spearman's correlation | " + " | ".join(map(" ".join, columns)) + " |"]
        told += ["|---|" + "---:|" * len(columns)]
        for figure, words in FIGURES.items():
            cells = [
                _correlation([_of(x, figure) for x in own], [x[f"{method} {at}"] for x in own])
                for method, at in columns if (own := gained(lines, data, method))
            ]  # fmt: skip
            told.append(f"| {words} | " + " | ".join(cells) + " |")
        told.append("")
    path.write_text("\n".join(told))


def beside_centring(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Write what each method gains over centring at the same strength."""
    told = ["| images | strength | centring | method | gains | range | over centring | SAEs above it |"]
    told += ["|---|---|---:|---|---:|---:|---:|---:|"]
    for data, at, method in product(dict.fromkeys(line["data"] for line in lines), AT, METHODS):
        own = gained(lines, data, method)
        found, centred = np.array([x[f"{method} {at}"] for x in own]), own[0][f"centring {at}"]
        cells = [f"{centred:+.1f}", method, f"{found.mean():+.1f}", f"{found.min():+.1f} to {found.max():+.1f}"]
        cells += [f"{found.mean() - centred:+.1f}", f"{(found > centred).sum()} of {len(found)}"]
        told.append("| " + " | ".join([data, at, *cells]) + " |")
    path.write_text("\n".join(told) + "\n")


def _correlation(figures: list[float], gained: list[float]) -> str:
    constant = len(set(figures)) == 1 or len(set(gained)) == 1
    return "none" if constant else f"{spearmanr(figures, gained)[0]:+.2f}"


def _of(line: dict[str, Any], figure: str) -> float:
    value = float(line[figure])
    return 0.0 if np.isnan(value) else value


def draw(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw gain by explained variance, where that is above 0, and what centring gains: a row for each data set, a
    column for each method."""
    names = list(dict.fromkeys(line["data"] for line in lines))
    matplotlib.rcParams.update({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": "steering"})
    figure = Figure(figsize=(9, 2.9 * len(names)), constrained_layout=True)
    panels = figure.subplots(len(names), len(METHODS), sharey="row", squeeze=False)
    for data, row in zip(names, panels, strict=True):
        row[0].set_ylabel(f"{data}: change of accuracy, points")
        for method, axes in zip(METHODS, row, strict=True):
            own = gained(lines, data, method)
            axes.set_title(f"{method} at strength 1.05")
            axes.set_xlabel("explained variance of test images, above 0")
            for place, k in enumerate(sorted({line["k"] for line in own})):
                group = [line for line in own if line["k"] == k and line["explained"] > 0]
                axes.scatter([x["explained"] for x in group], [x[f"{method} 1.05"] for x in group], s=12,
                             label=f"k {k}", color=LINES[place])  # fmt: skip
            axes.axhline(own[0]["centring 1.05"], color=PLAIN, linestyle="--", linewidth=1, label="centring, no SAE")
            axes.axhline(0, color=PLAIN, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].legend(frameon=False, fontsize=8)
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
    done = {(line["data"], line["training"], line["kind"]) for line in lines}
    for make in [digits, *(partial(embeddings, file) for file in args.embeddings)]:
        data = make()
        for training, kind, shape in kinds(data) if data.name in args.only or not args.only else []:
            if (data.name, training, kind) not in done:
                lines += rows(data, training, kind, shape)
                path.write_text("".join(json.dumps(line) + "\n" for line in lines))
                print(data.name, kind, training, flush=True)
    write(with_pass(lines), args.out / "steering.md", "kind")
    correlations(lines, args.out / "correlations.md")
    beside_centring(lines, args.out / "centring.md")
    draw(lines, args.out / "steering.svg")


if __name__ == "__main__":
    main()
