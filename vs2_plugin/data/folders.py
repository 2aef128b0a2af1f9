"""Folders of images, as they lie on a disk: ``photos/CLASS/…/x.jpg``, with ``train/`` and ``test/`` above the classes
or without, or flat and without classes.

A folder is listed by ``os.scandir``, each directory in the order of its names, and a file takes some tens of bytes of
memory. Nothing of that is kept on disk: a list that is older than the folder would be a silent wrong number.
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
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from vs2_plugin.data.labels import CLASS_NAMES, PROMPT, TEMPLATES, has_place
from vs2_plugin.data.pictures import open_picture
from vs2_plugin.errors import DataError
from vs2_plugin.paths import PICTURES, Paths, listed
from vs2_plugin.text import counted, printable

__all__ = ["FolderImages", "LeftOut", "in_words", "open_files", "open_folder"]

_LOG = logging.getLogger(__name__)
#: Names of folders that stand for a split, those looked for first first.
_SPLITS = {"train": ("train",), "test": ("test", "val", "valid", "validation")}
_KNOWN = {*_SPLITS["train"], *_SPLITS["test"]}
#: What archives and file servers leave beside pictures, small pictures among it.
_LEAVINGS = {"__MACOSX", "@eaDir"}
_NO_CLASS = -1
#: Turns a PIL image into what an item begins with; None leaves it as it is.
Transform = Callable[[Any], Any] | None


class LeftOut(NamedTuple):
    """What stands in the place of a picture that cannot be read."""

    path: str
    """Relative to the root of the data set."""
    problem: str
    """A sentence."""


@dataclass(frozen=True)
class _Listing:
    """The pictures of a folder, in their order."""

    paths: Paths
    """Relative to the root of the data set."""
    labels: np.ndarray
    """int32 ``[count]``: the number of each one's class; -1 for none."""
    digest: str
    """SHA-256 over path, size and time of change of each."""
    passed: dict[str, int]
    """Extension -> how many files with it were passed over."""


class FolderImages(Dataset[tuple[Any, int]]):
    """Pictures in a folder; an item is a picture, transformed, and the number of its class (-1 for none)."""

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
        #: The folder below ``root`` that holds the split; an empty word where all of it is one.
        self.part = part
        #: Whether an item that is no readable picture is a :class:`LeftOut`, and no error.
        self.lenient = False
        #: What the labels number, in words; empty where the pictures lie in no folders of classes.
        self.classes = classes
        #: Prompts with ``{c}`` for the class.
        self.templates: Any = templates
        self._listing = listing

    @property
    def paths(self) -> Paths:
        """Their paths relative to ``root``, in the order of the items."""
        return self._listing.paths

    @property
    def folder(self) -> str:
        """The absolute path of the folder that holds the pictures, and no other split."""
        return os.path.abspath(os.path.join(self.root, self.part))

    @property
    def labels(self) -> np.ndarray:
        """int32 ``[count]``: the number of each one's class; -1 for none."""
        return self._listing.labels

    @property
    def passed(self) -> dict[str, int]:
        """Extension -> how many files with it were passed over, as they are no pictures."""
        return self._listing.passed

    @property
    def about(self) -> str:
        """How many pictures there are, of how many classes, and what was passed over, in words."""
        classes = f" of {len(self.classes):,} classes" if len(self.classes) > 1 else ""
        where = printable(os.path.join(self.root, self.part))
        return f"{counted(len(self), 'image')}{classes} in {where}{_passed_over(self.passed)}"

    def fingerprint(self) -> str:
        """Return what changes when a picture is added, removed, renamed or written anew."""
        return self._listing.digest

    def require_labels(self) -> None:
        """Refuse pictures that lie in no folders of classes, all or some, or in a single one. Raises DataError."""
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
            if getattr(error.__cause__, "errno", None) is not None:  # the disk is to blame, and no file
                raise
            if self.lenient:
                return LeftOut(self.paths[index], str(error)), _NO_CLASS
            raise DataError(f"{error}; replace it, or remove it from the folder: no image is skipped here") from error
        return picture if self.transform is None else self.transform(picture), int(self.labels[index])

    def picture(self, index: int) -> Image.Image:
        """Return a picture as it is. Raises DataError, which names the file, if it cannot be read."""
        return open_picture(os.path.join(self.root, self.paths[index]))


# -- opening


def open_folder(root: str | os.PathLike[str], split: str = "test", transform: Transform = None) -> FolderImages:
    """List the pictures of a folder, or of the part of it that a split has.

    Args:
        root: the folder. Where it holds ``train/`` and ``test/`` (or ``val/``, ``valid/``, ``validation/``), and no
            other folders or both of them, these are its splits; else it is one split, whatever that is called.
        split: ``train`` or ``test``, or the name of a sub-folder.
        transform: what is made of each picture.

    Returns:
        The images. A class is a folder right below the split, and the classes are those of all splits together, in the
        order of the folders' names. Underscores of these become spaces, and the number in ``001.Laysan_Albatross``
        goes; ``classnames.txt`` beside them gives other names.

    Raises:
        DataError: there is no such folder, split or picture, or ``classnames.txt`` does not fit.
    """
    root = os.fspath(root)
    splits = _splits(root)
    folders = _class_folders(root, splits)
    part = _part(root, split, splits)
    listing = _listing(root, part, tuple(folders))
    where = printable(os.path.join(root, part))
    if not len(listing.paths):
        raise DataError(f"no images ({_extensions()}) in {where}{_passed_over(listing.passed)}")
    return FolderImages(root, listing, _class_names(root, folders), _templates(root), transform, part)


def open_files(paths: Iterable[str | os.PathLike[str]], transform: Transform = None) -> FolderImages:
    """List picture files, and all pictures in folders, in the order in which they are named. They have no classes.

    Raises:
        DataError: there is no such file or folder, or no picture in all of them.
    """
    rows, named = _Rows(""), [os.fspath(path) for path in paths]
    for path in named:
        if os.path.isdir(path):
            rows.walk(path, lambda relative: _NO_CLASS)
        else:
            rows.add(path, _NO_CLASS)  # whatever it is called
    listing = rows.listing()
    if not len(listing.paths):
        where = printable(", ".join(named[:3]) + (", ..." if len(named) > 3 else ""))
        raise DataError(f"no images ({_extensions()}) in {where}{_passed_over(listing.passed)}")
    return FolderImages("", listing, [], [PROMPT], transform)


def _splits(root: str) -> dict[str, str]:
    """Return the splits of a folder, in small letters -> the name of the folder; none where the folder is one itself.

    A folder ``train`` among others may hold pictures of trains.
    """
    names = [name for name, is_folder in _entries(root) if is_folder]
    found = {name.lower(): name for name in names if name.lower() in _KNOWN}
    both = "train" in found and not found.keys().isdisjoint(_SPLITS["test"])
    return found if both or len(found) == len(names) else {}


def _part(root: str, split: str, splits: dict[str, str]) -> str:
    """Return the folder of a split, relative to the root; an empty word for all of it."""
    if not splits:
        return ""
    looked_for = _SPLITS.get(split, (split.lower(),))
    for name in looked_for:
        if name in splits:
            if name != split.lower():
                _LOG.info("%s has no folder %s: the split %r is %s", printable(root), split, split, splits[name])
            return splits[name]
    there = ", ".join(f"{name}/" for name in splits.values())
    raise DataError(
        f"{printable(root)} has no folder for the split {split!r}, only {there}; expected "
        f"{' or '.join(f'{name}/' for name in looked_for)}, or name a folder below it: --dataset "
        f"{os.path.join(root, next(iter(splits.values())))}/"
    )


def _class_folders(root: str, splits: dict[str, str]) -> list[str]:
    """Return the names of the folders that are classes, of all splits together: those with a picture in them."""
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
    """Return what classes are called, in the order of their folders.

    Raises:
        DataError: ``classnames.txt`` does not fit, or two of them have one name.
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
    """Return the names that the lines of ``classnames.txt`` give, in the order of the folders."""
    where = printable(file)
    if not any("\t" in line for line in lines):
        if len(lines) != len(folders):
            raise DataError(
                f"{where} names {len(lines):,} classes, but there are {len(folders):,} folders of images; expected a "
                "name for each, in the order of the folders, or lines FOLDER<tab>NAME"
            )
        return lines
    given = dict(zip(folders, names, strict=True))
    for line in lines:
        folder, _, name = line.partition("\t")
        if not name.strip() or folder.strip() not in given:
            raise DataError(f"{where}: {line!r}; expected FOLDER<tab>NAME, with a folder that holds images")
        given[folder.strip()] = name.strip()
    return list(given.values())


def in_words(folder: str) -> str:
    """Return what a folder of a class is called.

    >>> in_words("001.Black_footed_Albatross"), in_words("7_up")
    ('Black footed Albatross', '7 up')
    """
    return printable(re.sub(r"^\d+\.(?=\D)", "", folder).replace("_", " ").strip() or folder)


def _templates(root: str) -> list[str]:
    """Return the prompts of a folder, or CLIP's usual one. Raises DataError if one has no place for the class."""
    file = os.path.join(root, TEMPLATES)
    lines = _lines(file) or [PROMPT]
    for line in lines:
        if not has_place(line):
            raise DataError(f"{printable(file)}: the prompt {line!r} has no {{c}}, where the name of the class goes")
    return lines


def _lines(file: str) -> list[str]:
    """Return the lines of a file that are not empty; none where there is no file."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig", errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"cannot read {printable(file)} ({error.strerror})") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


# -- listing


def _listing(root: str, part: str, folders: tuple[str, ...]) -> _Listing:
    """List a folder, or return what the present block of :func:`listed_once` has listed."""
    made: dict[Any, _Listing] | None = listed.get()
    key = (os.path.abspath(root), part, folders)
    if made is not None and key in made:
        return made[key]
    numbers = {name: number for number, name in enumerate(folders)}
    rows = _Rows(root)
    rows.walk(part, lambda relative: numbers.get(relative.partition(os.sep)[0], _NO_CLASS))
    listing = rows.listing()
    if not part:  # beside the folders of classes
        texts = Counter({".txt": sum(os.path.isfile(os.path.join(root, name)) for name in (CLASS_NAMES, TEMPLATES))})
        listing = replace(listing, passed=dict(Counter(listing.passed) - texts))
    if made is not None:
        made[key] = listing
    return listing


class _Rows:
    """A listing under construction."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._text, self._ends, self._labels = bytearray(), array("q"), array("i")
        self._digest, self._passed = hashlib.sha256(), Counter[str]()

    def walk(self, folder: str, label: Callable[[str], int]) -> None:
        """Add all pictures below a folder; ``label`` gives the class of a path that is relative to it."""
        for relative in _walk(os.path.join(self.root, folder), self._passed):
            self.add(os.path.join(folder, relative), label(relative))

    def add(self, path: str, label: int) -> None:
        """Add a picture. Raises DataError if there is none."""
        try:
            status = os.stat(os.path.join(self.root, path))
        except OSError as error:
            raise _unreadable(os.path.join(self.root, path), error) from None
        if not stat.S_ISREG(status.st_mode):  # which would be waited for
            named = printable(os.path.join(self.root, path))
            raise DataError(f"cannot read {named}: it is a pipe or a device; expected files")
        encoded = os.fsencode(path)
        self._text += encoded
        self._ends.append(len(self._text))
        self._labels.append(label)
        self._digest.update(b"%s\0%d\0%d\n" % (encoded, status.st_size, status.st_mtime_ns))

    def listing(self) -> _Listing:
        """Return what was listed."""
        paths = Paths(bytes(self._text), np.array(self._ends, dtype=np.int64))
        return _Listing(paths, np.array(self._labels, dtype=np.int32), self._digest.hexdigest(), dict(self._passed))


def _entries(folder: str) -> list[tuple[str, bool]]:
    """Return the names in a folder, sorted, and whether each is a folder. Hidden ones are passed over."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry.name, entry.is_dir()) for entry in entries if not _is_hidden(entry.name))
    except OSError as error:
        raise _unreadable(folder, error) from None


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _LEAVINGS


def _walk(root: str, passed: Counter[str]) -> Iterator[str]:
    """Yield the pictures below a folder, by their paths relative to it, and count other files by extension. Links are
    followed, but for those that lead back."""
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
            _LOG.warning("%s is a link to a folder above it, and is skipped", printable(path))
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


def _unreadable(path: str, error: OSError) -> DataError:
    reason = "a link that leads nowhere" if os.path.islink(path) and error.errno == errno.ENOENT else error.strerror
    return DataError(f"cannot read {printable(path)}: {reason}")


def _passed_over(passed: dict[str, int]) -> str:
    """Say how many files were passed over; nothing if none was."""
    if not passed:
        return ""
    most = Counter(passed).most_common(4)
    kinds = ", ".join(f"{count:,} {printable(extension) or 'without extension'}" for extension, count in most)
    shards = "; shards are named --dataset wds/NAME --dataset_root FOLDER" if ".tar" in passed else ""
    more = ", ..." if len(passed) > 4 else ""
    return f"; {counted(sum(passed.values()), 'other file')} skipped ({kinds}{more}){shards}"


def _extensions() -> str:
    return ", ".join(sorted(extension[1:] for extension in PICTURES))
