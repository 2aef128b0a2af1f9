"""Conversion of official archives (packed or unpacked) of the paper's data sets that clip_benchmark lacks to webdataset
shards that clip_benchmark reads."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from tqdm import tqdm

from vs2_plugin.data.folders import in_words
from vs2_plugin.data.labels import CLASS_NAMES, TEMPLATES
from vs2_plugin.data.shards import LISTING
from vs2_plugin.errors import DataError
from vs2_plugin.files import atomic_folder
from vs2_plugin.text import counted, printable, reason_of

__all__ = ["OFFICIAL", "Official", "Written", "convert", "official_of"]

#: Number of shards of each split: at most this many loader workers can share a split.
_SHARDS = 8
#: Errors that reading a damaged or incomplete archive raises.
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, EOFError, zlib.error)
#: An image's split and class number.
_Place = tuple[str, int]


@dataclass(frozen=True)
class _Contents:
    """The classes and images of an archive, as its list files give them."""

    classes: list[str]
    """Class names, in the order of the class numbers."""
    place: Callable[[str], _Place | None]
    """Gives split and class of the file at a path in the archive; None for a file that is not an image of the set."""
    pictures: frozenset[str]
    """Paths of the images that the archive must contain."""
    even: bool
    """Whether all classes must have equally many training images."""


class Written(NamedTuple):
    """Numbers of images and classes that were written."""

    train: int
    """Number of training images."""
    test: int
    """Number of test images."""
    classes: int
    """Number of classes."""


@dataclass(frozen=True)
class Official:
    """A data set as its authors distribute it."""

    title: str
    """Name of the data set, for messages."""
    archive: str
    """File name of the archive."""
    url: str
    """Address of the archive or of its download page."""
    dataset: str
    """Name of the shards in the files of the paper's tables."""
    lists: tuple[str, ...]
    """Paths, in the archive, of the list files that name its classes and images."""
    read: Callable[[Mapping[str, str]], _Contents]
    """Parses the texts of the list files, by path. Raises ValueError or KeyError if they contradict each other."""


def official_of(dataset: str) -> tuple[str, Official] | None:
    """Return the official data set with this name in the paper's tables, as (its word in ``vs2 data``, data set)."""
    return next(((word, official) for word, official in OFFICIAL.items() if official.dataset == dataset), None)


def convert(official: Official, source: Path, target: Path) -> Written:
    """Write the shards of an official archive, with class names and prompts, in clip_benchmark's layout.

    The prompts are the 80 that CLIP's authors give for ImageNet.

    Args:
        official: the data set.
        source: its archive, or the folder of the unpacked archive.
        target: the folder to write, which must be missing or empty.

    Raises:
        DataError: ``source`` is another archive, damaged or incomplete; or ``target`` exists and is not empty.
    """
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"{target} already exists; remove it, or name another folder")
    with _readable(official, source):
        root, contents = _look(official, source)
    with atomic_folder(target) as scratch:
        with _readable(official, source):
            counts = _write_shards(official, source, root, contents, scratch)
        texts = {CLASS_NAMES: contents.classes, TEMPLATES: [prompt("{c}") for prompt in OPENAI_IMAGENET_TEMPLATES]}
        for name, lines in texts.items():
            (scratch / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Written(counts["train"], counts["test"], len(contents.classes))


def _write_shards(official: Official, source: Path, root: str, contents: _Contents, folder: Path) -> Counter[str]:
    """Write all images, those of a split to its shards in turn. Return split -> number of images."""
    counts, of_class, keys = Counter[str](), Counter[_Place](), set[str]()
    missing = set(contents.pictures)
    with ExitStack() as stack:
        shards: dict[str, list[tarfile.TarFile]] = {}
        for split in ("train", "test"):
            (folder / split).mkdir()
            paths = [folder / split / f"{number}.tar" for number in range(_SHARDS)]
            shards[split] = [stack.enter_context(tarfile.open(path, "w")) for path in paths]
            (folder / split / LISTING).write_text(f"{_SHARDS}\n")
        for path, read in tqdm(_entries(source), official.title, unit="file", disable=None, leave=False):
            inside = path.removeprefix(root)
            place = contents.place(inside) if path.startswith(root) else None
            key = PurePosixPath(path).stem.replace(".", "_")
            if place is None or key in keys:  # a tar may hold a file twice
                continue
            split, label = place
            shard = shards[split][counts[split] % _SHARDS]
            for suffix, data in (("jpg", read()), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
            counts[split] += 1
            of_class[place] += 1
            keys.add(key)
            missing.discard(inside)
    least, most = (of([of_class["train", label] for label in range(len(contents.classes))]) for of in (min, max))
    if missing:
        lack = f"{counted(len(missing), 'picture')} that its lists name, such as {printable(min(missing))}"
    elif contents.even and least < most:
        lack = f"pictures to train on: there are {least:,} of one class, and {most:,} of another"
    else:
        return counts
    raise DataError(f"{source} lacks {lack}; {_fetch(official)}")


def _look(official: Official, source: Path) -> tuple[str, _Contents]:
    """Return the path prefix of the data set within ``source``, and the contents that its list files give."""
    candidates: dict[str, dict[str, str]] = {}
    for path, read in _entries(source):
        for name in official.lists:
            if path == name or path.endswith(f"/{name}"):
                texts = candidates.setdefault(path.removesuffix(name), {})
                texts[name] = read().decode("utf-8", "replace")
                if len(texts) == len(official.lists):
                    return path.removesuffix(name), _read_lists(official, source, texts)
    raise DataError(
        f"{source} holds no {official.title}: there are no {', '.join(official.lists)} in it; {_fetch(official)}"
    )


def _read_lists(official: Official, source: Path, texts: Mapping[str, str]) -> _Contents:
    try:
        contents = official.read(texts)
        if not contents.classes or not contents.pictures:
            raise ValueError("they name nothing")
        return contents
    except (ValueError, KeyError) as error:
        reason = reason_of(error)
        raise DataError(f"{source}: its lists do not match each other ({reason}); {_fetch(official)}") from error


def _fetch(official: Official) -> str:
    return f"expected {official.archive}, or the folder that it was unpacked into ({official.url})"


@contextmanager
def _readable(official: Official, source: Path) -> Iterator[None]:
    """Raise a DataError of one sentence for whatever error reading a damaged archive raises in the block."""
    try:
        yield
    except _DAMAGE as error:
        raise DataError(f"{source} is not a complete archive ({reason_of(error)}); {_fetch(official)}") from error


def _entries(source: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yield each file of an archive or folder: its path, and a reader to call before the next file is requested."""
    if source.is_dir():
        for folder, folders, names in os.walk(source):
            folders.sort()
            for file in (Path(folder, name) for name in sorted(names)):
                yield file.relative_to(source).as_posix(), file.read_bytes
    elif not source.exists():
        raise DataError(f"no file or folder {str(source)!r}; expected an archive, or the folder of an unpacked one")
    elif zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as packed:
            for info in packed.infolist():
                if not info.is_dir():
                    yield info.filename, partial(packed.read, info)
    else:
        with tarfile.open(source, "r|*") as tar:
            for member in tar:
                if member.isfile():
                    yield member.name.removeprefix("./"), partial(_read_member, tar, member)


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return b"" if file is None else file.read()


# -- parsing the list files of each data set


def _pairs(text: str) -> dict[str, str]:
    """Return key -> value from lines that hold a key, white space and a value."""
    return dict(line.split(maxsplit=1) for line in text.splitlines() if line.strip())


def _cub(texts: Mapping[str, str]) -> _Contents:
    images, classes, labels, trained = (
        {key: value.strip() for key, value in _pairs(texts[name]).items()} for name in _CUB_LISTS
    )
    numbers = {key: number for number, key in enumerate(classes)}
    split = {"1": "train", "0": "test"}
    places = {f"images/{path}": (split[trained[key]], numbers[labels[key]]) for key, path in images.items()}
    return _Contents([in_words(name) for name in classes.values()], places.get, frozenset(places), even=False)


def _tiny_imagenet(texts: Mapping[str, str]) -> _Contents:
    ids, words, annotations = (texts[name] for name in _TINY_LISTS)
    numbers = {word: number for number, word in enumerate(ids.split())}
    names = {key: name for key, _, name in (line.partition("\t") for line in words.splitlines())}
    rows = [line.split("\t") for line in annotations.splitlines() if line.strip()]
    test_places = {f"val/images/{row[0]}": ("test", numbers[row[1].strip()]) for row in rows}

    def place(path: str) -> _Place | None:
        parts = path.split("/")
        if parts[::2] == ["train", "images"] and parts[1] in numbers and path.lower().endswith((".jpeg", ".jpg")):
            return "train", numbers[parts[1]]
        return test_places.get(path)

    return _Contents(_first_words([names[key].strip() for key in numbers]), place, frozenset(test_places), even=True)


def _first_words(names: list[str]) -> list[str]:
    """Return the first synonym of each class, or all its synonyms where two classes share the first one.

    >>> _first_words(["goldfish, Carassius auratus", "crane, bird", "crane, machine"])
    ['goldfish', 'crane, bird', 'crane, machine']
    """
    short = [name.partition(",")[0] for name in names]
    return [name if short.count(first) > 1 else first for name, first in zip(names, short, strict=True)]


_CUB_LISTS = ("images.txt", "classes.txt", "image_class_labels.txt", "train_test_split.txt")
_TINY_LISTS = ("wnids.txt", "words.txt", "val/val_annotations.txt")
#: Word for a data set in ``vs2 data`` -> the data set.
OFFICIAL = {
    "cub": Official(
        "CUB-200-2011",
        "CUB_200_2011.tgz",
        "https://www.vision.caltech.edu/datasets/cub_200_2011",
        "wds/cub200",
        _CUB_LISTS,
        _cub,
    ),
    "tiny-imagenet": Official(
        "Tiny-ImageNet",
        "tiny-imagenet-200.zip",
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        "wds/tiny_imagenet",
        _TINY_LISTS,
        _tiny_imagenet,
    ),
}
