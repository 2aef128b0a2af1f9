"""Images from webdataset shards, in clip_benchmark's layout ``DIR/SPLIT/{nshards.txt,0.tar,1.tar,…}``, or listed
one by one or with braces, ``DIR/train-{0000..0099}.tar``.

Only the images are read, unless labels are asked for, so shards need not hold labels (``.cls``). Local shards are
indexed by their tar headers and read by position: so the number of images is known, a subset can be random, and there
may be fewer shards than loader workers. Indexing takes seconds per 100,000 images and is put off until an image is
requested, which does not happen if the activations are cached.
"""

from __future__ import annotations

import io
import logging
import os
import shlex
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from functools import cached_property
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from vs2_plugin.data.labels import CLASS_NAMES, LONGEST_LABEL, UNKNOWN, Classes, read_label
from vs2_plugin.distributed import Processes
from vs2_plugin.errors import DataError
from vs2_plugin.text import expanded, one_line

__all__ = ["EXTENSIONS", "LocalShards", "RemoteShards", "open_shards"]

_LOG = logging.getLogger(__name__)

#: Extensions of images, in clip_benchmark's order of preference for a sample with several images.
EXTENSIONS = ("webp", "png", "jpg", "jpeg")
#: Function from a PIL image to a tensor ``[3, height, width]``.
Transform = Callable[[Any], Any]
#: Where a file lies in a shard: offset and size.
Place = tuple[int, int]
#: More shards than any data set has.
_MOST_SHARDS = 1_000_000
LISTING = "nshards.txt"


def open_shards(
    root: str, split: str, transform: Transform, cache_dir: str | None = None, labels: bool = False
) -> LocalShards | RemoteShards:
    """Open a split, or listed shards, local or remote: images, or pairs of image and label if ``labels``. Remote shards
    are cached in ``cache_dir``.

    Raises:
        DataError: the split is missing, or a shard cannot be read.
    """
    if "://" in root:
        return RemoteShards(root, split, transform, cache_dir, labels)
    return LocalShards(local_shards(root, split), transform, Classes.in_folder(beside(root)) if labels else None)


def beside(root: str) -> Path:
    """Return the folder with the small files of a local data set, which lie beside listed shards or above them."""
    folder = Path(root)
    if not root.endswith(".tar"):
        return folder
    return folder.parent if (folder.parent / CLASS_NAMES).exists() else folder.parent.parent


def listed_shards(root: str) -> list[str]:
    """Return the shards that a list with braces names, in the order of the list.

    >>> listed_shards("shards/train-{0008..0010}.tar")
    ['shards/train-0008.tar', 'shards/train-0009.tar', 'shards/train-0010.tar']
    """
    shards = list(islice(expanded(root), _MOST_SHARDS + 1))
    if not 1 <= len(shards) <= _MOST_SHARDS:
        raise DataError(f"{root!r} lists no shards, or over {_MOST_SHARDS:,}; expected a list such as "
                        f"x-{{0000..0099}}.tar")
    return shards


def local_shards(root: str, split: str) -> list[Path]:
    """Return the shards of a split. Raises DataError, which says what to do, if one of them is missing."""
    if root.endswith(".tar"):
        listed = [Path(path) for path in listed_shards(root)]
        gone = [path for path in listed if not path.is_file()]
        if gone:
            raise DataError(
                f"cannot read shard {gone[0]}: no such file; {len(gone):,} of the {len(listed):,} that {root!r} lists "
                "are missing"
            )
        return listed
    listing = Path(root) / split / LISTING
    try:
        count = number_of_shards(listing.read_text(errors="replace"), str(listing))
    except OSError as error:
        raise DataError(f"no readable file {listing} ({error.strerror}); {_what_is_there(Path(root), split)}") from None
    files = list(islice(_shards_in(listing.parent), count))
    if len(files) < count:
        missing = listing.with_name(f"{len(files)}.tar")
        mend = f"; write it, or: {_listing_command(listing, len(files))}" if files else ""
        raise DataError(f"cannot read shard {missing}: no such file, and {listing} says {count:,} shards{mend}")
    if listing.with_name(f"{count}.tar").is_file():
        there = sum(1 for _ in _shards_in(listing.parent))
        _LOG.warning(
            "%s says %d shard(s), and %d are there: the others are not read; to read them: %s",
            listing, count, there, _listing_command(listing, there),
        )  # fmt: skip
    return files


def _shards_in(folder: Path) -> Iterator[Path]:
    """Yield 0.tar, 1.tar and so on, up to the first missing one."""
    return takewhile(Path.is_file, (folder / f"{index}.tar" for index in range(_MOST_SHARDS)))


def _listing_command(listing: Path, count: int) -> str:
    return f"echo {count} > {shlex.quote(str(listing))}"


def _what_is_there(root: Path, split: str) -> str:
    """Return words on which files a split without ``nshards.txt`` should have, and what its folder holds instead."""
    count = sum(1 for _ in _shards_in(root / split))
    if count:
        return f"expected the number of shards: {_listing_command(root / split / LISTING, count)}"
    expected = f"expected webdataset shards there: {LISTING} holding their number, and 0.tar, 1.tar, ..."
    splits = sorted(file.parent.name for file in root.glob(f"*/{LISTING}"))
    if splits:
        return f"{expected} (the splits in {root}: {', '.join(splits)})"
    suffixes = tuple(f".{extension}" for extension in EXTENSIONS)
    names = (name for _, _, names in islice(os.walk(root), 100) for name in names)
    if any(name.lower().endswith(suffixes) for name in names):
        return f"{expected} ({root} holds plain images, which are read with --dataset {os.path.join(root, '')})"
    return expected


def number_of_shards(text: str, listing: str) -> int:
    """Return the number in the text of a ``nshards.txt``. Raises DataError if it is not a possible number of shards."""
    try:
        count = int(text)
    except ValueError:
        count = 0
    if not 1 <= count <= _MOST_SHARDS:
        said = one_line(text, 40)
        raise DataError(f"{listing} holds {said!r}; expected the number of shards, from 1 to {_MOST_SHARDS:,}")
    return count


class LocalShards(Dataset[Any]):
    """Images at known positions in local tar files; an item is a preprocessed image, or a pair of image and label."""

    def __init__(self, files: list[Path], transform: Transform, classes: Classes | None = None) -> None:
        """``classes``: the classes that the labels number; None: labels are not read."""
        self.files, self.transform, self.classes = files, transform, classes

    @cached_property
    def samples(self) -> tuple[np.ndarray, np.ndarray | None]:
        """File number, offset and size of each image, int64 ``[count, 3]``, and labels, int64 ``[count]``, or None if
        not read. Arrays, since objects would take hundreds of bytes per image in every loader process.

        Raises:
            DataError: a shard cannot be read, a label is missing or out of range, or there are no images.
        """
        positions, labels = [], []
        for number, file in enumerate(self.files):
            images, label_places = self._index(file)
            positions.append(np.array([(number, *place) for place in images.values()], np.int64).reshape(-1, 3))
            if self.classes is not None:
                labels.append(np.array(_labels(file, images, label_places, self.classes), np.int64))
        if not sum(map(len, positions)):
            raise DataError(
                f"no images ({', '.join(EXTENSIONS)}) in the {len(self.files)} shards beside {self.files[0]}"
            )
        return np.concatenate(positions), None if self.classes is None else np.concatenate(labels)

    @staticmethod
    def _index(file: Path) -> tuple[dict[str, Place], dict[str, Place]]:
        """Return sample key -> place of its image, and sample key -> place of its label."""
        best: dict[str, tuple[int, Place]] = {}
        labels: dict[str, Place] = {}
        for name, place in contents(file):
            key, extension = sample_of(name)
            if extension == "cls":
                labels[key] = place
            elif extension in EXTENSIONS:
                rank = EXTENSIONS.index(extension)
                if key not in best or rank < best[key][0]:
                    best[key] = (rank, place)
        return {key: place for key, (_, place) in best.items()}, labels

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
        except Exception as error:  # PIL's readers of damaged files raise about everything
            name = next(name for name, place in contents(self.files[number]) if place[0] == offset)
            raise DataError(f"{self.files[number]}: {name} is not a readable image") from error
        prepared = self.transform(image)
        return prepared if labels is None else (prepared, int(labels[index]))

    def fingerprint(self) -> list[list[Any]]:
        """Return name, size and modification time (ns) of each shard. Raises DataError if one is missing."""
        try:
            return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in self.files]
        except OSError as error:
            raise DataError(f"cannot read shard {error.filename}: {error.strerror}") from error


def contents(file: Path) -> Iterator[tuple[str, Place]]:
    """Yield name and place of each file in a shard. Only headers are read; the shard stays open during the iteration.

    Raises:
        DataError: the shard cannot be read, or is damaged.
    """
    try:
        with tarfile.open(file, "r:") as tar:  # uncompressed, since images are read by position
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # an open TarFile keeps a kilobyte per member
                if member.size < 0:  # tarfile would loop for ever
                    raise tarfile.ReadError(f"{member.name} has a size of {member.size} bytes")
                if member.isfile():
                    yield member.name, (member.offset_data, member.size)
            end = tar.offset
        # Python takes a damaged header for the end of the archive; the real end is zeros, or nothing.
        with open(file, "rb") as raw:
            raw.seek(end)
            if raw.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise DataError(f"shard {file} is damaged at byte {end}")
    except (OSError, EOFError, ValueError, OverflowError, tarfile.TarError) as error:  # as damaged headers raise
        raise DataError(f"cannot read shard {file} (expected an uncompressed tar file): {error}") from error


def sample_of(name: str) -> tuple[str, str]:
    """Return the key of the sample that a file belongs to, and the file's extension, as webdataset splits the name.

    >>> sample_of("train/cat.1.JPG"), sample_of("v1.0/README")
    (('train/cat', '1.jpg'), ('v1.0/README', ''))
    """
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _labels(file: Path, images: Iterable[str], places: Mapping[str, Place], classes: Classes) -> list[int]:
    """Return the labels of a shard's images. Raises DataError, which names the image, for a missing or wrong label."""
    labels = []
    with open(file, "rb") as raw:
        for key in images:
            if key not in places:
                raise DataError(f"{file}: the image {key!r} has no label ({key}.cls), but labels are needed")
            labels.append(label_at(raw, places[key], classes, f"{file}: {key}.cls"))
    return labels


def label_at(raw: BinaryIO, place: Place, classes: Classes, where: str) -> int:
    """Return the label at a place of a shard. Raises DataError, which begins with ``where``."""
    offset, size = place
    raw.seek(offset)
    return read_label(raw.read(min(size, LONGEST_LABEL)), classes, where)


def addresses(root: str) -> tuple[str, str]:
    """Return the address of the small files of a remote data set, and that of its shards."""
    metadata = data = root.rstrip("/")
    if root.startswith("https://huggingface.co/datasets"):
        # A folder of a data set's page, .../tree/BRANCH: small files under raw, large ones under resolve.
        *head, _, path = root.split("/", 7)
        metadata, data = "/".join([*head, "raw", path]), "/".join([*head, "resolve", path])
    return metadata, data


def fetch(url: str) -> str:
    """Return the text behind a URL. Raises FileNotFoundError if the server has none, OSError if the request fails."""
    import requests

    answer = requests.get(url, timeout=30)
    if answer.status_code == requests.codes.not_found:
        raise FileNotFoundError(f"404 {answer.reason} for url: {url}")
    answer.raise_for_status()
    return answer.text


def remote_shards(root: str, split: str) -> tuple[str, list[str]]:
    """Return the address of the small files of a remote data set, and the addresses of its shards.

    Raises:
        DataError: the number of shards cannot be read.
    """
    if root.endswith(".tar"):
        return root.rpartition("/")[0], listed_shards(root)
    metadata, data = addresses(root)
    listing = f"{metadata}/{split}/{LISTING}"
    try:
        count = number_of_shards(fetch(listing), listing)
    except OSError as error:
        raise DataError(f"cannot read {listing} (the number of shards): {error}") from error
    return metadata, [f"{data}/{split}/{index}.tar" for index in range(count)]


def _remote_classes(url: str) -> Classes:
    try:
        return Classes.in_text(fetch(url), url)
    except OSError:  # clip_benchmark treats a file that it cannot fetch as missing
        return UNKNOWN


def decoded(shards: list[str], cache_dir: str | None, only: list[str] | None = None) -> Any:
    """Return webdataset's stream of the samples of shards, with images decoded as RGB. Other files are decoded too,
    unless ``only`` lists the extensions to decode."""
    import webdataset as wds

    samples = wds.WebDataset(shards, shardshuffle=False, nodesplitter=lambda urls: urls, cache_dir=cache_dir)
    return samples.decode(wds.autodecode.ImageHandler("pil", extensions=list(EXTENSIONS)), only=only)


def failure(error: BaseException) -> str:
    """Return type and message, in one line, of an error from webdataset's pipeline, which adds arguments to it."""
    said = next((said for said in error.args if isinstance(said, str)), str(error))
    return f"{type(error).__name__}: {one_line(said)}"


class RemoteShards(IterableDataset[Any]):
    """A stream of preprocessed images, or pairs of image and label, from shards behind a URL."""

    def __init__(
        self, root: str, split: str, transform: Transform, cache_dir: str | None = None, labels: bool = False
    ) -> None:
        metadata, self.urls = remote_shards(root, split)
        self.transform, self.cache_dir = transform, cache_dir
        self.classes = _remote_classes(f"{metadata}/{CLASS_NAMES}") if labels else None

    def part(self, processes: Processes) -> RemoteShards:
        """Return this process's shards: a contiguous block, none of which another process reads."""
        mine = copy(self)
        mine.urls = [self.urls[index] for index in processes.block(len(self.urls))]
        return mine

    def __iter__(self) -> Iterator[Any]:
        if not self.urls:  # more processes than shards
            return
        samples = decoded(self.urls, self.cache_dir, only=list(EXTENSIONS))
        labels = [] if self.classes is None else ["cls"]
        try:
            for url, key, image, *label in samples.to_tuple("__url__", "__key__", list(EXTENSIONS), *labels):
                prepared = self.transform(image)
                if self.classes is None:
                    yield prepared
                else:
                    yield prepared, read_label(label[0], self.classes, f"{url}: {key}.cls")
        except (OSError, tarfile.TarError) as error:
            shard = next((said for said in error.args if said in self.urls), None)
            if shard is None:
                raise
            raise DataError(f"cannot read the shard {shard}: {failure(error)}") from error

    def fingerprint(self) -> list[str]:
        """Return the addresses of the shards, since their content cannot be compared without reading it."""
        return self.urls
