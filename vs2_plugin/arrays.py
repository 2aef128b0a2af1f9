"""Arrays on disk: :class:`Column` grows while it is written and carries digests of its rows, :class:`Stack` reads
several arrays as one. Also digests of tensors, and evenly spread row numbers."""

from __future__ import annotations

import hashlib
import io
import json
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor

from vs2_plugin.files import atomic_file, file_digest

__all__ = [
    "ROWS", "Array", "Column", "Stack", "ask_for", "check", "check_all", "check_file", "digest_of", "on_disk", "spread",
    "stack", "sums_of", "trust_all", "whole_rows",
]  # fmt: skip

Array = np.ndarray[Any, np.dtype[Any]]
#: Rows of a column per digest: the most rows that an interrupted extraction has to compute again.
ROWS = 1024
#: Bytes from which on a memory-mapped array may lie on disk only; a smaller one was read in full not long ago.
_LARGE = 1 << 30
_LINE = 65  # bytes of a line with a digest
_HEADER = 128  # bytes of an .npy header, in which numpy leaves room for a greater count


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over the names, shapes, dtypes and bytes of ``tensors``, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def spread(count: int, limit: int) -> Tensor:
    """Return the numbers of ``count`` rows, int64: all of them, or ``limit`` evenly spread ones if there are more.

    >>> spread(3, 5).tolist(), spread(10, 4).tolist()
    ([0, 1, 2], [0, 3, 6, 9])
    """
    return torch.from_numpy(np.linspace(0, count - 1, min(count, limit)).astype(np.int64))


class Column:
    """An array ``[count, width]`` or ``[count]`` that grows in an ``.npy`` file, whose header has room for the final
    count.

    ``NAME.npy.sha256`` beside the file holds a digest per line: one for every 1,024 rows written and, once the array is
    complete, one for the remaining rows, if any, and one for the header.
    """

    def __init__(self, path: Path, width: int | None, dtype: DTypeLike, rows: int = 0) -> None:
        """Create the files, or continue after the first ``rows`` rows (see :func:`whole_rows`) and cut off the rest."""
        self.path, self.width, self.dtype, self.count = path, width, np.dtype(dtype), rows
        self._digest, self._row = hashlib.sha256(), self.dtype.itemsize * (1 if width is None else width)
        mode = "rb+" if rows else "wb"
        self._file, self._sums = open(path, mode), open(sums_of(path), mode)  # noqa: SIM115  # until close
        if not rows:
            self._file.write(self._header())
        # Rows that stay are not written again, so that an interruption at any point leaves them in the file.
        for file, size in ((self._file, _HEADER + rows * self._row), (self._sums, rows // ROWS * _LINE)):
            file.seek(size)
            file.truncate()

    def _header(self) -> bytes:
        buffer, form = io.BytesIO(), cast("Any", np.lib.format)  # numpy declares no types for it
        shape = (self.count,) if self.width is None else (self.count, self.width)
        descr = form.dtype_to_descr(self.dtype)
        form.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
        assert buffer.tell() == _HEADER
        return buffer.getvalue()

    def append(self, rows: Array) -> None:
        """Append rows ``[batch, width]`` or ``[batch]``."""
        rows = np.ascontiguousarray(rows, self.dtype)
        while len(rows):
            part, rows = np.split(rows, [ROWS - self.count % ROWS])
            data = part.data.cast("B") if part.size else b""
            self._file.write(data)
            self._digest.update(data)
            self.count += len(part)
            if self.count % ROWS == 0:
                self._file.flush()
                self._note(self._digest)
                self._digest = hashlib.sha256()

    def _note(self, digest: Any) -> None:
        self._sums.write(f"{digest.hexdigest()}\n".encode())
        self._sums.flush()

    def complete(self) -> str:
        """Write the final count, close the files and return the SHA-256 of the digests' file, which covers all rows."""
        if self.count % ROWS:
            self._note(self._digest)
        self._file.seek(0)
        self._file.write(self._header())
        self._note(hashlib.sha256(self._header()))
        self.close()
        return hashlib.sha256(sums_of(self.path).read_bytes()).hexdigest()

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        self._sums.close()


def sums_of(path: Path) -> Path:
    """Return the path of the file with the digests of an array's rows."""
    return path.with_name(f"{path.name}.sha256")


def whole_rows(path: Path, width: int | None, dtype: DTypeLike) -> int:
    """Return how many rows of an incomplete :class:`Column` are intact by their digests, a multiple of 1,024."""
    size = ROWS * np.dtype(dtype).itemsize * (1 if width is None else width)
    rows = 0
    with suppress(OSError), open(path, "rb") as file, open(sums_of(path), "rb") as sums:
        file.seek(_HEADER)
        for line in sums:
            chunk = file.read(size)
            if len(chunk) < size or hashlib.sha256(chunk).hexdigest().encode() != line.strip():
                break
            rows += ROWS
    return rows


def check(path: Path, expected: str) -> None:
    """Compare an array's file with the digests beside it, in full.

    Args:
        path: the file of a completed :class:`Column`.
        expected: what :meth:`Column.complete` returned.

    Raises:
        ValueError: file and digests differ; the message says where.
        OSError: one of the two files cannot be read.
    """
    raw = sums_of(path).read_bytes()
    if hashlib.sha256(raw).hexdigest() != expected:
        raise ValueError(f"{sums_of(path).name} is not the file that was written")
    *sums, first = raw.decode().split()
    with open(path, "rb") as file:
        if hashlib.sha256(file.read(_HEADER)).hexdigest() != first:
            raise ValueError("its header is not the one that was written")
        array: Array = np.load(path, mmap_mode="r")  # only now: for a damaged header, numpy may raise anything
        row = array.dtype.itemsize * math.prod(array.shape[1:])
        for number, digest in enumerate(sums):
            if hashlib.sha256(file.read(ROWS * row)).hexdigest() != digest:
                last = min(len(array), (number + 1) * ROWS) - 1
                raise ValueError(f"its rows {number * ROWS} to {last} are not those that were written")
        if file.read(1):
            raise ValueError("it continues after its last row")


_MEMORY = "verified.json"
#: Compares a file with its digest; raises ValueError if the two differ.
Compare = Callable[[Path, str], None]


def check_file(path: Path, expected: str) -> None:
    """Compare a file with its SHA-256 in hexadecimal digits. Raises ValueError if they differ."""
    if file_digest(path) != expected:
        raise ValueError("it is not the file that was written")


def check_all(
    folder: Path, expected: Mapping[str, str], thorough: bool = False, compare: Compare | None = None
) -> None:
    """Compare files with their digests; read a file that was compared before only if it has changed since.

    ``verified.json`` in the folder records size, times and inode number of each file that was compared.

    Args:
        folder: the folder of the files.
        expected: file name -> digest of its content; for an array, what :meth:`Column.complete` returned.
        thorough: read all files, whatever ``verified.json`` records.
        compare: compares one file with its digest; None: :func:`check`, for arrays.

    Raises:
        ValueError: a file is not the one that was written; the message names it and says where.
        OSError: a file cannot be read.
    """
    seen = _remembered(folder)
    marks = _marks(folder, expected)  # before reading, so that the next call notices a change made meanwhile
    for name, digest in expected.items():
        if thorough or seen.get(name) != marks[name]:
            try:
                (compare or check)(folder / name, digest)
            except ValueError as error:
                raise ValueError(f"{folder / name}: {error}") from error
    if any(seen.get(name) != marks[name] for name in marks):
        with suppress(OSError):  # in a folder that cannot be written, files are compared each time
            _remember(folder, marks)


def trust_all(folder: Path, expected: Mapping[str, str]) -> None:
    """Record in ``verified.json``, without reading them, that files match their digests: new ones, or hard links."""
    _remember(folder, _marks(folder, expected))


def _marks(folder: Path, expected: Mapping[str, str]) -> dict[str, list[str | int]]:
    """Return for each file its digest, and the size, times and inode number of the file and of its digests' file."""
    marks: dict[str, list[str | int]] = {}
    for name, digest in expected.items():
        path, marks[name] = folder / name, [digest]
        for status in (path.stat(), sums_of(path).stat()):
            marks[name] += [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    return marks


def _remembered(folder: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError, TypeError):
        return dict(json.loads((folder / _MEMORY).read_text()))
    return {}


def _remember(folder: Path, marks: Mapping[str, Any]) -> None:
    with atomic_file(folder / _MEMORY) as scratch:
        scratch.write_text(json.dumps({**_remembered(folder), **marks}))


def stack(parts: Sequence[Array]) -> Array | Stack:
    """Return several memory-mapped arrays ``[count, width]`` as one, which stays on disk."""
    return parts[0] if len(parts) == 1 else Stack(parts)


class Stack:
    """Arrays ``[count, width]`` stacked along their rows, indexed by a row number, a slice or an array of numbers."""

    def __init__(self, parts: Sequence[Array]) -> None:
        self._parts = parts
        self._starts = np.cumsum([0, *map(len, parts)])
        self.shape = (int(self._starts[-1]), int(parts[0].shape[1]))
        self.dtype = parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: int | slice | Array) -> Array:
        numbers = rows if isinstance(rows, np.ndarray) else np.arange(len(self))[rows]
        selected: Array = np.empty((numbers.size, self.shape[1]), self.dtype)
        for part, mask, local in self.owners(np.atleast_1d(numbers)):
            selected[mask] = part[local]
        return selected if numbers.ndim else selected[0]

    def owners(self, numbers: Array) -> Iterator[tuple[Array, Array, Array]]:
        """Yield each array with a mask (bool ``[count]``) of the row ``numbers`` ``[count]`` that lie in it, and their
        numbers in it."""
        owner = np.searchsorted(self._starts, numbers, side="right") - 1
        for index, part in enumerate(self._parts):
            mask = owner == index
            yield part, mask, numbers[mask] - self._starts[index]


def on_disk(array: Array | Stack) -> bool:
    """Return whether ``array`` is mapped from files and so large that memory may not hold it."""
    count, width = array.shape
    mapped = isinstance(array, Stack) or isinstance(array.base, mmap.mmap)
    return mapped and count * width * array.dtype.itemsize >= _LARGE


def ask_for(array: Array | Stack, rows: Array) -> None:
    """Ask the system to read ``rows`` (numbers ``[count]``) of an array that is mapped from files.

    The system reads many rows at a time, in the background. Without this call, each row is read when it is accessed,
    one after the other, with megabytes around it; from this call on, the array is read without these megabytes.
    """
    if isinstance(array, Stack):
        for part, _, own in array.owners(rows):
            ask_for(part, own)
    elif isinstance(array, np.memmap) and isinstance(array.base, mmap.mmap) and hasattr(os, "posix_fadvise"):
        array.base.madvise(mmap.MADV_RANDOM)
        size, start, will_need = array.strides[0], array.offset, os.POSIX_FADV_WILLNEED
        with suppress(OSError), open(str(array.filename), "rb") as file:
            for row in rows.tolist():
                os.posix_fadvise(file.fileno(), start + row * size, size, will_need)
