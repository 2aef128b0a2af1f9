"""Checks of webdataset shards before clip_benchmark evaluates them, by the rules of clip_benchmark and webdataset.

Lists, headers and labels are read, which takes some ten seconds per 100,000 images, but no image: an unreadable one is
named during the evaluation, by :func:`name_samples`. Of a data set behind a URL only the small files are checked.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from vs2_plugin.data.labels import CLASS_NAMES, TEMPLATES, UNKNOWN, Classes, has_place
from vs2_plugin.data.shards import (
    EXTENSIONS,
    LISTING,
    addresses,
    beside,
    contents,
    failure,
    fetch,
    label_at,
    listed_shards,
    local_shards,
    number_of_shards,
    sample_of,
)  # fmt: skip
from vs2_plugin.errors import DataError, Vs2Error
from vs2_plugin.text import one_line

__all__ = ["fewer_workers", "look", "name_samples"]

CLASSIFICATION = "zeroshot_classification"
#: The file with the type of a data set, and type -> extension of the file beside each image; ``cls`` (labels) if none.
_TYPE, _HOLDS = "dataset_type.txt", {"retrieval": "txt", "multilabel": "npy"}
_IMAGES = ", ".join(EXTENSIONS)
#: First bytes of compressed files, which webdataset reads as well.
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ")
#: Files that webdataset skips.
_META = re.compile(r"__[^/]*__($|/)")


def look(
    root: str, split: str, task: str = CLASSIFICATION, names: bool = True, templates: bool = True
) -> Sequence[int] | None:
    """Check the shards of a split before it is evaluated.

    Args:
        root: the data set's folder or URL, or a list of its shards.
        split: the split's name.
        task: clip_benchmark's name of the task.
        names: whether a classification reads the class names from the folder.
        templates: whether a classification reads the prompts from the folder.

    Returns:
        The number of samples in each shard, or 1 for a shard that was not counted; None if the shards are unknown.

    Raises:
        DataError: a fault that would end the evaluation or falsify it; the message says how to mend the fault.
    """
    classification = task in (CLASSIFICATION, "linear_probe")
    if "://" in root:
        return _look_behind(root, split, classification and names, classification and templates)
    files, folder = local_shards(root, split), beside(root)
    kind = _kind(folder, task, classification)
    if classification and templates:
        _check_templates(folder / TEMPLATES)
    classes = Classes.in_folder(folder) if classification and names else UNKNOWN
    if classification and names and classes is UNKNOWN:
        raise DataError(
            f"no file {folder / CLASS_NAMES}; expected the names of the classes, one per line, in the order of the "
            "numbers in the labels (.cls)"
        )
    counts = [_count(file, _HOLDS.get(kind, "cls"), classes) for file in files]
    if not any(counts):
        raise DataError(f"no images ({_IMAGES}) in the {len(files)} shards beside {files[0]}")
    return counts


def _kind(folder: Path, task: str, classification: bool) -> str:
    """Return the type in ``dataset_type.txt``, empty if unreadable. Raises DataError if it does not fit the task."""
    file = folder / _TYPE
    try:
        kind = file.read_text(errors="replace").strip().lower()
    except OSError:
        kind = ""
    if classification and kind == "retrieval":
        raise DataError(f"{file} says 'retrieval', so there is nothing to classify; add --task zeroshot_retrieval")
    if task == "zeroshot_retrieval" and kind != "retrieval":
        raise DataError(f"{file} does not say that these are captions: echo retrieval > {shlex.quote(str(file))}")
    return kind


def _check_templates(file: Path) -> None:
    """Raise DataError if the file of prompts is missing, or if a class name cannot be inserted into them."""
    mend = f"echo 'a photo of a {{c}}.' > {shlex.quote(str(file))}"
    try:
        lines = [line.strip() for line in file.read_text(errors="replace").splitlines()]
    except OSError as error:
        raise DataError(f"no readable file {file} ({error.strerror}), the prompts; write it: {mend}") from None
    wrong = next((line for line in lines if "{" in line and not has_place(line)), None)
    if wrong is not None:
        raise DataError(f"{file}: the prompt {wrong!r} cannot be filled in; expected {{c}} for the class")
    if not any(map(has_place, lines)):
        raise DataError(f"{file} holds no prompt with {{c}}, where the name of the class goes; write one: {mend}")


def _count(file: Path, beside: str, classes: Classes) -> int:
    """Return the number of samples in a shard, each an image and a file with the extension ``beside``."""
    with open(file, "rb") as raw:
        if raw.read(6).startswith(_COMPRESSED):  # to count its samples, all of it would have to be decompressed
            return 1
        parts = ((*sample_of(name), place) for name, place in contents(file) if not _META.match(name))
        count = 0
        # As in webdataset, a sample consists of consecutive files with the same key.
        for key, group in groupby((part for part in parts if part[0] and part[1]), lambda part: part[0]):
            held = {}
            for _, extension, place in group:
                if extension in held:
                    raise DataError(f"{file} holds {key}.{extension} twice; expected one file of that name")
                held[extension] = place
            if not any(extension in held for extension in EXTENSIONS):
                raise DataError(
                    f"{file}: beside {key}.{next(iter(held))} there is no image ({_IMAGES}), and clip_benchmark reads "
                    "every file as part of a sample; expected an image right beside it, or write the shard without it"
                )
            if beside not in held:
                raise DataError(
                    f"{file}: the image {key!r} has no label; expected {key}.{beside} right beside it in the shard"
                )
            if beside == "cls":
                label_at(raw, held["cls"], classes, f"{file}: {key}.cls")
            count += 1
    return count


def _look_behind(root: str, split: str, names: bool, templates: bool) -> Sequence[int] | None:
    """Check the small files of a remote data set; return 1 for each shard, or None if their number is unknown. A file
    is missing only if the server says so; if it cannot be fetched here, clip_benchmark may have other means."""
    if root.endswith(".tar"):
        return [1] * len(listed_shards(root))
    if not root.startswith(("http://", "https://")):
        return None
    folder, _ = addresses(root)
    listing = f"{folder}/{split}/{LISTING}"
    needed = [f"{folder}/{CLASS_NAMES}"] if names else []
    needed += [f"{folder}/{TEMPLATES}"] if templates else []
    try:
        count = number_of_shards(fetch(listing), listing)
        for url in needed:
            fetch(url)
    except FileNotFoundError as error:
        raise DataError(f"{error}; expected {LISTING} with the number of shards of the split {split!r}, and for "
                        f"classification {CLASS_NAMES} and {TEMPLATES}") from None  # fmt: skip
    except OSError:
        return None
    return [1] * count


def fewer_workers(counts: Sequence[int], asked: int) -> int:
    """Return the largest number of loader workers, at most ``asked``, that each get a sample. With ``n`` workers,
    webdataset gives each one every n-th shard, and a worker without a sample ends the evaluation.

    >>> fewer_workers([9, 9, 9], 4), fewer_workers([9, 0, 9, 0], 4), fewer_workers([9, 9, 9, 9, 9], 4)
    (3, 1, 4)
    """
    for number in range(min(asked, len(counts)), 1, -1):
        if all(any(counts[worker::number]) for worker in range(number)):
            return number
    return min(asked, 1)


# -- during the evaluation


@dataclass
class _Naming:
    """Stages of webdataset's pipeline that keep track of the sample that was read last, and name it in errors."""

    classes: Classes
    shard: str = "?"
    key: str = "?"

    def note(self, source: Iterable[Any]) -> Iterator[Any]:
        """Yield the samples unchanged, and record which one passes through: a stage after each other stage."""
        for sample in source:
            if isinstance(sample, dict):
                self.shard = str(sample.get("__url__") or sample.get("url") or self.shard)
                self.key = str(sample.get("__key__", self.key))
            yield sample

    def name(self, source: Iterable[Any]) -> Iterator[Any]:
        """Yield the samples, tuples of an image and its label or captions, after checking labels, and turn an error of
        an earlier stage into a DataError that names the sample: the last stage."""
        try:
            for sample in source:
                if isinstance(sample[1], int):
                    self.classes.check(sample[1], f"{self.shard}: {self.key}.cls")
                yield sample
        except Vs2Error:
            raise
        except Exception as error:  # whatever webdataset, PIL or a download raises
            extension = getattr(error, "k", None)  # webdataset's decoding error holds the extension of the file
            if extension in EXTENSIONS:
                said = f"{self.key}.{extension} is not a readable image"
            else:
                said = f"cannot continue reading at the sample {self.key!r}: {failure(error.__cause__ or error)}"
            raise DataError(one_line(f"{self.shard}: {said}", 1000)) from None


def name_samples(dataset: Any) -> Any:
    """Make a webdataset of clip_benchmark raise errors that name the shard and the sample, and return the data set. Its
    samples stay the same."""
    stages: list[Callable[..., Any]] | None = getattr(dataset, "pipeline", None)
    if isinstance(stages, list):
        names = getattr(dataset, "classes", None)
        naming = _Naming(Classes(len(names), "the data set") if names else UNKNOWN)
        dataset.pipeline = [step for stage in stages for step in (stage, naming.note)] + [naming.name]
    return dataset
