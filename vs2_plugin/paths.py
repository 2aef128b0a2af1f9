"""Paths of many files, some tens of bytes each, and how often a command lists them. No heavy imports."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Paths", "listed", "listed_once"]

#: What was listed in the present block of :func:`listed_once`: what was asked for -> the listing.
listed: ContextVar[dict[Any, Any] | None] = ContextVar("listed", default=None)


@contextmanager
def listed_once() -> Iterator[None]:
    """Within the block a folder is listed once, however often it is opened: a command reads what was there when it
    began."""
    token = listed.set({} if listed.get() is None else listed.get())
    try:
        yield
    finally:
        listed.reset(token)


class Paths(Sequence[str]):
    """Relative paths of files: their bytes in one piece, and where each ends. A million of them are no million objects,
    and the processes of a loader share them."""

    def __init__(self, text: bytes, ends: np.ndarray) -> None:
        """``ends``: int64 ``[count]``, rising, the last one the length of ``text``."""
        self.text, self.ends = text, ends

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        start = int(self.ends[number - 1]) if number else 0
        return os.fsdecode(self.text[start : int(self.ends[number])])
