"""Images out of webdataset shards, in clip_benchmark's layout ``DIR/SPLIT/{nshards.txt,0.tar,1.tar,…}``.

Only the images are read, unless labels are asked for: shards without labels (no ``.cls``) are as good as any. Local
shards are indexed by their tar headers and read by position, so that the number of images is known, a subset is a
random one, and there may be fewer shards than loader workers. That takes seconds per 100,000 images, and is put off
until an image is wanted: with the activations cached, none is.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from vs2_plugin.distributed import Processes
from vs2_plugin.errors import DataError

__all__ = ["EXTENSIONS", "LocalShards", "RemoteShards", "open_shards"]

#: In the order in which clip_benchmark prefers them, should a sample hold several.
EXTENSIONS = ("webp", "png", "jpg", "jpeg")
#: Turns a PIL image into ``[3, height, width]``.
Transform = Callable[[Any], Any]


def open_shards(
    root: str, split: str, transform: Transform, cache_dir: str | None = None, labels: bool = False
) -> LocalShards | RemoteShards:
    """The images of a split, local or remote, or pairs of image and label. Remote shards are kept in ``cache_dir``.

    Raises:
        DataError: no such split, or a shard that cannot be read.
    """
    if "://" in root:
        return RemoteShards(root, split, transform, cache_dir, labels)
    folder = Path(root) / split
    listing = folder / "nshards.txt"
    try:
        count = int(listing.read_text())
    except OSError as error:
        raise DataError(
            f"no readable file {listing} ({error.strerror}); expected webdataset shards there: "
            f"{listing.name} holding their "
            "number, and 0.tar, 1.tar, ..."
        ) from None
    except ValueError:
        raise DataError(f"{listing} does not hold the number of shards") from None
    return LocalShards([folder / f"{index}.tar" for index in range(count)], transform, labels)


class LocalShards(Dataset[Any]):
    """Images at known positions of local tar files; an item is a preprocessed image, or a pair of it and its label."""

    def __init__(self, files: list[Path], transform: Transform, labels: bool = False) -> None:
        self.files, self.transform, self.labels = files, transform, labels

    @cached_property
    def samples(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Number of the file, offset and size of each image, int64 ``[count, 3]``; and where they are read, the labels,
        int64 ``[count]``. Arrays: objects would take hundreds of bytes per image, again in every loader process.

        Raises:
            DataError: a shard cannot be read, a label is missing, or there are no images.
        """
        positions, labels = [], []
        for number, file in enumerate(self.files):
            images, classes = self._index(file)
            positions.append(np.array([(number, *place) for place in images.values()], np.int64).reshape(-1, 3))
            if self.labels:
                labels.append(np.array([self._label(file, key, classes) for key in images], np.int64))
        if not sum(map(len, positions)):
            beside = self.files[0] if self.files else "?"
            raise DataError(f"no images ({', '.join(EXTENSIONS)}) in the {len(self.files)} shards beside {beside}")
        return np.concatenate(positions), np.concatenate(labels) if self.labels else None

    @staticmethod
    def _index(file: Path) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, int]]]:
        """Sample key -> offset and size of its image, and -> those of its label."""
        best: dict[str, tuple[int, tuple[int, int]]] = {}
        classes: dict[str, tuple[int, int]] = {}
        try:
            with tarfile.open(file, "r:") as tar:  # uncompressed, since images are read by their position
                for member in _members(tar):
                    folder, slash, name = member.name.rpartition("/")
                    stem, _, extension = name.partition(".")
                    key = folder + slash + stem
                    if extension.lower() == "cls":
                        classes[key] = (member.offset_data, member.size)
                    if not member.isfile() or extension.lower() not in EXTENSIONS:
                        continue
                    rank = EXTENSIONS.index(extension.lower())
                    if key not in best or rank < best[key][0]:
                        best[key] = (rank, (member.offset_data, member.size))
                end = tar.offset
            # Python takes a damaged header for the end of the archive; the real end is zeros, or nothing.
            with open(file, "rb") as raw:
                raw.seek(end)
                if raw.read(tarfile.BLOCKSIZE).strip(b"\0"):
                    raise DataError(f"shard {file} is damaged at byte {end}")
        except (OSError, EOFError, tarfile.TarError) as error:
            raise DataError(f"cannot read shard {file} (expected an uncompressed tar file): {error}") from error
        return {key: place for key, (_, place) in best.items()}, classes

    @staticmethod
    def _label(file: Path, key: str, classes: dict[str, tuple[int, int]]) -> int:
        if key not in classes:
            raise DataError(f"{file}: the image {key!r} has no label ({key}.cls), and labels were asked for")
        offset, size = classes[key]
        with open(file, "rb") as raw:
            raw.seek(offset)
            text = raw.read(size)
        try:
            return int(text)
        except ValueError:
            raise DataError(f"{file}: {key}.cls holds {text[:20]!r}; expected the number of a class") from None

    def __len__(self) -> int:
        return len(self.samples[0])

    def __getitem__(self, index: int) -> Any:
        positions, labels = self.samples
        number, offset, size = positions[index].tolist()
        with open(self.files[number], "rb") as file:
            file.seek(offset)
            data = file.read(size)
        try:
            image = Image.open(io.BytesIO(data)).convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:  # all three come from PIL
            with tarfile.open(self.files[number], "r:") as tar:
                name = next(member.name for member in _members(tar) if member.offset_data == offset)
            raise DataError(f"{self.files[number]}: {name} is not a readable image") from error
        prepared = self.transform(image)
        return prepared if labels is None else (prepared, int(labels[index]))

    def fingerprint(self) -> list[list[Any]]:
        """Return what changes when the shards do: names, sizes and times. Raises DataError if one is not there."""
        try:
            return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in self.files]
        except OSError as error:
            raise DataError(f"cannot read shard {error.filename}: {error.strerror}") from error


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Iterate over a tar file without keeping its members: an open one remembers a kilobyte for each."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # which the stubs leave out
        yield member


class RemoteShards(IterableDataset[Any]):
    """A stream of preprocessed images, or pairs of image and label, out of shards behind a URL."""

    def __init__(
        self, root: str, split: str, transform: Transform, cache_dir: str | None = None, labels: bool = False
    ) -> None:
        import requests

        metadata = data = root.rstrip("/")
        if root.startswith("https://huggingface.co/datasets"):
            # A folder of a data set's page, …/tree/BRANCH: small files under raw, large ones under resolve.
            *head, _, path = root.split("/", 7)
            metadata, data = "/".join([*head, "raw", path]), "/".join([*head, "resolve", path])
        listing = f"{metadata}/{split}/nshards.txt"
        try:
            answer = requests.get(listing, timeout=30)
            answer.raise_for_status()
            count = int(answer.text)
        except (requests.RequestException, ValueError) as error:
            raise DataError(f"cannot read {listing} (the number of shards): {error}") from error
        self.urls = [f"{data}/{split}/{index}.tar" for index in range(count)]
        self.transform, self.cache_dir, self.labels = transform, cache_dir, labels

    def part(self, processes: Processes) -> RemoteShards:
        """The shards of one of several processes: each shard is one's, and blocks of them follow each other."""
        mine = copy(self)
        mine.urls = [self.urls[index] for index in processes.block(len(self.urls))]
        return mine

    def __iter__(self) -> Iterator[Any]:
        if not self.urls:  # more processes than shards
            return
        import webdataset as wds

        pipeline = (
            wds.WebDataset(self.urls, shardshuffle=False, nodesplitter=lambda urls: urls, cache_dir=self.cache_dir)
            .decode(wds.autodecode.ImageHandler("pil", extensions=list(EXTENSIONS)), only=list(EXTENSIONS))
            .to_tuple(list(EXTENSIONS), *(["cls"] if self.labels else []))
        )
        for image, *label in pipeline:
            yield (self.transform(image), int(label[0])) if self.labels else self.transform(image)

    def fingerprint(self) -> list[str]:
        """Return the addresses: what lies behind them cannot be told apart without reading it."""
        return self.urls
