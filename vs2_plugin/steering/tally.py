"""Means over the images that a steering has seen, for the results' metrics."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Tally"]


class Tally:
    """Sums over images, kept on their device: to ask for the numbers after every batch would wait for it."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the images seen so far."""
        self._seen = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, **values: Tensor) -> None:
        """Count a batch: each value is bool or a number for every image, ``[batch]``."""
        for name, value in values.items():
            total = value.detach().sum(dtype=torch.double)
            known = self._sums.get(name)
            self._sums[name] = total if known is None else known.to(total) + total
        self._seen += len(value)

    def means(self) -> dict[str, float]:
        """The mean of each value; nothing before the first batch."""
        return {name: float(total) / self._seen for name, total in self._sums.items()} if self._seen else {}
