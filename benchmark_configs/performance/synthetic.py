"""Synthetic activations: sparse, non-negative mixtures of random directions around a common mean, with noise.

    python benchmark_configs/performance/synthetic.py FILE D COUNT [float16]

Each activation is ``m + sum c_i u_i + noise``. Of 2,000 random unit directions u about 30 are active (a Poisson number,
5 to 60, drawn with replacement with probabilities falling as (rank + 50)^-0.7, so that some are rare), with log-normal
coefficients c. The mean m has the length of the mean deviation from it, and the noise a twentieth of that. The file
holds rows and nothing else: float32, or float16 as this package's cache.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

DIRECTIONS, ACTIVE, BLOCK = 2000, 30, 5000


def write(path: Path, d: int, count: int, dtype: str = "float32", seed: int = 20260101) -> None:
    """Write ``count`` activations of width ``d``. They are independent: any part of them is a sample of all."""
    rng = np.random.default_rng(seed)
    directions = _unit(rng.standard_normal((DIRECTIONS, d), dtype=np.float32))
    weights = (np.arange(1, DIRECTIONS + 1) + 50.0) ** -0.7
    cumulative = np.cumsum(weights / weights.sum())
    mean = _unit(rng.standard_normal((1, d), dtype=np.float32))
    length = None
    with path.open("wb") as file:
        for start in range(0, count, BLOCK):
            rows = _mixtures(rng, directions, cumulative)
            if length is None:
                length = float(np.linalg.norm(rows - rows.mean(0), axis=1).mean())
            rows += length * mean
            rows += 0.05 * length / np.sqrt(d) * rng.standard_normal(rows.shape, dtype=np.float32)
            rows[: count - start].astype(dtype, copy=False).tofile(file)


def read(path: Path, d: int, dtype: str = "float32") -> np.ndarray:
    """The activations ``[count, d]``, memory-mapped."""
    return np.memmap(path, dtype=dtype, mode="r").reshape(-1, d)


def _mixtures(rng: np.random.Generator, directions: np.ndarray, cumulative: np.ndarray) -> np.ndarray:
    active = rng.poisson(ACTIVE, BLOCK).clip(5, 60)
    rows = np.repeat(np.arange(BLOCK), active)
    chosen = np.searchsorted(cumulative, rng.random(len(rows))).clip(0, DIRECTIONS - 1)
    coefficients = np.zeros((BLOCK, DIRECTIONS), np.float32)
    coefficients[rows, chosen] = rng.lognormal(0.0, 1.0, len(rows))  # of a direction drawn twice, one counts
    return coefficients @ directions


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
