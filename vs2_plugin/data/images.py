"""Batches of training images of any data set, without their labels."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, default_collate

from vs2_plugin.data.folders import FolderImages, LeftOut, open_folder
from vs2_plugin.data.labels import UNKNOWN, Classes
from vs2_plugin.data.loading import leave_interruptions, read
from vs2_plugin.data.naming import DataSet
from vs2_plugin.data.shards import LocalShards, open_shards
from vs2_plugin.distributed import Processes
from vs2_plugin.errors import DataError, Vs2Error
from vs2_plugin.host import build, default_task
from vs2_plugin.text import one_line, reason_of, said_by

__all__ = ["SUBSET", "Batch", "TrainingImages", "image_digest", "open_images", "place_of", "subset"]

#: The seed of the random subset of ``max_images``, whatever the seed of a training.
SUBSET = 0


class Batch(NamedTuple):
    """One batch of images."""

    images: Tensor
    """``[batch, 3, height, width]``, preprocessed."""
    digests: np.ndarray
    """uint64 ``[batch]``; see :func:`image_digest`."""
    labels: np.ndarray | None
    """int64 ``[batch]``; None if labels are not read."""
    left_out: tuple[tuple[int, LeftOut], ...] = ()
    """Unreadable images, which have no row above, each with its position in the batch as it was requested."""

    @property
    def size(self) -> int:
        """Number of images that were requested for the batch, with those left out."""
        return len(self.images) + len(self.left_out)


def image_digest(image: Tensor) -> int:
    """Return 64 bits of the SHA-256 over the bytes of a preprocessed image. The harness keeps neither names nor order:
    only the content tells whether two images are the same."""
    data = image.detach().to("cpu", torch.float32).contiguous().numpy()
    return int.from_bytes(hashlib.sha256(data.data).digest()[:8], "little")


@dataclass
class TrainingImages:
    """The images of one split, preprocessed for one tower."""

    source: Dataset[Any]
    """Items are images, or tuples of an image and more (a label, captions)."""
    limit: int | None
    """Largest number of images to read from a stream; None: all of them."""
    fingerprint: Any
    """Plain JSON values that change when the images do."""
    labels: bool = False
    classes: Classes = UNKNOWN
    """Classes that the labels number."""
    folder: str = ""
    """Absolute path of the folder that holds these images and no other split, or the list of their shards; empty for
    data sets that are found by name."""
    about: str = ""
    """Description of a folder in words; see :attr:`vs2_plugin.data.folders.FolderImages.about`."""

    @property
    def count(self) -> int | None:
        """Number of images that will be read; None for a stream of unknown length. Local shards are indexed for it."""
        total = _length(self.source)
        return total if self.limit is None or total is None else min(total, self.limit)

    def part(self, processes: Processes, batch_size: int) -> TrainingImages:
        """Return this process's images: a contiguous block of whole batches, or of whole shards of a stream.

        Raises:
            DataError: the images are a stream that cannot be shared.
        """
        if processes.world == 1:
            return self
        if not isinstance(self.source, IterableDataset):
            block = processes.block(_length(self.source) or 0, batch_size)
            return replace(self, source=Subset(self.source, block))
        if not hasattr(self.source, "part") or self.limit is not None:
            what = "--max_images of a stream" if self.limit is not None else f"a {type(self.source).__name__}"
            raise DataError(
                f"{what} cannot be shared among {processes.world} processes; run it in one, without torchrun"
            )
        return replace(self, source=self.source.part(processes))

    def batches(self, batch_size: int, num_workers: int, first: int = 0) -> Iterator[Batch]:
        """Yield all images from number ``first`` on, each once, in a fixed order.

        Raises:
            DataError: an image cannot be read.
        """
        streamed = isinstance(self.source, IterableDataset)
        # Each worker would repeat a stream. Other images are counted, and so shards are indexed, before workers start.
        most = 1 if streamed else self.count or 0
        loader = DataLoader(
            _stretch(self.source, first, self.limit),
            batch_size=batch_size,
            num_workers=min(num_workers, most),
            collate_fn=partial(_batch, self.classes if self.labels else None),
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=leave_interruptions,
        )
        done = first
        try:
            for batch in read(loader):
                yield batch
                done += batch_size
        except Vs2Error as error:
            raise DataError(said_by(error)) from error
        except Exception as error:  # whatever a data set's own code, PIL or a download raises
            raise DataError(
                f"cannot read the training images: {type(error).__name__}: {one_line(said_by(error), 500)} (in one of "
                f"those from number {done} to {done + batch_size - 1}, counted from 0)"
            ) from error


class _Stretch(IterableDataset[Any]):
    """The items of a stream from number ``first`` up to number ``stop``, or to its end if that is None."""

    def __init__(self, source: IterableDataset[Any], first: int, stop: int | None) -> None:
        self._source, self._first, self._stop = source, first, stop

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self._source), self._first, self._stop)


def _stretch(source: Dataset[Any], first: int, stop: int | None) -> Dataset[Any]:
    """Return a data set without its ``first`` first items, and a stream without those from number ``stop`` on."""
    if isinstance(source, IterableDataset):
        return _Stretch(source, first, stop)
    return Subset(source, range(first, _length(source) or 0)) if first else source


def _length(source: Dataset[Any]) -> int | None:
    """Return the number of items; None for a stream of unknown length."""
    try:
        return len(source)  # type: ignore[arg-type]  # most have a length
    except TypeError:
        return None


def _stack_images(samples: list[Any]) -> Tensor:
    # A label or captions after the image are dropped unread. In a worker, default_collate stacks the images into memory
    # that the processes share.
    images: Tensor = default_collate([sample[0] if isinstance(sample, (tuple, list)) else sample for sample in samples])
    return images


# The loader's workers call this, so digests and labels are computed in parallel.
def _batch(classes: Classes | None, samples: list[Any]) -> Batch:
    """Return a batch of ``samples``, with labels if ``classes`` are given."""
    left_out = tuple(
        (place, sample[0])
        for place, sample in enumerate(samples)
        if isinstance(sample, tuple) and isinstance(sample[0], LeftOut)
    )
    places = {place for place, _ in left_out}
    readable = [sample for place, sample in enumerate(samples) if place not in places]
    labels = None if classes is None else _labels(classes, readable)
    images = _stack_images(readable) if readable else torch.empty(0, 3, 0, 0)
    return Batch(images, np.array([image_digest(image) for image in images], dtype=np.uint64), labels, left_out)


def _labels(classes: Classes, samples: list[Any]) -> np.ndarray:
    labels: list[Any] = [
        sample[1] if isinstance(sample, (tuple, list)) and len(sample) > 1 else None for sample in samples
    ]
    for label in labels:
        if not _is_whole(label):
            raise DataError(
                f"labels are needed, but this data set gives {one_line(repr(label), 80)}; expected one class number "
                "per image"
            )
    return np.array([classes.check(int(label), "an image of the data set") for label in labels], dtype=np.int64)


def _is_whole(label: Any) -> bool:
    if isinstance(label, Tensor) and label.ndim == 0 and not label.is_complex():
        return float(label).is_integer()
    return isinstance(label, (int, np.integer))


def open_images(
    dataset: DataSet,
    split: str,
    transform: Callable[[Any], Any],
    *,
    max_images: int | None = None,
    wds_cache_dir: str | None = None,
    labels: bool = False,
) -> TrainingImages:
    """Open a split of a data set, downloading it where clip_benchmark can.

    Args:
        dataset: the data set.
        split: the split's name.
        transform: the tower's preprocessing.
        max_images: read at most this many: a random subset, the same each time, or the first ones of a stream.
        labels: read the labels too; otherwise labels are ignored.

    Raises:
        DataError: the data set, its split or its files are missing. Labels are checked when they are read.
    """
    name, root = dataset.name, dataset.root
    source: Dataset[Any]
    classes = UNKNOWN
    if dataset.is_folder:
        source = open_folder(root, split, transform)
        source.lenient = True
        if labels:
            source.require_labels()
            classes = Classes(len(source.classes), name)
    elif dataset.is_shards:
        source = open_shards(root, split, transform, wds_cache_dir, labels)
    else:
        remedy = "without a network, put the data there by hand"
        source = build(dataset, split, remedy=remedy, transform=transform, task=default_task(name))
        names = getattr(source, "classes", None)
        classes = Classes(len(names), name) if names else classes
    folder, about = place_of(dataset, source), getattr(source, "about", "")
    if isinstance(source, LocalShards) and max_images is None:  # left unindexed until an image is requested
        return TrainingImages(source, None, source.fingerprint(), labels, classes, folder)
    total = _length(source)
    if total == 0:
        raise DataError(f"the split {split!r} of {name} in {root} is empty")
    fingerprint: Any = source.fingerprint() if hasattr(source, "fingerprint") else _probe(source)
    source, fingerprint = subset(source, fingerprint, max_images)
    return TrainingImages(source, max_images, [fingerprint, total], labels, classes, folder, about)


def place_of(dataset: DataSet, source: object) -> str:
    """Return the value of :attr:`TrainingImages.folder` for the images ``source`` of a data set."""
    if isinstance(source, FolderImages):
        return source.folder
    listed = dataset.root if dataset.is_listed else ""
    return os.path.abspath(listed) if listed and "://" not in listed else listed


def subset(source: Dataset[Any], fingerprint: Any, max_images: int | None) -> tuple[Dataset[Any], Any]:
    """Return at most ``max_images`` random images of a data set, and the fingerprint of the choice. A stream is
    returned whole.

    The choice does not depend on the seed of a training: SAEs of several seeds are trained on the same images.
    """
    total = _length(source)
    # Some streams know their length, and none can be indexed.
    if isinstance(source, IterableDataset) or max_images is None or total is None or max_images >= total:
        return source, fingerprint
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(SUBSET))[:max_images].sort().values
    return Subset(source, chosen.tolist()), [fingerprint, total, max_images, SUBSET]


def _probe(source: Dataset[Any]) -> list[str]:
    """Return a fingerprint of a data set whose files are unknown: its type, and a digest of up to 8 of its images."""
    if isinstance(source, IterableDataset):
        return [type(source).__name__]
    digest = hashlib.sha256()
    try:
        for index in torch.linspace(0, (_length(source) or 0) - 1, 8).long().tolist():
            sample = source[index]
            image = np.asarray(sample[0] if isinstance(sample, (tuple, list)) else sample)
            digest.update(f"{image.dtype}{image.shape}".encode() + image.tobytes())
    except Vs2Error:
        raise
    except Exception as error:
        raise DataError(f"cannot read the training images: {reason_of(error)}") from error
    return [type(source).__name__, digest.hexdigest()]
