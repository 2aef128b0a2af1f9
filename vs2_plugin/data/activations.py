"""The on-disk cache of activations: one plain ``.npy`` per site, written once, read by memory map."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from vs2_plugin.clip.sites import Site, reading
from vs2_plugin.data.images import TrainingImages
from vs2_plugin.errors import DataError

__all__ = ["ActivationCache", "extract", "require_space", "stack"]

_FACTS = "activations.json"
_LABELS = "labels.npy"


class ActivationCache:
    """A folder of extracted activations, one sub-folder per key. A key holds all that the activations depend on."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, key: dict[str, Any]) -> Path:
        """Where the activations of ``key`` (plain JSON values) lie, or would."""
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.root / digest[:32]

    def open(self, key: dict[str, Any], sites: Sequence[Site]) -> dict[Site, np.ndarray] | None:
        """The memory-mapped activations ``[count, d]`` per site; None if they are not there, or not whole."""
        folder = self.folder(key)
        try:
            facts = json.loads((folder / _FACTS).read_text())
            found = {site: np.load(folder / f"{site.hookpoint}.npy", mmap_mode="r") for site in sites}
            whole = all(array.shape == (facts["count"], site.width) for site, array in found.items())
        except (OSError, ValueError, EOFError, KeyError, TypeError):  # not there, cut short, or not ours
            return None
        return found if whole else None

    def labels(self, key: dict[str, Any]) -> np.ndarray:
        """The labels ``[count]`` (int64) of activations that were extracted with theirs."""
        return np.load(self.folder(key) / _LABELS)

    @contextmanager
    def writing(
        self, key: dict[str, Any], sites: Sequence[Site], dtype: np.dtype
    ) -> Iterator[tuple[dict[Site, _Column], list[np.ndarray]]]:
        """Columns to append to, one per site, and a list for the labels of each batch, if any. They appear under the
        key, all at once, when the block ends well."""
        folder = self.folder(key)
        self.root.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=self.root))
        columns = {site: _Column(scratch / f"{site.hookpoint}.npy", site.width, dtype) for site in sites}
        labels: list[np.ndarray] = []
        try:
            yield columns, labels
            for column in columns.values():
                column.close()
            if labels:
                np.save(scratch / _LABELS, np.concatenate(labels))
            count = next(iter(columns.values())).count
            (scratch / _FACTS).write_text(json.dumps({"count": count, "key": key}, indent=2) + "\n")
            scratch.chmod(0o755)  # mkdtemp's 0700 would hide it from colleagues who share the store
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(scratch, folder)
        finally:
            for column in columns.values():
                column.close()
            shutil.rmtree(scratch, ignore_errors=True)


class _Column:
    """An ``.npy`` file that grows: numpy leaves room in the header for the final count."""

    def __init__(self, path: Path, width: int, dtype: np.dtype) -> None:
        self.width, self.dtype, self.count = width, np.dtype(dtype), 0
        self._file = open(path, "wb+")
        self._write_header()

    def _write_header(self) -> None:
        shape = (self.count, self.width)
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        self._file.seek(0)
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, rows: np.ndarray) -> None:
        """Add rows ``[batch, d]``."""
        rows.astype(self.dtype, copy=False).tofile(self._file)
        self.count += len(rows)

    def close(self) -> None:
        """Write the final count."""
        if not self._file.closed:
            self._file.flush()
            self._write_header()
            self._file.close()


def stack(parts: Sequence[np.ndarray]) -> np.ndarray | _Stack:
    """Several memory-mapped arrays ``[count, d]`` as one, which stays on disk."""
    return parts[0] if len(parts) == 1 else _Stack(parts)


class _Stack:
    """Arrays under each other; read by a row number, a slice, or an array of row numbers."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self._parts = parts
        self._starts = np.cumsum([0, *map(len, parts)])
        self.shape = (int(self._starts[-1]), parts[0].shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: int | slice | np.ndarray) -> np.ndarray:
        numbers = rows if isinstance(rows, np.ndarray) else np.arange(len(self))[rows]
        found = np.empty((numbers.size, self.shape[1]), self._parts[0].dtype)
        flat = np.atleast_1d(numbers)
        owner = np.searchsorted(self._starts, flat, side="right") - 1
        for index, part in enumerate(self._parts):
            mine = owner == index
            found[mine] = part[flat[mine] - self._starts[index]]
        return found if numbers.ndim else found[0]


def require_space(folder: Path, needed: int) -> int:
    """The free bytes where ``folder`` is, or will be. Raises DataError if they are fewer than ``needed``."""
    there = folder
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if needed > free:
        raise DataError(
            f"the activations need {needed / 1e9:.2f} GB and {there} has {free / 1e9:.2f} GB free; free "
            "some, name another "
            "disk with --store, or take fewer images with --max_images"
        )
    return free


@torch.no_grad()
def extract(
    model: nn.Module,
    images: TrainingImages,
    sites: Sequence[Site],
    cache: ActivationCache,
    key: dict[str, Any],
    *,
    batch_size: int,
    num_workers: int,
    amp: bool,
    dtype: np.dtype,
    quiet: bool = False,
) -> dict[Site, np.ndarray]:
    """Run every image through the tower once and store the activations at ``sites``.

    Returns:
        The memory-mapped activations ``[count, d]`` per site.

    Raises:
        DataError: an image cannot be read, or an activation does not fit ``dtype``.
    """
    device = next(model.parameters()).device
    bar = tqdm(total=images.count, desc="activations", unit="img", disable=True if quiet else None)
    with cache.writing(key, sites, dtype) as (columns, all_labels), reading(model, sites) as found, bar:
        for batch, labels in images.batches(batch_size, num_workers):
            with torch.autocast(device.type, enabled=amp):
                model.encode_image(batch.to(device, non_blocking=True))
            for site, column in columns.items():
                rows = found[site].float().cpu().numpy()
                with np.errstate(over="ignore"):
                    stored = rows.astype(dtype)
                if not np.isfinite(stored).all():
                    raise DataError(
                        f"an activation at {site} is {np.abs(rows).max():.3g}, which "
                        f"{np.dtype(dtype).name} cannot hold; "
                        "use --cache_dtype float32"
                    )
                column.append(stored)
            if labels is not None:
                all_labels.append(labels.numpy())
            bar.update(len(batch))
        if next(iter(columns.values())).count == 0:
            raise DataError("there are no training images")
    return cache.open(key, sites)
