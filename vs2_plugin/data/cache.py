"""The on-disk cache of activations: one plain ``.npy`` per column, written once, read by memory map."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from vs2_plugin.arrays import Column
from vs2_plugin.clip.edits import reading
from vs2_plugin.clip.sites import Site
from vs2_plugin.data.images import TrainingImages
from vs2_plugin.distributed import ALONE, Processes, wait
from vs2_plugin.errors import DataError
from vs2_plugin.files import atomic_folder

__all__ = ["ActivationCache", "Encode", "Extracted", "activations_at", "extract", "require_space"]

_FACTS = "activations.json"
_DIGESTS = "digests.npy"
_LABELS = "labels.npy"
_CHUNK = 1 << 16

#: Images ``[batch, 3, height, width]`` to rows ``[batch, width]`` of each column, by its name.
Encode = Callable[[Tensor], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Extracted:
    """The extracted columns of the images of one split, in their order."""

    folder: Path
    """Where it lies: ``<column>.npy``, ``digests.npy`` and, where labels were read, ``labels.npy``."""
    columns: dict[str, np.ndarray]
    """Column name -> memory-mapped ``[count, width]``. Activations are named by their hookpoint."""
    digests: np.ndarray
    """uint64 ``[count]``: what tells an image from all others; see :func:`vs2_plugin.data.images.image_digest`."""
    labels: np.ndarray | None
    """int64 ``[count]``, if they were read."""

    def __len__(self) -> int:
        return len(self.digests)


class ActivationCache:
    """A folder of extracted activations, one sub-folder per key. A key holds all that the activations depend on."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, key: dict[str, Any]) -> Path:
        """Where the activations of ``key`` (plain JSON values) lie, or would."""
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.root / digest[:32]

    def open(self, key: dict[str, Any], widths: Mapping[str, int], labels: bool = False) -> Extracted | None:
        """The columns named in ``widths``, memory-mapped; None if they are not there, or not whole."""
        folder = self.folder(key)
        try:
            count = json.loads((folder / _FACTS).read_text())["count"]
            columns = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in widths}
            digests, classes = np.load(folder / _DIGESTS), np.load(folder / _LABELS) if labels else None
            whole = all(columns[name].shape == (count, width) for name, width in widths.items())
            whole = whole and len(digests) == count and (classes is None or len(classes) == count)
        except (OSError, ValueError, EOFError, KeyError, TypeError):  # not there, cut short, or not ours
            return None
        return Extracted(folder, columns, digests, classes) if whole else None

    def written(self, key: dict[str, Any], widths: Mapping[str, int], labels: bool = False) -> Extracted:
        """Return what :meth:`open` does of what was just written. Raises DataError if it is gone."""
        found = self.open(key, widths, labels)
        if found is None:
            raise DataError(f"{self.folder(key)}: what was just extracted is not there; run the same command again")
        return found

    @contextmanager
    def writing(
        self, key: dict[str, Any], widths: Mapping[str, int], dtype: np.dtype, labels: bool = False
    ) -> Iterator[_Writer]:
        """Open a writer for batches. All appears under the key, at once, when the block ends well."""
        with atomic_folder(self.folder(key)) as scratch, closing(_Writer(scratch, widths, dtype)) as writer:
            yield writer
            writer.close()
            np.save(scratch / _DIGESTS, np.concatenate([np.empty(0, np.uint64), *writer.digests]))
            if labels:
                np.save(scratch / _LABELS, np.concatenate([np.empty(0, np.int64), *writer.labels]))
            (scratch / _FACTS).write_text(json.dumps({"count": writer.count, "key": key}, indent=2) + "\n")

    def join(
        self,
        parts: Sequence[dict[str, Any]],
        key: dict[str, Any],
        widths: Mapping[str, int],
        dtype: np.dtype,
        labels: bool,
    ) -> None:
        """Put what lies under the keys ``parts`` under one key, in their order, and remove the parts."""
        with self.writing(key, widths, dtype, labels) as writer:
            for part in parts:
                found = self.written(part, widths, labels)
                for name, column in writer.columns.items():
                    for start in range(0, len(found), _CHUNK):
                        column.append(found.columns[name][start : start + _CHUNK])
                writer.digests.append(found.digests)
                if found.labels is not None:
                    writer.labels.append(found.labels)
            if writer.count == 0:
                raise DataError("there are no training images")
        for part in parts:
            shutil.rmtree(self.folder(part), ignore_errors=True)


class _Writer:
    """Columns under construction."""

    def __init__(self, folder: Path, widths: Mapping[str, int], dtype: np.dtype) -> None:
        self.columns = {name: Column(folder / f"{name}.npy", width, dtype) for name, width in widths.items()}
        self.digests: list[np.ndarray] = []
        self.labels: list[np.ndarray] = []

    @property
    def count(self) -> int:
        return sum(map(len, self.digests))

    def close(self) -> None:
        for column in self.columns.values():
            column.close()


def activations_at(model: nn.Module, sites: Sequence[Site], amp: bool) -> Encode:
    """The encoder for :func:`extract` that reads the activations at ``sites`` of an open_clip model."""

    encode_image: Callable[[Tensor], Tensor] = model.encode_image  # type: ignore[assignment]

    def encode(images: Tensor) -> dict[str, Tensor]:
        with torch.autocast(images.device.type, enabled=amp), reading(model, sites) as found:
            encode_image(images)
        return {site.hookpoint: found[site] for site in sites}

    return encode


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
    encode: Encode,
    widths: Mapping[str, int],
    images: TrainingImages,
    cache: ActivationCache,
    key: dict[str, Any],
    *,
    device: str | torch.device,
    batch_size: int,
    num_workers: int,
    dtype: np.dtype,
    name: str = "activations",
    quiet: bool = False,
    processes: Processes = ALONE,
) -> Extracted:
    """Run every image through ``encode`` once and store its columns, of the widths given.

    Joined ``processes`` extract a part each, on a file system that they share; the first puts the parts together.

    Raises:
        DataError: an image cannot be read, or a value does not fit ``dtype``.
    """
    if processes.world > 1:
        keys = [{**key, "part": [rank, processes.world]} for rank in range(processes.world)]
        mine, own = images.part(processes, batch_size), keys[processes.rank]
        extract(
            encode, widths, mine, cache, own, device=device, batch_size=batch_size, num_workers=num_workers,
            dtype=dtype, name=name, quiet=quiet or not processes.first,
        )  # fmt: skip
        wait()
        if processes.first:
            cache.join(keys, key, widths, dtype, images.labels)
        wait()
        return cache.written(key, widths, images.labels)
    bar = tqdm(total=images.count, desc=name, unit="img", disable=True if quiet else None)
    # What autocast has cast is kept until the outermost one ends: within this one, encode's casts the weights once.
    outermost = torch.autocast(torch.device(device).type, enabled=False)
    with outermost, cache.writing(key, widths, dtype, images.labels) as writer, bar:
        for batch in images.batches(batch_size, num_workers):
            found = encode(batch.images.to(device, non_blocking=True))
            for column, into in writer.columns.items():
                into.append(_storable(found[column].float().cpu().numpy(), dtype, column))
            writer.digests.append(batch.digests)
            if batch.labels is not None:
                writer.labels.append(batch.labels)
            bar.update(len(batch.images))
        if writer.count == 0 and "part" not in key:
            raise DataError("there are no training images")
    return cache.written(key, widths, images.labels)


def _storable(rows: np.ndarray, dtype: np.dtype, column: str) -> np.ndarray:
    """Return ``rows``, float32 ``[batch, d]``, as ``dtype``. Raises DataError for what it cannot hold."""
    if not np.isfinite(rows).all():
        raise DataError(
            f"an activation at {column} is no finite number as the model computes it, which no --cache_dtype mends; if "
            "it is computed under autocast, --no_amp computes it in float32"
        )
    with np.errstate(over="ignore"):
        stored = rows.astype(dtype)
    if not np.isfinite(stored).all():
        raise DataError(
            f"an activation at {column} is {np.abs(rows).max():.3g}, which {np.dtype(dtype).name} cannot hold; use "
            "--cache_dtype float32"
        )
    return stored
