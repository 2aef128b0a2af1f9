"""Random numbers by a seed, which leave those of the caller alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["seeded"]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within a ``with`` block, torch draws on the processor what it draws after ``torch.manual_seed(seed)``; then it
    goes on with the caller's own numbers, as if none had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
