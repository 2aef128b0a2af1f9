"""Queries of a large gallery: exact on the device and on the processor, and by FAISS where it is installed.

    python benchmark_configs/performance/gallery.py [--device cuda] [--count 1000000] [--width 512] [--batch 64]
        [--neighbours 50] [--rounds 5] [--searches exact exact-cpu faiss]

Prints a line of JSON after each search; the last one holds all. The embeddings are half-precision files, mapped into
memory, of clustered directions: a thousand centres with noise around them, and so are the queries. Recall is the share
that a search finds of the neighbours of the exact search before it. Memory is what the search keeps of its own: on the
GPU, or in this process without the pages of mapped files.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from training import json_lines, now

from vs2_plugin.gallery.search import FaissSearch, Search, open_search

ROWS, CENTRES, QUERIES = 1 << 16, 1000, 256


def clustered(count: int, centres: Tensor, generator: torch.Generator) -> Tensor:
    """Rows ``[count, width]`` around centres drawn at random."""
    device = centres.device
    chosen = torch.randint(len(centres), (count,), device=device, generator=generator)
    return centres[chosen] + torch.randn(count, centres.shape[1], device=device, generator=generator)


def own_memory(device: torch.device) -> float:
    """What this process has allocated, in MB: on the GPU, or of its own without the pages of mapped files."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() / 1e6
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith("RssAnon")), float("nan"))


@torch.no_grad()
def measure(search: Search, queries: Tensor, batch: int, n: int, rounds: int) -> tuple[dict, np.ndarray]:
    """Milliseconds of one batch of queries, and the rows found for all of them."""
    batches = queries.split(batch)
    found = np.concatenate([search(some, n)[1].cpu().numpy() for some in batches])  # warms up, too
    took = []
    for _ in range(rounds):
        for some in batches:
            started = now(queries.device)
            search(some, n)
            took.append(1e3 * (now(queries.device) - started))
    return {"ms": statistics.median(took), "spread_ms": [min(took), max(took)]}, found


def main() -> None:
    """Measure each search."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--neighbours", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--searches", nargs="+", default=["exact", "exact-cpu", "faiss"])
    args = parser.parse_args()
    say = json_lines()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(0)
    centres = 2 * torch.randn(CENTRES, args.width, device=device, generator=generator)
    results = {"count": args.count, "width": args.width, "batch": args.batch, "neighbours": args.neighbours}
    results["device"] = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    results["searches"] = []
    exact: np.ndarray | None = None
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "embedding.npy"
        written = np.lib.format.open_memmap(path, "w+", np.float16, (args.count, args.width))
        for start in range(0, args.count, ROWS):
            rows = clustered(min(ROWS, args.count - start), centres, generator)
            written[start : start + len(rows)] = rows.half().cpu().numpy()
        del written
        embeddings = np.load(path, mmap_mode="r")
        queries = F.normalize(clustered(QUERIES, centres, generator), dim=-1)
        for name in args.searches:
            if name == "exact-cpu" and device == "cpu":
                continue
            kind, _, where = name.partition("-")
            own = torch.device(where or ("cpu" if kind == "faiss" else device))
            row = {"search": f"{kind} on {own.type}"}
            before, started = own_memory(own), time.perf_counter()
            try:
                search = open_search(kind, embeddings, Path(scratch) / "clip.faiss", own)
                row["ready_s"] = time.perf_counter() - started
                if kind == "faiss" and not isinstance(search, FaissSearch):
                    row["search"] += ", which searches so small a gallery exactly"
                rounds = args.rounds if own.type == device else 1
                timed, found = measure(search, queries.to(own), args.batch, args.neighbours, rounds)
                row |= {**timed, "memory_mb": own_memory(own) - before}
                exact = found if kind == "exact" else exact
                if exact is not None:
                    pairs = zip(exact, found, strict=True)
                    row["recall"] = float(np.mean([len(np.intersect1d(*pair)) / args.neighbours for pair in pairs]))
                del search
            except Exception as error:  # FAISS may be missing, memory short: the others are measured
                row["failed"] = f"{type(error).__name__}: {error}"[:300]
                print(row["failed"], file=sys.stderr)
            results["searches"].append(row)
            say(results)


if __name__ == "__main__":
    main()
