"""Worker processes of data loaders: how they start, and how they end after an error."""

from __future__ import annotations

import signal
import traceback
from collections.abc import Iterable, Iterator
from typing import TypeVar

__all__ = ["leave_interruptions", "read"]

T = TypeVar("T")


def leave_interruptions(worker: int) -> None:
    """Make a loader's worker ignore Ctrl-C, as its ``worker_init_fn``: the main process ends its workers. Else each
    worker would print a traceback, or the loader would report it as lost."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def read(loader: Iterable[T]) -> Iterator[T]:
    """Yield the batches of a loader. If it fails, end its worker processes at once.

    The traceback of a worker's error refers, in its frames, to the iterator that owns all workers. Left to the garbage
    collector, the workers would not be told to end, and it would wait five seconds for each, at any later time.
    """
    try:
        yield from loader
    except Exception as error:
        traceback.clear_frames(error.__traceback__)
        raise
