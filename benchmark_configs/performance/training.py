"""Speed and memory of one SAE training, in a process of its own.

    python benchmark_configs/performance/training.py --implementation vs2 [--d 768 --n 3072 --k 64 --batch 4096]
        [--steps 20] [--seconds 60] [--activations FILE] [--turns]

Prints a line of JSON: the seconds of each step (without reading the batch, and without the first, which warms up) and
the peak memory. With ``--turns`` it takes a turn of at most that many steps and seconds for each line that it reads,
so that several can take turns; the first line that it prints says that it is ready.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from implementations import IMPLEMENTATIONS, Shape
from synthetic import write
from torch import Tensor

Say = Callable[[dict], None]


class Turns:
    """Batches from a file, in turns; between two of them it takes the time. Only one is in memory."""

    def __init__(
        self, path: Path, shape: Shape, steps: int, seconds: float, wait: Callable[[], bool], say: Say
    ) -> None:
        self.path, self.shape, self.steps, self.seconds, self.wait, self.say = path, shape, steps, seconds, wait, say
        self.count = path.stat().st_size // (4 * shape.d * shape.batch)
        self.read = 0
        self.first = self._next()

    def __len__(self) -> int:
        return 10**6  # no end is planned: rates do not fall while the time is taken

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(2):
            yield self._next()
        self.say({"ready": True})
        while self.wait():
            yield self._next()
            took: list[float] = []
            while len(took) < self.steps and sum(took) < self.seconds:
                x = self._next()
                started = time.perf_counter()
                yield x
                took.append(time.perf_counter() - started)
            self.say({"seconds": took, "peak_mb": peak()})

    def _next(self) -> Tensor:
        size = self.shape.batch * self.shape.d
        offset = 4 * size * (self.read % self.count)
        self.read += 1
        return torch.from_numpy(np.fromfile(self.path, np.float32, size, offset=offset)).view(-1, self.shape.d)


def peak() -> float:
    """Peak memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def json_lines() -> Say:
    """A function that prints a line of JSON; whatever else is printed goes to the error output from now on."""
    sys.stdout.flush()
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(facts: dict) -> None:
        print(json.dumps(facts), file=lines, flush=True)

    return say


def arguments(description: str) -> argparse.ArgumentParser:
    """The arguments that all trainings have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--implementation", required=True, choices=IMPLEMENTATIONS)
    made.add_argument("--d", type=int, default=768)
    made.add_argument("--n", type=int, default=3072)
    made.add_argument("--k", type=int, default=64)
    made.add_argument("--batch", type=int, default=4096)
    made.add_argument("--activations", type=Path, help="what synthetic.py wrote (default: written, and removed)")
    return made


def main() -> None:
    """Train, and say how fast."""
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--turns", action="store_true")
    args = parser.parse_args()
    shape = Shape(args.d, args.n, args.k, args.batch)
    once = iter([True])
    wait = (lambda: bool(sys.stdin.readline())) if args.turns else (lambda: next(once, False))
    say = json_lines()
    with tempfile.TemporaryDirectory() as scratch:
        if args.activations is None:
            args.activations = Path(scratch) / "activations"
            write(args.activations, shape.d, 4 * shape.batch)
        implementation = IMPLEMENTATIONS[args.implementation]
        torch.manual_seed(0)
        try:
            importlib.import_module(implementation.module)
            warm = torch.nn.Parameter(torch.ones(1))
            warm.square().backward()
            torch.optim.Adam([warm]).step()  # the first one imports much
            say({"imported_mb": peak()})
            batches = Turns(args.activations, shape, args.steps, args.seconds, wait, say)
            implementation.train(shape, batches, lambda reconstruct: None)
        except Exception as error:  # whatever a library raises: it is then not measured, and others are
            say({"failed": f"{type(error).__name__}: {error}"})
            raise


if __name__ == "__main__":
    main()
