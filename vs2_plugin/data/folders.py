"""Folders of images: ``photos/CLASS/…/x.jpg``, with or without ``train/`` and ``test/`` above the classes, or flat and
without classes.

A folder is listed by ``os.scandir``, each directory in the order of its names, and a file takes some tens of bytes of
memory. The list is not kept on disk: with one that is older than the folder, results would be wrong without notice.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import stat
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from vs2_plugin.data.labels import CLASS_NAMES, PROMPT, TEMPLATES, has_place
from vs2_plugin.data.pictures import open_picture
from vs2_plugin.errors import DataError
from vs2_plugin.paths import PICTURES, SPLITS, Paths, kept
from vs2_plugin.text import counted, printable

__all__ = ["FolderImages", "LeftOut", "in_words", "open_files", "open_folder"]

_LOG = logging.getLogger(__name__)
_KNOWN = {*SPLITS["train"], *SPLITS["test"]}
#: Folders that archivers and file servers leave beside images; they may hold thumbnails.
_LEAVINGS = {"__MACOSX", "@eaDir"}
_NO_CLASS = -1
#: Function from a PIL image to the first element of an item; None leaves the PIL image as it is.
Transform = Callable[[Any], Any] | None


class LeftOut(NamedTuple):
    """Placeholder for an image that cannot be read."""

    path: str
    """Path relative to the root of the data set."""
    problem: str
    """Error message, one sentence."""


@dataclass(frozen=True)
class _Listing:
    """The image files of a folder, in the order of the data set's items."""

    paths: Paths
    """Paths relative to the root of the data set."""
    labels: np.ndarray
    """int32 ``[count]``: the class number of each image; -1 for none."""
    digest: str
    """SHA-256 over path, size and modification time of each file."""
    passed: dict[str, int]
    """File extension -> number of files with that extension that are not images and were skipped."""


class FolderImages(Dataset[tuple[Any, int]]):
    """Images in a folder; an item is a transformed image and its class number (-1 for none)."""

    def __init__(
        self,
        root: str,
        listing: _Listing,
        classes: list[str],
        templates: list[str],
        transform: Transform = None,
        part: str = "",
    ) -> None:
        self.root, self.transform = root, transform
        #: The folder below ``root`` that holds the split; empty if ``root`` as a whole is the split.
        self.part = part
        #: Whether an unreadable image gives a :class:`LeftOut` instead of an error.
        self.lenient = False
        #: Class names, indexed by label; empty if there are no folders of classes.
        self.classes = classes
        #: Prompts with ``{c}`` for the class.
        self.templates: Any = templates
        #: The images and skipped files; see :class:`_Listing`.
        self.paths, self.labels, self.passed = listing.paths, listing.labels, listing.passed
        self._digest = listing.digest

    @property
    def folder(self) -> str:
        """Absolute path of the folder that holds the images, and no other split."""
        return os.path.abspath(os.path.join(self.root, self.part))

    @property
    def about(self) -> str:
        """Numbers of images, classes and skipped files, in words."""
        classes = f" of {len(self.classes):,} classes" if len(self.classes) > 1 else ""
        where = printable(os.path.join(self.root, self.part))
        return f"{counted(len(self), 'image')}{classes} in {where}{self.skipped}"

    @property
    def skipped(self) -> str:
        """Number of skipped files, in words that follow others; empty if none was."""
        return _passed_over(self.passed)

    def fingerprint(self) -> str:
        """Return a digest that changes when an image is added, removed, renamed or rewritten."""
        return self._digest

    def require_labels(self) -> None:
        """Raise DataError unless every image lies in a folder of a class and there are at least two classes."""
        where = printable(self.root)
        if not self.classes:
            raise DataError(
                f"{where} holds images without folders of classes, so there are no labels to evaluate with; "
                f"expected {os.path.join(where, 'CLASS', 'x.jpg')}; to classify images without labels: vs2 classify"
            )
        bare = np.flatnonzero(self.labels == _NO_CLASS)
        if len(bare):
            raise DataError(
                f"{counted(len(bare), 'image')} in {where} beside the folders of classes, such as "
                f"{printable(self.paths[int(bare[0])])}, and so without a label; expected each in its class's folder"
            )
        if len(self.classes) == 1:
            raise DataError(
                f"{where} has one folder of images, {self.classes[0]!r}, and with one class every answer is right; "
                "expected a folder for each of at least two classes"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        try:
            picture = self.picture(index)
        except DataError as error:
            if getattr(error.__cause__, "errno", None) is not None:  # an error of the disk, not of the file's content
                raise
            if self.lenient:
                return LeftOut(self.paths[index], str(error)), _NO_CLASS
            raise DataError(f"{error}; replace it, or remove it from the folder: no image is skipped here") from error
        return picture if self.transform is None else self.transform(picture), int(self.labels[index])

    def picture(self, index: int) -> Image.Image:
        """Return the image ``index`` as RGB, not transformed. Raises DataError, which names the file, if unreadable."""
        return open_picture(os.path.join(self.root, self.paths[index]))


# -- opening


def open_folder(root: str | os.PathLike[str], split: str = "test", transform: Transform = None) -> FolderImages:
    """List the images of one split of a folder.

    Args:
        root: the folder. Sub-folders ``train/`` and ``test/`` (or ``val/``, ``valid/``, ``validation/``) are its
            splits if both exist, or if there are no other folders; else the whole folder is the split, of any name.
        split: ``train`` or ``test``, or one of the other names above.
        transform: applied to each image.

    Returns:
        The images. A class is a folder directly below a split; the classes of all splits together are numbered in the
        order of the folder names. In class names, underscores become spaces and a number as in
        ``001.Laysan_Albatross`` is dropped; ``classnames.txt`` in ``root`` overrides the names.

    Raises:
        DataError: the folder or split is missing or holds no image, or ``classnames.txt`` does not fit.
    """
    root = os.fspath(root)
    splits = _splits(root)
    folders = _class_folders(root, splits)
    part = _part(root, split, splits)
    listing = kept((os.path.abspath(root), part, *folders), partial(_listing, root, part, folders))
    where = printable(os.path.join(root, part))
    if not len(listing.paths):
        raise DataError(f"no images ({_extensions()}) in {where}{_passed_over(listing.passed)}")
    return FolderImages(root, listing, _class_names(root, folders), _templates(root), transform, part)


def open_files(paths: Iterable[str | os.PathLike[str]]) -> FolderImages:
    """List image files, and all images in folders, in the order of ``paths``, each once. The images have no classes.

    Raises:
        DataError: a file or folder is missing, or there is no image in any of them.
    """
    named = [os.fspath(path) for path in paths]
    rows = _Rows("", once=len(named) > 1)
    for path in named:
        if os.path.isdir(path):
            rows.walk(path, lambda relative: _NO_CLASS)
        else:
            rows.add(path, _NO_CLASS)  # a file that is named itself may have any extension
    listing = rows.listing()
    if not len(listing.paths):
        where = printable(", ".join(named[:3]) + (", ..." if len(named) > 3 else ""))
        raise DataError(f"no images ({_extensions()}) in {where}{_passed_over(listing.passed)}")
    return FolderImages("", listing, [], [PROMPT])


def _splits(root: str) -> dict[str, str]:
    """Return split in lower case -> folder name; empty where the whole folder is one split.

    A folder ``train`` without ``test``, among other folders, is a class: it may hold images of trains.
    """
    names = [name for name, is_folder in _entries(root) if is_folder]
    splits = {name.lower(): name for name in names if name.lower() in _KNOWN}
    both = "train" in splits and not splits.keys().isdisjoint(SPLITS["test"])
    return splits if both or len(splits) == len(names) else {}


def _part(root: str, split: str, splits: dict[str, str]) -> str:
    """Return the folder of a split relative to the root, empty for the root. Raises DataError if there is none."""
    if not splits:
        return ""
    looked_for = SPLITS.get(split, (split.lower(),))
    for name in looked_for:
        if name in splits:
            if name != split.lower():
                _LOG.info("%s has no folder %s: the split %r is %s", printable(root), split, split, splits[name])
            return splits[name]
    present = ", ".join(f"{name}/" for name in splits.values())
    raise DataError(
        f"{printable(root)} has no folder for the split {split!r}, only {present}; expected "
        f"{' or '.join(f'{name}/' for name in looked_for)}, or name a folder below it: --dataset "
        f"{os.path.join(root, next(iter(splits.values())))}/"
    )


def _class_folders(root: str, splits: dict[str, str]) -> list[str]:
    """Return the sorted names of the folders of classes of all splits: folders with at least one image in them."""
    parts = splits.values() if splits else ("",)
    return sorted(
        {
            name
            for part in parts
            for name, is_folder in _entries(os.path.join(root, part))
            if is_folder and any(True for _ in islice(_walk(os.path.join(root, part, name), Counter()), 1))
        }
    )


def _class_names(root: str, folders: list[str]) -> list[str]:
    """Return the class names in the order of their folders.

    Raises:
        DataError: ``classnames.txt`` does not fit the folders, or two classes have the same name.
    """
    names = [in_words(folder) for folder in folders]
    file = os.path.join(root, CLASS_NAMES)
    lines = _lines(file)
    if lines and folders:
        names = _named(file, lines, folders, names)
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        where = ", ".join(folder for folder, name in zip(folders, names, strict=True) if name == twice)
        raise DataError(
            f"{printable(root)}: {printable(where)} are both called {twice!r}; expected a name for each class: write "
            f"FOLDER<tab>NAME into {printable(file)}"
        )
    return names


def _named(file: str, lines: list[str], folders: list[str], names: list[str]) -> list[str]:
    """Return ``names`` with the changes that the lines of ``classnames.txt`` make, in the order of the folders."""
    where = printable(file)
    if not any("\t" in line for line in lines):
        if len(lines) != len(folders):
            raise DataError(
                f"{where} names {len(lines):,} classes, but there are {len(folders):,} folders of images; expected a "
                "name for each, in the order of the folders, or lines FOLDER<tab>NAME"
            )
        return lines
    name_of = dict(zip(folders, names, strict=True))
    for line in lines:
        folder, _, name = line.partition("\t")
        if not name.strip() or folder.strip() not in name_of:
            raise DataError(f"{where}: {line!r}; expected FOLDER<tab>NAME, with a folder that holds images")
        name_of[folder.strip()] = name.strip()
    return list(name_of.values())


def in_words(folder: str) -> str:
    """Return the class name that a folder's name stands for.

    >>> in_words("001.Black_footed_Albatross"), in_words("7_up")
    ('Black footed Albatross', '7 up')
    """
    return printable(re.sub(r"^\d+\.(?=\D)", "", folder).replace("_", " ").strip() or folder)


def _templates(root: str) -> list[str]:
    """Return the prompts of a folder, or CLIP's usual one. Raises DataError for one with no place for the class."""
    file = os.path.join(root, TEMPLATES)
    lines = _lines(file) or [PROMPT]
    for line in lines:
        if not has_place(line):
            raise DataError(f"{printable(file)}: the prompt {line!r} has no {{c}}, where the name of the class goes")
    return lines


def _lines(file: str) -> list[str]:
    """Return the non-empty lines of a file, stripped; an empty list if there is no file."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig", errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"cannot read {printable(file)} ({error.strerror})") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


# -- listing


def _listing(root: str, part: str, folders: list[str]) -> _Listing:
    """Return the list of a folder."""
    numbers = {name: number for number, name in enumerate(folders)}
    rows = _Rows(root)
    rows.walk(part, lambda relative: numbers.get(relative.partition(os.sep)[0], _NO_CLASS))
    listing = rows.listing()
    if not part:  # then these text files lie in the listed folder, and are not skipped images
        texts = Counter({".txt": sum(os.path.isfile(os.path.join(root, name)) for name in (CLASS_NAMES, TEMPLATES))})
        listing = replace(listing, passed=dict(Counter(listing.passed) - texts))
    return listing


class _Rows:
    """A listing under construction."""

    def __init__(self, root: str, once: bool = False) -> None:
        """With ``once``, list a file that is added repeatedly only the first time."""
        self.root = root
        self._seen: set[str] | None = set() if once else None
        self._text, self._ends, self._labels = bytearray(), array("q"), array("i")
        self._digest, self._passed = hashlib.sha256(), Counter[str]()

    def walk(self, folder: str, label: Callable[[str], int]) -> None:
        """Add all images below a folder; ``label`` maps a path relative to the folder to its class number."""
        for relative in _walk(os.path.join(self.root, folder), self._passed):
            self.add(os.path.join(folder, relative), label(relative))

    def add(self, path: str, label: int) -> None:
        """Add an image file. Raises DataError if there is no regular file."""
        try:
            status = os.stat(os.path.join(self.root, path))
        except OSError as error:
            raise _unreadable(os.path.join(self.root, path), error) from None
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would block
            named = printable(os.path.join(self.root, path))
            raise DataError(f"cannot read {named}: it is a pipe or a device; expected files, so remove it")
        if self._seen is not None:
            place = os.path.abspath(os.path.join(self.root, path))
            if place in self._seen:
                return
            self._seen.add(place)
        encoded = os.fsencode(path)
        self._text += encoded
        self._ends.append(len(self._text))
        self._labels.append(label)
        self._digest.update(b"%s\0%d\0%d\n" % (encoded, status.st_size, status.st_mtime_ns))

    def listing(self) -> _Listing:
        """Return the complete listing."""
        paths = Paths(bytes(self._text), np.array(self._ends, dtype=np.int64))
        return _Listing(paths, np.array(self._labels, dtype=np.int32), self._digest.hexdigest(), dict(self._passed))


def _entries(folder: str) -> list[tuple[str, bool]]:
    """Return the sorted names in a folder, each with whether it is a folder. Hidden entries are skipped."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry.name, entry.is_dir()) for entry in entries if not _is_hidden(entry.name))
    except OSError as error:
        raise _unreadable(error.filename or folder, error) from None  # the folder, or a link in it that leads to itself


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _LEAVINGS


def _walk(root: str, passed: Counter[str]) -> Iterator[str]:
    """Yield the paths of the images below a folder, relative to the folder, and count other files by extension in
    ``passed``. Links are followed, except those to a folder that contains the link."""
    pending: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
    while pending:
        folder, above = pending.pop()
        path = os.path.join(root, folder)
        try:
            status = os.stat(path)
        except OSError as error:
            raise _unreadable(path, error) from None
        identity = status.st_dev, status.st_ino
        if identity in above:
            _warn_of_circle(path)
            continue
        below = []
        for name, is_folder in _entries(path):
            if is_folder:
                below.append((os.path.join(folder, name), (*above, identity)))
            elif (extension := os.path.splitext(name)[1].lower()) in PICTURES:
                yield os.path.join(folder, name)
            else:
                passed[extension] += 1
        pending += reversed(below)


@cache  # a folder is walked more than once
def _warn_of_circle(path: str) -> None:
    _LOG.warning("%s is a link to a folder above it, and is skipped", printable(path))


def _unreadable(path: str, error: OSError) -> DataError:
    leads_nowhere = os.path.islink(path) and error.errno in (errno.ENOENT, errno.ELOOP)
    reason = "a link that leads nowhere; mend it, or remove it" if leads_nowhere else error.strerror
    return DataError(f"cannot read {printable(path)}: {reason}")


def _passed_over(passed: dict[str, int]) -> str:
    """Return words on how many files were skipped; empty if none was."""
    if not passed:
        return ""
    most = Counter(passed).most_common(4)
    kinds = ", ".join(f"{count:,} {printable(extension) or 'without extension'}" for extension, count in most)
    shards = "; shards are named --dataset wds/NAME --dataset_root FOLDER" if ".tar" in passed else ""
    more = ", ..." if len(passed) > 4 else ""
    return f"; {counted(sum(passed.values()), 'other file')} skipped ({kinds}{more}){shards}"


def _extensions() -> str:
    return ", ".join(sorted(extension[1:] for extension in PICTURES))
