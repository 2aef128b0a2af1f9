"""Means over the images that a steering has seen, for the results' metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

__all__ = ["Counted", "Tally", "counted"]

#: A tally, the sums over a batch to add to it, and the number of images.
Counted = tuple["Tally", Mapping[str, Tensor], int]

_COUNTED: ContextVar[list[Counted] | None] = ContextVar("counted", default=None)


class Tally:
    """Sums over images, kept on the device of the values: reading them after every batch would wait for the GPU."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the images seen so far."""
        self._seen = 0
        self._sums: dict[str, list[Tensor]] = {}

    def add(self, **values: Tensor) -> None:
        """Add a batch: each value is ``[batch]``, a bool or a number per image."""
        sums = {name: value.detach().sum(dtype=torch.double) for name, value in values.items()}
        self.keep(sums, max(map(len, values.values()), default=0))

    def keep(self, sums: Mapping[str, Tensor], count: int) -> None:
        """Add a batch of ``count`` images by its sums."""
        apart = _COUNTED.get()
        if apart is not None:
            apart.append((self, sums, count))
            return
        for name, total in sums.items():
            self._sums.setdefault(name, []).append(total)  # added up once, not per batch, to save GPU time
        self._seen += count

    def means(self) -> dict[str, float]:
        """Return the mean of each value; an empty dict before the first batch."""
        return {name: _total(sums) / self._seen for name, sums in self._sums.items()} if self._seen else {}


def _total(sums: list[Tensor]) -> float:
    sums[:] = [torch.stack([one.to(sums[-1].device) for one in sums]).sum()]
    return float(sums[0])


@contextmanager
def counted() -> Iterator[list[Counted]]:
    """Collect the batches that are added to tallies within a ``with`` block, in place of counting them."""
    batches: list[Counted] = []
    token = _COUNTED.set(batches)
    try:
        yield batches
    finally:
        _COUNTED.reset(token)
