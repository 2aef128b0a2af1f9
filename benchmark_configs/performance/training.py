"""Speed and memory of one SAE training, in a process of its own.

    python benchmark_configs/performance/training.py --implementation vs2 [--d 768 --n 3072 --k 64 --batch 4096]
        [--device cuda] [--steps 20] [--seconds 60] [--activations FILE] [--turns]

Prints a line of JSON: the seconds of each step (without reading the batch, and without the first, which warms up) and
the peak memory. With ``--turns`` it takes a turn of at most that many steps and seconds for each empty line that it
reads, so that several can take turns; it says when it is ready. A line with a shape and a file, such as ``{"d": 768,
"n": 3072, "k": 64, "batch": 4096, "activations": "FILE"}``, ends the training and starts one of that.

On a CPU one batch is in memory at a time, and the memory is the process's. On a GPU all batches of the file are in its
memory from the start, and are taken in turn; the memory is what torch allocates there. Steps are asynchronous there, so
that the seconds of one are a part of those of many, between two waits for the GPU.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import numpy as np
import torch
from implementations import IMPLEMENTATIONS, Implementation, Shape
from synthetic import write
from torch import Tensor

Say = Callable[[dict], None]


class Over(BaseException):
    """Ends a training in its middle, past whatever a library catches."""


class Orders:
    """What is to be done next: an empty line is a turn, one with a shape another training."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self.following: dict | None = None

    def turn(self) -> bool:
        """Wait for a line; whether it orders a turn. If not, ``following`` is the training that it orders, if any."""
        line = next(self._lines, None)
        self.following = json.loads(line) if line and line.strip() else None
        return line is not None and self.following is None


class Turns:
    """Batches from a file, in turns; between two of them, or before and after many, it takes the time."""

    def __init__(
        self,
        path: Path,
        shape: Shape,
        steps: int,
        seconds: float,
        device: torch.device,
        orders: Orders,
        say: Say,
        on_gpu: bool | None = None,
    ) -> None:
        """``on_gpu`` may say that a CPU is to be treated as a GPU."""
        self.path, self.shape, self.steps, self.seconds = path, shape, steps, seconds
        self.orders, self.say, self.device = orders, say, device
        self.on_gpu = device.type != "cpu" if on_gpu is None else on_gpu
        self.count = path.stat().st_size // (4 * shape.d * shape.batch)
        self.read = 0
        self.resident = [self._read(number).to(device) for number in range(self.count)] if self.on_gpu else None
        if self.on_gpu:
            self.say({"imported_mb": peak(self.device)})
        self.first = self._next()

    def __len__(self) -> int:
        return 10**6  # no end is planned: rates do not fall while the time is taken

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(5 if self.on_gpu else 2):  # kernels are compiled, graphs recorded
            yield self._next()
        settle(self.device)
        self.say({"ready": True})
        while self.orders.turn():
            yield self._next()
            lap = yield from self._lap()
            took: list[float] = []
            while len(took) < self.steps and lap * sum(took) < self.seconds:
                batches = [self._next() for _ in range(lap)]
                started = now(self.device)
                yield from batches
                took.append((now(self.device) - started) / lap)
            found = {"seconds": took, "lap": lap, "peak_mb": peak(self.device)}
            settle(self.device)
            self.say(found)
        raise Over

    def _lap(self) -> Generator[Tensor, None, int]:
        """How many steps one time is taken of: one on a CPU, some hundredths of a second of them on a GPU."""
        if not self.on_gpu:
            return 1
        started, tried = now(self.device), 3
        for _ in range(tried):
            yield self._next()
        step = (now(self.device) - started) / tried
        return max(1, min(2000, round(self.seconds / 4 / step)))

    def _next(self) -> Tensor:
        number = self.read % self.count
        self.read += 1
        return self._read(number) if self.resident is None else self.resident[number]

    def _read(self, number: int) -> Tensor:
        size = self.shape.batch * self.shape.d
        return torch.from_numpy(np.fromfile(self.path, np.float32, size, offset=4 * size * number)).view(
            -1, self.shape.d
        )


def now(device: torch.device) -> float:
    """The time, when all that was ordered of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def settle(device: torch.device) -> None:
    """Leave to others the memory of a GPU that is not in use."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def peak(device: torch.device | str = "cpu") -> float:
    """Peak memory so far, in MB: of this process, or what torch allocated on a GPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
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


def train(implementation: Implementation, shape: Shape, path: Path, made: Callable[[Path, Shape], Turns]) -> dict:
    """Train until another training is ordered; why it failed, if it did."""
    torch.manual_seed(0)
    try:
        implementation.train(shape, made(path, shape), lambda reconstruct: None)
    except Over:
        return {}
    except Exception as error:  # whatever a library raises: it is then not measured, and others are
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"[:500]}
    return {"failed": "it ended before the batches did"}


def main() -> None:
    """Train, and say how fast."""
    parser = arguments(__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--turns", action="store_true")
    args = parser.parse_args()
    orders = Orders(iter(sys.stdin.readline, "") if args.turns else iter(["\n"]))
    say = json_lines()
    implementation, device = IMPLEMENTATIONS[args.implementation], torch.device(args.device)
    try:
        importlib.import_module(implementation.module)
        warm = torch.nn.Parameter(torch.ones(1, device=device))
        warm.square().backward()
        torch.optim.Adam([warm]).step()  # the first one imports much
    except Exception as error:
        say({"failed": f"{type(error).__name__}: {error}"[:500]})
        raise
    say({"imported_mb": peak()})

    def made(path: Path, shape: Shape) -> Turns:
        return Turns(path, shape, args.steps, args.seconds, device, orders, say)

    with tempfile.TemporaryDirectory() as scratch:
        if args.activations is None:
            args.activations = Path(scratch) / "activations"
            write(args.activations, args.d, 8 * args.batch)
        order: dict | None = {name: getattr(args, name) for name in ("d", "n", "k", "batch", "activations")}
        while order is not None:
            path = Path(order.pop("activations"))
            failed = train(implementation, Shape(**order), path, made)
            if failed:
                say(failed)
                while orders.turn():  # none is ordered of what failed
                    pass
            order = orders.following
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
