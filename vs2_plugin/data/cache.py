"""The on-disk cache of activations: one plain ``.npy`` per column, written once, read by memory map."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vs2_plugin.arrays import Column, check_all, trust_all, whole_rows
from vs2_plugin.data.images import Batch, TrainingImages
from vs2_plugin.devices import to_processor
from vs2_plugin.distributed import ALONE, Processes, wait
from vs2_plugin.errors import DataError
from vs2_plugin.files import alone, atomic_folder, hidden, json_digest, part_of, settle
from vs2_plugin.text import counted, gigabytes

__all__ = ["ActivationCache", "Encode", "Extracted", "Writer", "extract", "require_space"]

_FACTS = "activations.json"
_DIGESTS = "digests"
_LABELS = "labels"
_LEFT_OUT = "left_out.jsonl"
_LOG = logging.getLogger(__name__)
_CHUNK = 1 << 16

#: Function from images ``[batch, 3, height, width]`` to column name -> rows ``[batch, width]``.
Encode = Callable[[Tensor], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Extracted:
    """Columns extracted from the images of one split, one row per readable image, in the order of the images."""

    folder: Path
    """Folder of the files ``<column>.npy``, ``digests.npy`` and, where labels were read, ``labels.npy``."""
    columns: dict[str, np.ndarray]
    """Column name -> memory-mapped ``[count, width]``. A column of activations is named by its hookpoint."""
    digests: np.ndarray
    """uint64 ``[count]``: identifies each image by its content; see :func:`vs2_plugin.data.images.image_digest`."""
    labels: np.ndarray | None
    """int64 ``[count]``; None if labels were not read."""
    contents: dict[str, str]
    """Array name -> SHA-256 that covers its whole content; see :meth:`vs2_plugin.arrays.Column.complete`."""
    left_out: tuple[str, ...] = ()
    """Files that cannot be read as images and have no row."""

    def __len__(self) -> int:
        return len(self.digests)


class ActivationCache:
    """A folder of extracted activations, one sub-folder per key. A key holds all that the activations depend on."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, key: dict[str, Any]) -> Path:
        """Return the folder for the activations of ``key`` (plain JSON values), whether it exists or not."""
        return self.root / json_digest(key)[:32]

    def open(self, key: dict[str, Any], widths: Mapping[str, int], labels: bool = False) -> Extracted | None:
        """Return the columns named in ``widths``, memory-mapped; None if they are missing or damaged.

        Raises:
            DataError: the system does not permit reading them.
        """
        folder = self.folder(key)
        settle(folder)
        names = [*widths, _DIGESTS, *([_LABELS] if labels else [])]
        try:
            facts = json.loads((folder / _FACTS).read_text())
            count, contents = facts["count"], {name: str(facts["contents"][name]) for name in names}
            left_out = tuple(facts.get("left_out", ()))
        except PermissionError as error:
            raise DataError(hidden(error, folder)) from error
        except (OSError, ValueError, KeyError, TypeError):  # missing, cut short, or not written by this class
            return None
        try:
            check_all(folder, _files(contents))
            columns = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in widths}
            digests = np.load(folder / f"{_DIGESTS}.npy")
            classes = np.load(folder / f"{_LABELS}.npy") if labels else None
        except PermissionError as error:
            raise DataError(hidden(error, folder)) from error
        except (OSError, ValueError, EOFError) as error:
            _LOG.warning("damaged cached activations are extracted again: %s", error)
            return None
        whole = all(columns[name].shape == (count, width) for name, width in widths.items())
        whole = whole and len(digests) == count and (classes is None or len(classes) == count)
        return Extracted(folder, columns, digests, classes, contents, left_out) if whole else None

    def written(self, key: dict[str, Any], widths: Mapping[str, int], labels: bool = False) -> Extracted:
        """Return the columns just written under ``key``, as :meth:`open` does. Raises DataError if they are gone."""
        columns = self.open(key, widths, labels)
        if columns is None:
            raise DataError(f"{self.folder(key)}: what was just extracted is missing; run the same command again")
        return columns

    @contextmanager
    def alone(self, key: dict[str, Any], name: str = "activations") -> Iterator[bool]:
        """Keep other processes from extracting ``key``; yield whether one had to be waited for. See
        :func:`vs2_plugin.files.alone`."""

        def waiting() -> None:
            _LOG.info("another process is extracting the same %s: waiting for it", name)

        with alone(self.folder(key), -1, waiting) as waited:
            yield waited

    @contextmanager
    def writing(
        self, key: dict[str, Any], widths: Mapping[str, int], dtype: np.dtype, labels: bool, fresh: bool = False
    ) -> Iterator[Writer]:
        """Open a writer that continues after the rows of an interrupted extraction, unless ``fresh``. All files appear
        under the key at once, when the block ends without an error. The caller must hold :meth:`alone`."""
        if fresh:
            shutil.rmtree(part_of(self.folder(key)), ignore_errors=True)
        kinds: dict[str, tuple[int | None, np.dtype]] = {name: (width, dtype) for name, width in widths.items()}
        kinds[_DIGESTS] = None, np.dtype(np.uint64)
        if labels:
            kinds[_LABELS] = None, np.dtype(np.int64)

        def rows(scratch: Path) -> int:
            return min(whole_rows(scratch / f"{name}.npy", *kind) for name, kind in kinds.items())

        with atomic_folder(self.folder(key), keep=lambda scratch: rows(scratch) > 0) as scratch:
            with closing(Writer(scratch, kinds, rows(scratch))) as writer:
                yield writer
                contents = {name: column.complete() for name, column in writer.columns.items()}
            facts: dict[str, Any] = {"count": writer.count, "contents": contents, "key": key}
            if writer.left_out:
                facts["left_out"] = [path for _, path in sorted(writer.left_out.items())]
            (scratch / _FACTS).write_text(json.dumps(facts, indent=2) + "\n")
            trust_all(scratch, _files(contents))  # their digests were computed while they were written

    def joined(
        self, processes: Processes, parts: Sequence[dict[str, Any]], key: dict[str, Any], widths: Mapping[str, int],
        dtype: np.dtype, labels: bool,
    ) -> Extracted:  # fmt: skip
        """Return the columns that ``processes`` extracted under the keys ``parts``, once the first process has joined
        these under ``key``."""
        wait()
        if processes.first:
            with self.alone(key), self.writing(key, widths, dtype, labels, fresh=True) as writer:  # joining is quick
                for part in parts:
                    self._add(part, writer, widths, labels)
                if writer.count == 0:
                    raise DataError("there are no training images")
            for part in parts:
                shutil.rmtree(self.folder(part), ignore_errors=True)
        wait()
        return self.written(key, widths, labels)

    def _add(self, part: dict[str, Any], writer: Writer, widths: Mapping[str, int], labels: bool) -> None:
        """Append the columns stored under the key ``part`` to ``writer``."""
        stored = self.open(part, widths, labels)
        if stored is None:
            raise DataError(
                f"{self.folder(part)}: what another process extracted is missing; start all of them with the same "
                "--store, a folder that their machines share"
            )
        for start in range(0, len(stored), _CHUNK):
            rows = slice(start, start + _CHUNK)
            columns = {name: column[rows] for name, column in stored.columns.items()}
            writer.append(columns, stored.digests[rows], None if stored.labels is None else stored.labels[rows])
        writer.left_out |= dict(enumerate(stored.left_out, len(writer.left_out)))


def _files(contents: Mapping[str, str]) -> dict[str, str]:
    """Return file name -> digest, from array name -> digest."""
    return {f"{name}.npy": digest for name, digest in contents.items()}


class Writer:
    """Columns under construction, and a record of the images left out of them."""

    def __init__(self, folder: Path, kinds: Mapping[str, tuple[int | None, np.dtype]], rows: int) -> None:
        #: Column name -> column.
        self.columns = {
            name: Column(folder / f"{name}.npy", width, dtype, rows) for name, (width, dtype) in kinds.items()
        }
        #: Image number -> file, for images that cannot be read and so have no row.
        self.left_out: dict[int, str] = {}
        self._left_out = folder / _LEFT_OUT
        if rows:
            with suppress(OSError, ValueError):  # the file is missing, or its last line was cut short
                for line in self._left_out.read_text().splitlines():
                    number, path = json.loads(line)
                    self.left_out[number] = path
        else:
            self._left_out.unlink(missing_ok=True)

    def start(self, batch_size: int) -> int:
        """Return the number of the image to continue with: the first one of the first batch with a missing row."""
        read = self.count
        for number in sorted(self.left_out):
            read += number < read
        first = read // batch_size * batch_size
        if self.left_out:
            self.left_out = {number: path for number, path in self.left_out.items() if number < first}
            self._left_out.write_text("".join(map(_line, self.left_out.items())))
        return first

    def leave_out(self, first: int, batch: Batch) -> None:
        """Record which images of a batch have no row, before its rows are written; ``first`` is the number of its first
        image."""
        for place, (path, problem) in batch.left_out:
            _LOG.warning("left out: %s", problem)
            self.left_out[first + place] = path
            with open(self._left_out, "a") as file:
                file.write(_line((first + place, path)))
                file.flush()
                os.fsync(file.fileno())

    @property
    def count(self) -> int:
        """Number of images that have been written."""
        return self.columns[_DIGESTS].count

    def append(self, rows: Mapping[str, np.ndarray], digests: np.ndarray, labels: np.ndarray | None) -> None:
        """Add images: rows ``[batch, width]`` of each column, digests and, where they are read, labels ``[batch]``."""
        for name, values in {**rows, _DIGESTS: digests, **({} if labels is None else {_LABELS: labels})}.items():
            self.columns[name].append(values)

    def close(self) -> None:
        """Close the files."""
        for column in self.columns.values():
            column.close()


def _line(left_out: tuple[int, str]) -> str:
    return json.dumps(left_out) + "\n"


def require_space(folder: Path, needed: int, what: str = "the activations") -> int:
    """Return the free bytes on the disk of ``folder``, which may not exist yet. Raises DataError below ``needed``."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise DataError(
            f"{what} need {gigabytes(needed)} but {existing} has {gigabytes(free)} free; free some space, name another "
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
    fresh: bool = False,
    processes: Processes = ALONE,
) -> Extracted:
    """Encode every image once, store the columns named in ``widths`` (name -> width) under ``key``, and return them.

    Unless ``fresh``, extraction continues where an interrupted run with the same key stopped: at the batch of the first
    missing row. So every row is computed in the same batch as without an interruption, and has the same bits.

    Several ``processes`` extract one part each, on a file system that they share; the first one joins the parts.

    Raises:
        DataError: an image cannot be read, or a value does not fit ``dtype``.
    """
    labels = images.labels
    if processes.world > 1:
        keys = [{**key, "part": [rank, processes.world]} for rank in range(processes.world)]
        mine, own = images.part(processes, batch_size), keys[processes.rank]
        if fresh or cache.open(own, widths, labels) is None:  # else an interrupted run has finished this part
            extract(
                encode, widths, mine, cache, own, device=device, batch_size=batch_size, num_workers=num_workers,
                dtype=dtype, name=name, quiet=quiet or not processes.first, fresh=fresh,
            )  # fmt: skip
        return cache.joined(processes, keys, key, widths, dtype, labels)
    # Autocast keeps the weights it has cast until the outermost context ends: in this one, each weight is cast once.
    outermost = torch.autocast(torch.device(device).type, enabled=False)
    with cache.alone(key, name) as waited, outermost:
        cached = cache.open(key, widths, labels) if waited and not fresh else None
        if cached is not None:
            return cached
        with cache.writing(key, widths, dtype, labels, fresh) as writer:
            first = writer.start(batch_size)
            if writer.count:
                _LOG.info("%s of %s are already there from an interrupted run", name, counted(writer.count, "image"))
            bar = tqdm(total=images.count, initial=first, desc=name, unit="img", disable=True if quiet else None)
            with bar:
                batches = images.batches(batch_size, num_workers, first)
                for size in _fill(writer, widths, batches, first, encode, device, dtype):
                    bar.update(size)
            if writer.count == 0 and "part" not in key:
                raise DataError("there are no training images")
    return cache.written(key, widths, labels)


def _fill(
    writer: Writer, names: Iterable[str], batches: Iterable[Batch], first: int, encode: Encode,
    device: str | torch.device, dtype: np.dtype,
) -> Iterator[int]:  # fmt: skip
    """Encode batches, beginning with image number ``first``, and write the columns ``names`` of each batch while the
    next one is encoded. Yield the size of each batch."""
    with ThreadPoolExecutor(1) as other:
        written: Future[None] | None = None
        for batch in batches:
            rows = encode(batch.images.to(device, non_blocking=True)) if len(batch.images) else {}
            waiting = {name: to_processor(rows[name].float()) for name in names if rows}
            if written is not None:
                written.result()
            written = other.submit(_append, writer, waiting, dtype, batch, first)
            first += batch.size
            yield batch.size
        if written is not None:
            written.result()


def _append(
    writer: Writer, waiting: Mapping[str, Callable[[], Tensor]], dtype: np.dtype, batch: Batch, first: int
) -> None:
    """Write the rows of a batch, whose first image has the number ``first``, except rows that are already written."""
    writer.leave_out(first, batch)
    columns = {name: _storable(rows().numpy(), dtype, name) for name, rows in waiting.items()}
    if not columns:
        return
    unwritten = slice(writer.count - first + sum(number < first for number in writer.left_out), None)
    labels = None if batch.labels is None else batch.labels[unwritten]
    writer.append({name: rows[unwritten] for name, rows in columns.items()}, batch.digests[unwritten], labels)


def _storable(rows: np.ndarray, dtype: np.dtype, column: str) -> np.ndarray:
    """Return ``rows``, float32 ``[batch, d]``, as ``dtype``. Raises DataError for values that ``dtype`` cannot hold."""
    if not np.isfinite(rows).all():
        raise DataError(
            f"an activation at {column} is not a finite number as the model computes it, which no --cache_dtype can "
            "fix; if it is computed under autocast, --no_amp computes it in float32"
        )
    with np.errstate(over="ignore"):
        stored = rows.astype(dtype)
    if not np.isfinite(stored).all():
        raise DataError(
            f"an activation at {column} is {np.abs(rows).max():.3g}, which {np.dtype(dtype).name} cannot hold; use "
            "--cache_dtype float32"
        )
    return stored
