"""Held-out FVU and dead latents of one SAE training at its defaults, in a process of its own.

    python benchmark_configs/performance/quality.py --implementation vs2 --activations FILE [--samples 500000]
        [--dtype float32] [--count 90000] [--seed 0] [--at SECONDS]

The last tenth of the file, at most 10,000 activations, is held out, and of the others the first ``--count`` are
trained on. ``--samples 0`` is this package's default. ``--at`` looks a first time after so many seconds of training.
Prints a line of JSON. Dead are latents that none of the activations trained on (of at most 90,000) activates.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from implementations import IMPLEMENTATIONS, Reconstruct, Shape, used
from synthetic import read
from torch import Tensor
from training import arguments, json_lines

CHUNK, LOOKED_AT = 4096, 90_000


class Watched:
    """Batches in random order; between two of them it takes the time."""

    def __init__(
        self, activations: np.ndarray, batch: int, samples: int, seed: int, at: float, look: Callable[[], float]
    ) -> None:
        self.activations, self.batch, self.samples, self.seed = activations, batch, samples, seed
        self.at, self.look, self.seconds, self.seen = at, look, 0.0, None
        self.first = self._rows(np.arange(batch))

    def __len__(self) -> int:
        return max(1, self.samples // self.batch)

    def __iter__(self) -> Iterator[Tensor]:
        rng = np.random.default_rng(self.seed)
        waiting = np.empty(0, np.int64)
        for step in range(1, len(self) + 1):
            while len(waiting) < self.batch:
                waiting = np.concatenate([waiting, rng.permutation(len(self.activations))])
            x, waiting = self._rows(np.sort(waiting[: self.batch])), waiting[self.batch :]
            started = time.perf_counter()
            yield x
            self.seconds += time.perf_counter() - started
            if self.seen is None and 0 < self.at <= self.seconds:
                self.seen = {"samples": step * self.batch, "seconds": self.seconds, "fvu": self.look()}

    def _rows(self, chosen: np.ndarray) -> Tensor:
        return torch.from_numpy(self.activations[chosen]).float()


@torch.no_grad()
def fvu(reconstruct: Reconstruct, held: np.ndarray) -> float:
    """Over held-out activations."""
    unexplained = 0.0
    for start in range(0, len(held), CHUNK):
        x = torch.from_numpy(held[start : start + CHUNK])
        unexplained += (x - reconstruct(x)[0].float()).double().pow(2).sum().item()
    return unexplained / ((held - held.mean(0)).astype(np.float64) ** 2).sum()


@torch.no_grad()
def dead(reconstruct: Reconstruct, trained: np.ndarray) -> float:
    """The share of latents that no activation trained on activates."""
    looked_at, active = trained[:LOOKED_AT], False
    for start in range(0, len(looked_at), CHUNK):
        active = reconstruct(torch.from_numpy(looked_at[start : start + CHUNK].astype(np.float32)))[1] | active
    return 1 - active.float().mean().item()


def by_this_package(trained: np.ndarray, shape: Shape, samples: int, seed: int) -> tuple[Reconstruct, float]:
    """Train as vs2-train-sae does; returns the SAE and the seconds that it took."""
    from vs2_plugin.sae.config import TrainConfig
    from vs2_plugin.sae.train import train_sae

    config = TrainConfig(expansion_factor=shape.n // shape.d, k=shape.k, samples=samples, seed=seed)
    started = time.perf_counter()
    sae = train_sae(trained, config, quiet=True).sae
    seconds = time.perf_counter() - started

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        latents = sae.encode(x)
        return sae.decode(latents), used(latents.indices, latents.values, shape.n)

    return reconstruct, seconds


def main() -> None:
    """Train, and say how well."""
    parser = arguments(__doc__)
    parser.add_argument("--samples", type=int, default=500_000)
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="what the file holds")
    parser.add_argument("--count", type=int, default=90_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at", type=float, default=0)
    args = parser.parse_args()
    if args.activations is None:
        parser.error("--activations is missing; expected what synthetic.py wrote")
    shape = Shape(args.d, args.n, args.k, args.batch)
    say = json_lines()
    activations = read(args.activations, shape.d, args.dtype)
    held = activations[-min(10_000, len(activations) // 10) :].astype(np.float32)
    trained = activations[: min(args.count, len(activations) - len(held))]
    torch.manual_seed(args.seed)
    seen = None
    try:
        if args.implementation == "vs2":
            reconstruct, seconds = by_this_package(trained, shape, args.samples, args.seed)
        else:
            implementation = IMPLEMENTATIONS[args.implementation]
            importlib.import_module(implementation.module)
            kept: list[Reconstruct] = []
            batches = Watched(trained, shape.batch, args.samples, args.seed, args.at, lambda: fvu(kept[0], held))
            implementation.train(shape, batches, kept.append)
            reconstruct, seconds, seen = kept[0], batches.seconds, batches.seen
        found = {"fvu": fvu(reconstruct, held), "dead": dead(reconstruct, trained)}
        say({"count": len(trained), "seconds": seconds, **found, "first_look": seen})
    except Exception as error:  # whatever a library raises: it is then not measured, and others are
        say({"failed": f"{type(error).__name__}: {error}"})
        raise


if __name__ == "__main__":
    main()
