"""Reads and writes the per-image results of a run: the file ``X.images.npz`` beside ``X.json``.

Its columns are the fields of :class:`Images` that :func:`_column` describes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vs2_plugin.errors import DataError
from vs2_plugin.files import atomic_file
from vs2_plugin.paths import Paths
from vs2_plugin.text import printable, reason_of

__all__ = ["Array", "Images", "images_file"]

Array = NDArray[Any]


def images_file(results: Path) -> Path:
    """Return the path of the per-image results of a results file.

    >>> images_file(Path("results/vs2:ViT-B-32@gate=0.9.json")).name
    'vs2:ViT-B-32@gate=0.9.images.npz'
    """
    return results.with_name(f"{results.stem}.images.npz")


def _column(dtype: str, holds: str = "") -> dict[str, Any]:
    """Declare an array ``[images]``; ``holds`` is "class" for class numbers and "share" for values in [0, 1]."""
    return {"dtype": np.dtype(dtype), "holds": holds}


@dataclass(frozen=True, eq=False, kw_only=True)
class Images:
    """The results of one run for every image, in the order of the run."""

    digest: Array = field(metadata=_column("uint64"))
    """Digest of the preprocessed tensor, which identifies an image across runs."""
    target: Array = field(metadata=_column("int32", "class"))
    """The true class."""
    prediction: Array = field(metadata=_column("int32", "class"))
    """The predicted class."""
    rank: Array = field(metadata=_column("int32"))
    """Number of classes with a higher score than the true one."""
    confidence: Array = field(metadata=_column("float32", "share"))
    """Probability of the prediction (softmax at the logit scale of 100)."""
    target_probability: Array = field(metadata=_column("float32"))
    """Probability of the true class."""
    fvu: Array | None = field(default=None, metadata=_column("float32"))
    """FVU of the image's activation by the SAE of the last site; for steered models."""
    steered: Array | None = field(default=None, metadata=_column("bool"))
    """Whether the gate of any site let the image through; for steered models."""
    plain_prediction: Array | None = field(default=None, metadata=_column("int32", "class"))
    """The plain model's prediction, from the same batch, bit for bit; for steered models."""
    plain_confidence: Array | None = field(default=None, metadata=_column("float32", "share"))
    """The plain model's probability of its prediction; for steered models."""
    paths: Sequence[str] = ()
    """The images' files, relative to their data set; empty where images are not files."""
    classes: tuple[str, ...] = ()
    """The classes' names; empty where the run did not have them."""
    seconds: float | None = None
    """Wall clock of the run, with loading, but without the time of the plain model in a steered run."""
    peak_memory: float | None = None
    """Peak memory in bytes: the process's resident set, or the memory that torch allocated on the CUDA device."""

    def name(self, label: int) -> str:
        """Return the name of a class."""
        return self.classes[label] if self.classes else f"class {label}"

    @cached_property
    def correct(self) -> NDArray[np.bool_]:
        """Which images were classified correctly, bool ``[n]``."""
        return np.asarray(self.prediction == self.target)

    @property
    def accuracy(self) -> float:
        """The share of the images that were classified correctly."""
        return float(self.correct.mean())

    @property
    def recall(self) -> float:
        """Accuracy per class, averaged over the classes that have images."""
        _, label, count = np.unique(self.target, return_inverse=True, return_counts=True)
        return float((np.bincount(label, self.correct) / count).mean())

    @property
    def plain(self) -> Images | None:
        """The plain model's results, without time and memory; None if the run did not record them. ``rank`` and
        ``target_probability`` are still those of the steered model."""
        if self.plain_prediction is None or self.plain_confidence is None:
            return None
        return replace(
            self, prediction=self.plain_prediction, confidence=self.plain_confidence, fvu=None, steered=None,
            plain_prediction=None, plain_confidence=None, seconds=None, peak_memory=None,
        )  # fmt: skip

    @property
    def moved(self) -> tuple[int, int] | None:
        """Numbers of images that steering mended and broke; None without the plain model's results."""
        plain = self.plain
        if plain is None:
            return None
        return int((self.correct & ~plain.correct).sum()), int((plain.correct & ~self.correct).sum())

    def changed(self, limit: int = 20) -> dict[str, list[tuple[str, str, str]]]:
        """Return up to ``limit`` files each for ``mended`` and ``broken``, those of highest confidence first.

        Each is a path, the class before and the class after. Empty without files or the plain model's results.
        """
        plain = self.plain
        if plain is None or not len(self.paths):
            return {}
        changes = {}
        for name, hit in (("mended", self.correct & ~plain.correct), ("broken", plain.correct & ~self.correct)):
            rows = np.flatnonzero(hit)
            rows = rows[np.argsort(-self.confidence[rows], kind="stable")][:limit].tolist()
            classes = [tuple(self.name(int(images.prediction[row])) for images in (plain, self)) for row in rows]
            changes[name] = [
                (printable(self.paths[row]), was, now) for row, (was, now) in zip(rows, classes, strict=True)
            ]
        return {name: files for name, files in changes.items() if files}

    def write(self, path: Path) -> None:
        """Write the per-image results to ``path``, whole or not at all."""
        columns = {name: getattr(self, name) for name in _COLUMNS}
        arrays = {n: np.asarray(array, _COLUMNS[n]["dtype"]) for n, array in columns.items() if array is not None}
        if self.paths:
            text, ends = _joined(self.paths)
            arrays |= {"paths": np.frombuffer(text, dtype=np.uint8), "path_ends": ends}
        arrays["classes"] = np.array(self.classes, dtype=np.str_)
        arrays |= {"seconds": np.array(self.seconds or 0.0), "peak_memory": np.array(int(self.peak_memory or 0))}
        with atomic_file(path) as scratch, open(scratch, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)

    @classmethod
    def read(cls, path: Path) -> Images:
        """Read per-image results.

        Raises:
            DataError: the file is damaged; the message says what is wrong.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                held = {name: file[name] for name in file.files}
        except Exception as error:  # numpy and zipfile raise almost any error for damaged bytes
            raise _damaged(path, reason_of(error)) from error
        for problem in _problems(held):
            raise _damaged(path, problem)
        arrays = {name: held[name] for name in _COLUMNS if name in held}
        seconds, memory = (float(held.get(name, 0)) or None for name in _NUMBERS)  # 0: unknown
        names = tuple(map(printable, held["classes"]))
        paths = Paths(held["paths"].tobytes(), held["path_ends"]) if "paths" in held else ()
        return cls(**arrays, paths=paths, classes=names, seconds=seconds, peak_memory=memory)


_COLUMNS: Mapping[str, Mapping[str, Any]] = {one.name: one.metadata for one in fields(Images) if one.metadata}
_NEEDED = [one.name for one in fields(Images) if one.metadata and one.default is MISSING] + ["classes"]
_NUMBERS = ("seconds", "peak_memory")


def _damaged(path: Path, problem: str) -> DataError:
    return DataError(
        f"{path}: damaged per-image results: {problem}; delete the file, or run the evaluation again with "
        "VS2_PER_IMAGE=1"
    )


def _problems(held: Mapping[str, Array]) -> Iterator[str]:
    """Yield the problems of the arrays of a file. Each check relies on the checks before it."""
    missing = ", ".join(name for name in _NEEDED if name not in held)
    if missing:
        yield f"it holds no {missing}"
    classes = held["classes"]
    if classes.ndim != 1 or classes.dtype.kind != "U":
        yield f"classes is {_shape(classes)}; expected a list of names"
    for name in (name for name in _COLUMNS if name in held):
        yield from _column_problems(name, held[name], held["digest"].size, len(classes))
    of_plain = {"plain_prediction", "plain_confidence"} & held.keys()
    if len(of_plain) == 1:
        yield f"of the plain model it holds {of_plain.pop()} only"
    yield from _path_problems(held)
    for name in _NUMBERS:
        if name in held and not _is_number(held[name]):
            yield f"{name} is {_shape(held[name])}; expected one number"


def _joined(paths: Sequence[str]) -> tuple[bytes, Array]:
    """Return the text and the ends that make up :class:`vs2_plugin.paths.Paths`."""
    if isinstance(paths, Paths):
        return paths.text, paths.ends
    parts = [os.fsencode(path) for path in paths]
    return b"".join(parts), np.cumsum([len(part) for part in parts], dtype=np.int64)


def _path_problems(held: Mapping[str, Array]) -> Iterator[str]:
    """Yield the problems of the arrays of file names, if there are any."""
    if "paths" not in held and "path_ends" not in held:
        return
    text, ends = (held.get(name, np.zeros(0)) for name in ("paths", "path_ends"))
    if text.dtype != np.uint8 or text.ndim != 1:
        yield f"paths is {_shape(text)}; expected bytes"
    if ends.dtype != np.int64 or ends.shape != held["digest"].shape:
        yield f"path_ends is {_shape(ends)} for {held['digest'].size} images"
    if (np.diff(ends, prepend=0) < 0).any() or ends[-1] != len(text):
        yield "path_ends are not where paths end"


def _is_number(value: Array) -> bool:
    return value.ndim == 0 and value.dtype.kind in "iuf" and bool(0 <= value < np.inf)


def _column_problems(name: str, array: Array, count: int, classes: int) -> Iterator[str]:
    """Yield the problems of a column for ``count`` images and this number of classes (0: unknown)."""
    kind, holds = _COLUMNS[name]["dtype"].kind, _COLUMNS[name]["holds"]
    if array.shape != (count,) or array.dtype.kind != kind or count == 0:
        yield f"{name} is {_shape(array)} for {count} images"
    if kind == "f" and not np.isfinite(array).all():
        yield f"{name} holds values that are not finite numbers"
    if holds == "class" and (array.min() < 0 or array.max() >= (classes or np.inf)):
        yield f"{name} names a class outside the {classes} classes"
    if holds == "share" and (array.min() < 0 or array.max() > 1 + 1e-3):
        yield f"{name} lies outside 0 to 1"


def _shape(array: Array) -> str:
    return f"{array.dtype} of shape {list(array.shape)}"
