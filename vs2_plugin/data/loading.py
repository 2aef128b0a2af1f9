"""Loaders with processes of their own: how these begin, and how they end where something goes wrong."""

from __future__ import annotations

import signal
import traceback
from collections.abc import Iterable, Iterator
from typing import TypeVar

__all__ = ["leave_interruptions", "read"]

T = TypeVar("T")


def leave_interruptions(worker: int) -> None:
    """For a loader's ``worker_init_fn``: Ctrl-C is the main process's, which ends its workers. They would each print a
    traceback, or be missed while they end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def read(loader: Iterable[T]) -> Iterator[T]:
    """Yield what a loader yields. Where that fails, its processes end at once.

    An error that comes from one of them holds, in the frames of its traceback, the iterator that holds them all. Left
    to the garbage collector, they would not be told to end, and it would wait five seconds for each, at any later time.
    """
    try:
        yield from loader
    except Exception as error:
        traceback.clear_frames(error.__traceback__)
        raise
