"""Paths of many files in little memory, folder listings that are made once, and folders that share files by links.

No heavy imports.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache, partial
from typing import TYPE_CHECKING, Any, TypeVar, overload

if TYPE_CHECKING:
    import numpy as np

__all__ = ["PICTURES", "SPLITS", "Paths", "kept", "listed", "listed_once", "share_files"]

T = TypeVar("T")
#: Suffixes of image files, in lower case.
PICTURES = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
#: Split -> names of folders that may hold it, in order of preference.
SPLITS = {"train": ("train",), "test": ("test", "val", "valid", "validation")}
#: Suffixes of files that hold images.
_HOLDING = PICTURES | {".tar"}

#: The listings made in the current block of :func:`listed_once`, by what was listed; None outside of a block.
listed: ContextVar[dict[Any, Any] | None] = ContextVar("listed", default=None)


@contextmanager
def listed_once() -> Iterator[None]:
    """List each folder only once within the block, however often it is opened, so that a command reads the same files
    throughout."""
    token = listed.set({} if listed.get() is None else listed.get())
    try:
        yield
    finally:
        listed.reset(token)


def kept(what: tuple[str, ...], make: Callable[[], T]) -> T:
    """Return the listing that ``make`` makes, or made before of the same in the block of :func:`listed_once`."""
    listings = listed.get()
    if listings is None:
        return make()
    if what not in listings:
        listings[what] = make()
    found: T = listings[what]
    return found


def share_files(one: str, other: str) -> bool:
    """Return whether two folders, given by their real paths, share images or shards: one lies in the other, or links in
    them lead to the same files. Copies and hidden files are not found.

    Within a block of :func:`listed_once`, each folder is searched for links once; a million links take 6 s.
    """
    if _is_within({one}, other) or _is_within({other}, one):
        return True
    ours, theirs = (kept(("places", folder), partial(_places, folder)) for folder in (one, other))
    if not ours.isdisjoint(theirs):
        return True
    above, below = ({os.path.dirname(path) for path in places} for places in (theirs, ours))
    return any(_is_within(ours, path) for path in above) or any(_is_within(theirs, path) for path in below)


def _is_within(places: set[str], path: str) -> bool:
    """Return whether a path is one of the places, or lies in one."""
    above = os.path.dirname(path)
    return path in places or (above not in ("", path) and _is_within(places, above))


def _places(folder: str) -> set[str]:
    """Return the real paths where a folder's files lie: the folder itself, and the targets of links in it."""
    places, pending, real = {folder}, [folder], cache(os.path.realpath)
    while pending:
        with suppress(OSError), os.scandir(pending.pop()) as entries:  # no entries if it is a URL, or gone
            for entry in (entry for entry in entries if not entry.name.startswith(".")):
                if not entry.is_symlink():
                    if entry.is_dir():
                        pending.append(entry.path)
                elif os.path.splitext(entry.name)[1].lower() in _HOLDING:  # there may be a million of these links
                    where, name = os.path.split(os.path.join(os.path.dirname(entry.path), os.readlink(entry.path)))
                    path = os.path.join(real(where), name)
                    places.add(real(path) if os.path.islink(path) else path)
                elif os.path.isdir(entry.path) and (path := real(entry.path)) not in places:
                    places.add(path)
                    pending.append(path)
    return places


class Paths(Sequence[str]):
    """Relative paths of files, as one piece of bytes and the offset at which each path ends, so that a million paths
    are not a million objects, and the processes of a loader share them."""

    def __init__(self, text: bytes, ends: np.ndarray) -> None:
        """Take all paths as ``text``, and where each ends: int64 ``[count]``, rising up to the length of ``text``."""
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
