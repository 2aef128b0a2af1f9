"""Reads clip_benchmark's result files, and the per-image results beside them."""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vs2_plugin.errors import DataError
from vs2_plugin.names import split
from vs2_plugin.results.statistics import Calibration, calibration_of_bins

__all__ = ["Images", "Run", "read"]

EXPECTED = 'a results file of clip_benchmark: a JSON object with "dataset", "model", "task" and "metrics"'
#: The harness breaks ties between classes in its own way, so its accuracy may differ a little from the predictions'.
_TIES = 0.02
_ALWAYS = {"digest": "u", "target": "i", "prediction": "i", "confidence": "f", "target_probability": "f", "rank": "i"}
_STEERED = {"fvu": "f", "steered": "b", "plain_prediction": "i", "plain_confidence": "f"}


@dataclass(frozen=True, eq=False)
class Images:
    """What one run said of every image; the order is the run's own."""

    digest: np.ndarray
    """Identifies an image across runs: of its preprocessed tensor. uint64 ``[n]``, like all below."""
    target: np.ndarray
    """The true class."""
    prediction: np.ndarray
    """The class given."""
    confidence: np.ndarray
    """The largest probability, in [0, 1]."""
    classes: tuple[str, ...]
    """The classes' names; empty where the run did not know them."""
    fvu: np.ndarray | None = None
    """The share of the activation's variance that the SAE does not explain."""
    plain: tuple[np.ndarray, np.ndarray] | None = None
    """Of a steered model: the plain model's predictions and confidences for the same images, which it recorded too."""
    seconds: float | None = None
    """Wall clock of the run."""
    peak_memory: float | None = None
    """Peak memory of the process (on a GPU, of the device) in bytes."""

    def name(self, label: int) -> str:
        """The name of a class."""
        return self.classes[label] if self.classes else f"class {label}"

    @cached_property
    def correct(self) -> np.ndarray:
        """Which images were classified correctly, bool ``[n]``."""
        return self.prediction == self.target

    @property
    def recall(self) -> float:
        """Accuracy per class, averaged over the classes that have images."""
        _, label, count = np.unique(self.target, return_inverse=True, return_counts=True)
        return float((np.bincount(label, self.correct) / count).mean())

    @classmethod
    def load(cls, path: Path) -> Images:
        """Read an ``.images.npz`` file.

        Raises:
            DataError: it is damaged; the message says what is wrong.
        """
        try:  # beside what is expected, all that numpy and zipfile are known to raise for bytes that were damaged
            with np.load(path, allow_pickle=False) as file:
                held = {name: file[name] for name in file.files}
        except (OSError, ValueError, EOFError, KeyError, AttributeError, NotImplementedError, MemoryError) as error:
            raise _damaged(path, f"{type(error).__name__}: {error}") from error
        except (zipfile.BadZipFile, zlib.error, TypeError) as error:  # TypeError: a bare array under that name
            raise _damaged(path, str(error)) from error
        missing = [name for name in (*_ALWAYS, "classes") if name not in held]
        if missing:
            raise _damaged(path, f"it holds no {', '.join(missing)}")
        count = len(held["digest"]) if held["digest"].ndim == 1 else 0
        for name, kind in {**_ALWAYS, **_STEERED}.items():
            array = held.get(name)
            if array is None:
                continue
            if array.shape != (count,) or array.dtype.kind != kind or count == 0:
                raise _damaged(path, f"{name} is {array.dtype} of shape {list(array.shape)} for {count} images")
            if kind == "f" and not np.isfinite(array).all():
                raise _damaged(path, f"{name} holds values that are no finite numbers")
        classes = held["classes"]
        if classes.ndim != 1 or classes.dtype.kind != "U":
            raise _damaged(path, f"classes is {classes.dtype} of shape {list(classes.shape)}; expected a list of names")
        both = [name for name in ("plain_prediction", "plain_confidence") if name in held]
        if len(both) == 1:
            raise _damaged(path, f"of the plain model it holds {both[0]} only")
        for name in ("target", "prediction", *both[:1]):
            if held[name].min() < 0 or held[name].max() >= (len(classes) or np.inf):
                raise _damaged(path, f"{name} names a class outside the {len(classes)} classes")
        for name in ("confidence", *both[1:]):
            if held[name].min() < 0 or held[name].max() > 1 + 1e-3:
                raise _damaged(path, f"{name} lies outside 0 to 1")
        scalars = {name: _scalar(path, name, held) for name in ("seconds", "peak_memory")}
        arrays = {name: held[name] for name in ("digest", "target", "prediction", "confidence")}
        plain = (held[both[0]], held[both[1]]) if both else None
        return cls(**arrays, classes=tuple(map(_text, classes)), fvu=held.get("fvu"), plain=plain, **scalars)


def _scalar(path: Path, name: str, held: dict[str, np.ndarray]) -> float | None:
    value = held.get(name)
    if value is None:
        return None
    if value.ndim != 0 or value.dtype.kind not in "iuf" or not np.isfinite(value) or value < 0:
        raise _damaged(path, f"{name} is {value.dtype} of shape {list(value.shape)}; expected one number")
    return float(value) or None  # 0: it could not be told


def _text(name: object) -> str:
    """A name in one line, without what neither a page nor a figure can show."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(name))


def _damaged(path: Path, problem: str) -> DataError:
    return DataError(
        f"{path}: damaged per-image results: {problem}; delete the file, or run the evaluation again with "
        "VS2_PER_IMAGE=1"
    )


@dataclass(frozen=True, eq=False)
class Run:
    """One result of clip_benchmark."""

    path: Path
    dataset: str
    model: str
    pretrained: str
    task: str
    language: str
    metrics: dict[str, Any] = field(repr=False)
    images: Images | None = field(default=None, repr=False)

    def number(self, name: str) -> float | None:
        """The metric of that name, if it is a finite number."""
        value = self.metrics.get(name)
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        return float(value) if good else None

    def fact(self, name: str) -> Any:
        """What a steered model said of itself under ``vs2_{name}``, or None."""
        return self.metrics.get(f"vs2_{name}")

    @property
    def method(self) -> str | None:
        """The steering method; None for a plain model."""
        return None if self.fact("method") is None else _text(self.fact("method"))

    @cached_property
    def plain(self) -> Run | None:
        """The zero-shot result that a steered run recorded beside its own. It knows no ranks, time or memory."""
        if self.method is None or self.images is None or self.images.plain is None:
            return None
        prediction, confidence = self.images.plain
        images = replace(
            self.images, prediction=prediction, confidence=confidence, fvu=None, plain=None, seconds=None,
            peak_memory=None,
        )  # fmt: skip
        metrics = {"acc1": float(images.correct.mean()), "mean_per_class_recall": images.recall}
        return replace(self, model=self.backbone, metrics=metrics, images=images)

    @property
    def seconds(self) -> float | None:
        """Wall clock of the run."""
        return self.number("vs2_seconds") or (self.images and self.images.seconds)

    @property
    def peak_memory(self) -> float | None:
        """Peak memory of the process (on a GPU, of the device) in bytes."""
        return self.number("vs2_peak_memory") or (self.images and self.images.peak_memory)

    def calibration(self, suffix: str = "") -> Calibration | None:
        """What the metrics say of the calibration, or with ``_before`` of zero-shot's; None if they do not."""
        ece, bins = self.number(f"vs2_ece{suffix}"), self.metrics.get(f"vs2_ece{suffix}_bins")
        try:
            return None if ece is None else calibration_of_bins(bins, ece)
        except (TypeError, ValueError):
            return None

    @property
    def labels(self) -> str:
        """The labels used: ``none``, ``train`` or ``oracle``; of a steered model that does not say, ``?``."""
        return "none" if self.method is None else _text(self.metrics.get("vs2_labels", "?"))

    @property
    def segments(self) -> list[str]:
        """The backbone, and what follows it behind an ``@`` each.

        >>> Run(Path(), "d", "vs2:hf-hub:a/b@sae@gate=0.9", "", "t", "en", {"vs2_method": "vs2"}).segments
        ['hf-hub:a/b', 'sae', 'gate=0.9']
        """
        if self.method is None:
            return [self.model]
        parts = split(self.model)
        return [parts.backbone, *parts.words]

    @property
    def backbone(self) -> str:
        """The open_clip model inside."""
        return self.segments[0]

    @property
    def given(self) -> dict[str, str]:
        """The options that the model string gives."""
        return dict(segment.split("=", 1) for segment in self.segments[1:] if "=" in segment)

    def setting(self, name: str) -> Any:
        """The value of an option, given or default.

        A word in the model string goes before what the results say: their ``vs2_labels`` are the labels that were
        read, whereas ``@labels=pseudo`` reads none.
        """
        fact = self.fact(name)
        return fact if isinstance(fact, (int, float)) else self.given.get(name, fact)


def read(paths: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """The results in files and folders, each once, and why other JSON files found in folders were passed over.

    Raises:
        DataError: a file that was named is missing or no result, per-image results are damaged, or nothing was found.
    """
    found: dict[Path, Run] = {}
    passed_over: list[str] = []
    for path in paths:
        if not path.is_dir():
            found.setdefault(path.resolve(), _read(path))
            continue
        for file in sorted(path.rglob("*.json")):
            try:
                content = _json(file)
            except DataError as error:
                passed_over.append(str(error))
            else:
                found.setdefault(file.resolve(), _run(file, content))
    if not found:
        raise DataError(
            "no results found" + (f" ({passed_over[0]})" if passed_over else "") + f"; expected {EXPECTED}; "
            "make some with: clip_benchmark eval"
        )
    return list(found.values()), passed_over


def _read(path: Path) -> Run:
    return _run(path, _json(path))


def _json(path: Path) -> dict[str, Any]:
    """The content of a results file; of any other, DataError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); expected {EXPECTED}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON ({error}); expected {EXPECTED}") from error
    fits = isinstance(content, dict) and isinstance(content.get("metrics"), dict)
    if not fits or not all(isinstance(content.get(key), str) for key in ("dataset", "model", "task")):
        raise DataError(f"{path} is not {EXPECTED}")
    return content


def _run(path: Path, content: dict[str, Any]) -> Run:
    language = content.get("language") or "en"
    languages = [language] if isinstance(language, str) else language
    beside = path.with_suffix(".images.npz")
    run = Run(
        path,
        _text(content["dataset"]),
        _text(content["model"]),
        _text(content.get("pretrained") or ""),
        _text(content["task"]),
        "+".join(map(_text, languages)) if isinstance(languages, list) else "en",
        content["metrics"],
        Images.load(beside) if beside.is_file() else None,
    )
    acc1 = run.number("acc1")
    if acc1 is not None and not 0 <= acc1 <= 1:
        raise DataError(f"{path}: acc1 is {acc1:g}; expected a share from 0 to 1")
    if acc1 is not None and run.images is not None and abs(run.images.correct.mean() - acc1) > _TIES:
        raise DataError(
            f"{beside} is not of the run of {path.name}: its predictions are right for "
            f"{run.images.correct.mean():.2%} of the images, the results say {acc1:.2%}; run the evaluation again with "
            "VS2_PER_IMAGE=1"
        )
    return run
