"""Arrays on disk: columns that grow while they are written, and several read as one. And what tells tensors apart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor

__all__ = ["Array", "Column", "Stack", "digest_of", "spread", "stack"]

Array = np.ndarray[Any, np.dtype[Any]]


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names, shapes, dtypes and bytes, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def spread(count: int, limit: int) -> Tensor:
    """Return row numbers, int64: all of them, or ``limit`` evenly spread over them.

    >>> spread(3, 5).tolist(), spread(10, 4).tolist()
    ([0, 1, 2], [0, 3, 6, 9])
    """
    return torch.from_numpy(np.linspace(0, count - 1, min(count, limit)).astype(np.int64))


class Column:
    """An ``.npy`` file ``[count, width]`` that grows: numpy leaves room in the header for the final count."""

    def __init__(self, path: Path, width: int, dtype: DTypeLike) -> None:
        self.width, self.dtype, self.count = width, np.dtype(dtype), 0
        self._file = open(path, "wb+")  # noqa: SIM115  # until close
        self._write_header()

    def _write_header(self) -> None:
        shape = (self.count, self.width)
        form: Any = np.lib.format  # has no types
        header = {"descr": form.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        self._file.seek(0)
        form.write_array_header_1_0(self._file, header)

    def append(self, rows: Array) -> None:
        """Add rows ``[batch, width]``."""
        rows.astype(self.dtype, copy=False).tofile(self._file)
        self.count += len(rows)

    def close(self) -> None:
        """Write the final count."""
        if not self._file.closed:
            self._file.flush()
            self._write_header()
            self._file.close()


def stack(parts: Sequence[Array]) -> Array | Stack:
    """Return several memory-mapped arrays ``[count, width]`` as one, which stays on disk."""
    return parts[0] if len(parts) == 1 else Stack(parts)


class Stack:
    """Arrays under each other; read by a row number, a slice, or an array of row numbers."""

    def __init__(self, parts: Sequence[Array]) -> None:
        self._parts = parts
        self._starts = np.cumsum([0, *map(len, parts)])
        self.shape = (int(self._starts[-1]), int(parts[0].shape[1]))
        self.dtype = parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: int | slice | Array) -> Array:
        numbers = rows if isinstance(rows, np.ndarray) else np.arange(len(self))[rows]
        found: Array = np.empty((numbers.size, self.shape[1]), self.dtype)
        flat = np.atleast_1d(numbers)
        owner = np.searchsorted(self._starts, flat, side="right") - 1
        for index, part in enumerate(self._parts):
            mine = owner == index
            found[mine] = part[flat[mine] - self._starts[index]]
        return found if numbers.ndim else found[0]
