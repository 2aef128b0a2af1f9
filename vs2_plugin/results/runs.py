"""Reads and writes clip_benchmark's results files, and writes the table of several."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from vs2_plugin.errors import DataError
from vs2_plugin.files import atomic_file, json_digest
from vs2_plugin.names import Parts, split
from vs2_plugin.results.images import Images, images_file
from vs2_plugin.results.statistics import Calibration, calibration_of_bins
from vs2_plugin.text import printable

__all__ = ["DIGEST", "Run", "digest_of", "forget_images", "read", "read_run", "sign", "write_run", "write_table"]

#: The metric that holds the digest, which shows whether the results were changed after they were written.
DIGEST = "vs2_results_digest"
_CONTENT = ("dataset", "model", "pretrained", "task", "metrics", "language")

EXPECTED = 'a results file of clip_benchmark: a JSON object with "dataset", "model", "task" and "metrics"'
#: The harness breaks ties between classes in its own way, so its accuracy may differ from the predictions' by this.
_TIES = 0.02


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
    """The per-image results beside the file; None where :func:`read` found none."""
    changed: bool = field(default=False, repr=False)
    """Whether the file was changed after it was written: its digest does not fit its content."""

    def number(self, name: str) -> float | None:
        """Return the metric of that name, if it is a finite number."""
        value = self.metrics.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return None
        return float(value)

    def fact(self, name: str) -> Any:
        """Return the metric ``vs2_{name}``, by which a steered model describes itself; None if there is none."""
        return self.metrics.get(f"vs2_{name}")

    @property
    def headline(self) -> float | None:
        """Top-1 accuracy or, for images with several labels, mean average precision, as a share."""
        accuracy = self.number("acc1")
        return self.number("mean_average_precision") if accuracy is None else accuracy

    @property
    def measure(self) -> str:
        """What :attr:`headline` is."""
        return "mean average precision" if self.number("acc1") is None else "top-1 accuracy"

    @property
    def method(self) -> str | None:
        """The steering method; None for a plain model."""
        return None if self.fact("method") is None else printable(self.fact("method"))

    @cached_property
    def plain(self) -> Run | None:
        """The zero-shot result that a steered run recorded (no top-5 accuracy, time or memory); None if it did not."""
        images = self.images.plain if self.images and self.method is not None else None
        if images is None:
            return None
        metrics = {"acc1": images.accuracy, "mean_per_class_recall": images.recall}
        return replace(self, model=self.parts.backbone, metrics=metrics, images=images)

    @property
    def seconds(self) -> float | None:
        """Wall clock of the run, in seconds."""
        return self.number("vs2_seconds") or (self.images.seconds if self.images else None)

    @property
    def peak_memory(self) -> float | None:
        """Peak memory of the process (on a GPU, of the device) in bytes."""
        return self.number("vs2_peak_memory") or (self.images.peak_memory if self.images else None)

    def calibration(self, suffix: str = "") -> Calibration | None:
        """Return the calibration from the metrics, or zero-shot's with suffix ``_before``; None if they hold none."""
        ece = self.number(f"vs2_ece{suffix}")
        try:
            return None if ece is None else calibration_of_bins(self.metrics[f"vs2_ece{suffix}_bins"], ece)
        except (KeyError, TypeError, ValueError):
            return None

    @property
    def labels(self) -> str:
        """The labels used: ``none``, ``train`` or ``oracle``; ``?`` for a steered model whose results do not say."""
        return "none" if self.method is None else printable(self.metrics.get("vs2_labels", "?"))

    @property
    def protocol(self) -> str:
        """The other images that the model saw: ``image`` (none), ``unlabeled``, ``stream`` or ``transductive``. Older
        results do not say: with a checkpoint, which is trained on unlabeled images, they count as ``unlabeled``."""
        protocol = self.fact("protocol")
        if protocol is not None:
            return printable(protocol)
        return "image" if self.fact("checkpoint") is None else "unlabeled"

    @property
    def kind(self) -> str:
        """The kind of results to compare this one with: the labels used or, where none were used, the protocol. Empty
        for a plain model."""
        if self.method is None:
            return ""
        return self.protocol if self.labels == "none" else self.labels

    @cached_property
    def parts(self) -> Parts:
        """The parts of the model's name; for a plain model, the backbone alone.

        >>> Run(Path(), "d", "vs2:hf-hub:a/b@sae@gate=0.9", "", "t", "en", {"vs2_method": "vs2"}).parts.words
        ('sae', 'gate=0.9')
        """
        return Parts(None, self.model) if self.method is None else split(self.model)

    def setting(self, name: str) -> Any:
        """Return the value of an option, given or default.

        A word in the model string takes precedence over the metric: ``vs2_labels`` holds the labels that were read,
        whereas ``@labels=pseudo`` reads none.
        """
        fact = self.fact(name)
        return fact if isinstance(fact, (int, float)) else self.parts.given.get(name, fact)


def read(paths: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """Read the results in files and folders, each once, with the per-image results beside them.

    Returns:
        The results, and the reasons why other JSON files in the folders were skipped. Of a result that is there
        several times, such as in a copy of a folder, one file is taken.

    Raises:
        DataError: a file that was named is missing, no results file, or has damaged per-image results; or no results
            were found.
    """
    runs: dict[Path, Run] = {}
    passed_over: list[str] = []
    for path in paths:
        for file in sorted(path.rglob("*.json")) if path.is_dir() else [path]:
            try:
                run = _with_images(read_run(file) if file is path else _read_found(file))
            except DataError as error:
                if file is path:
                    raise
                passed_over.append(str(error))
            else:
                runs.setdefault(file.resolve(), run)
    runs, copies = _without_copies(runs)
    passed_over += copies
    if not runs:
        raise DataError(
            "no results found" + (f" ({passed_over[0]})" if passed_over else "") + f"; expected {EXPECTED}; "
            "make some with: clip_benchmark eval"
        )
    return list(runs.values()), passed_over


def _read_found(file: Path) -> Run:
    """Read a results file found in a folder, where a name may be that of a pipe, for which reading would wait."""
    if file.exists() and not file.is_file():
        raise DataError(f"{file}: it is no file; expected {EXPECTED}")
    return read_run(file)


def _without_copies(runs: Mapping[Path, Run]) -> tuple[dict[Path, Run], list[str]]:
    """Return the runs without copies of another one, and words on each that is left out: runs of the same digest, of
    which one with per-image results is taken, else the one in the outermost folder; and without a digest, which plain
    models' results lack, those of equal content in the same folder."""
    kept: dict[Any, tuple[Path, Run]] = {}
    copies = []
    order = sorted(runs.items(), key=lambda item: (item[1].images is None, len(item[0].parts)))
    for file, run in order:
        key: Any = None if run.changed else run.metrics.get(DIGEST)
        if key is None and run.method is None:
            with suppress(RecursionError):  # deeply nested lists, which no run writes
                key = digest_of({name: getattr(run, name) for name in _CONTENT}), file.parent
        first = kept.setdefault(key or file, (file, run))[1]
        if first is not run:
            copies.append(f"{run.path}: it has the results of {first.path}")
    taken = {file for file, _ in kept.values()}
    return {file: run for file, run in runs.items() if file in taken}, copies


def read_run(path: Path) -> Run:
    """Read a results file, without per-image results.

    Raises:
        DataError: the file cannot be read, is no results file, or has an accuracy outside 0 to 1.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_int=_whole)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); expected {EXPECTED}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: it is not JSON ({error}); expected {EXPECTED}") from error
    fits = isinstance(content, dict) and isinstance(content.get("metrics"), dict)
    if not fits or not all(isinstance(content.get(key), str) for key in ("dataset", "model", "task")):
        raise DataError(f"{path} is not {EXPECTED}")
    accuracy = content["metrics"].get("acc1")
    is_number = isinstance(accuracy, (int, float)) and not isinstance(accuracy, bool)
    if accuracy is not None and not (is_number and 0 <= accuracy <= 1):
        raise DataError(f"{path}: acc1 is {printable(accuracy)}; expected a number, a share from 0 to 1")
    language = content.get("language") or "en"
    languages = [language] if isinstance(language, str) else language
    return Run(
        path,
        printable(content["dataset"]),
        printable(content["model"]),
        printable(content.get("pretrained") or ""),
        printable(content["task"]),
        "+".join(map(printable, languages)) if isinstance(languages, list) else "en",
        content["metrics"],
        changed=_is_changed(content),
    )


def _is_changed(content: Mapping[str, Any]) -> bool:
    try:
        return DIGEST in content["metrics"] and content["metrics"][DIGEST] != digest_of(content)
    except RecursionError:  # deeply nested lists, which no run writes
        return True


def _whole(digits: str) -> float:
    """Return a whole number, or for over 300 digits a float, which is infinite if too large: no valid metric."""
    return int(digits) if len(digits) <= 300 else float(digits)


def _with_images(run: Run) -> Run:
    """Return the run with the per-image results beside its file, if any. Raises DataError where they do not fit."""
    acc1, file = run.number("acc1"), images_file(run.path)
    if not file.is_file():
        return run
    images = Images.read(file)
    if acc1 is not None and abs(images.accuracy - acc1) > _TIES:
        raise DataError(
            f"{file} does not belong to the run of {run.path.name}: its predictions are right for "
            f"{images.accuracy:.2%} of the images, the results say {acc1:.2%}; run the evaluation again with "
            "VS2_PER_IMAGE=1"
        )
    told, moved = (run.number("vs2_mended"), run.number("vs2_broken")), images.moved
    if moved is not None and None not in told and moved != told:
        raise DataError(
            f"{file} does not belong to the run of {run.path.name}: in it {moved[0]} images are mended and {moved[1]} "
            f"broken, in the results {told[0]:.0f} and {told[1]:.0f}; run the evaluation again with VS2_PER_IMAGE=1"
        )
    return replace(run, images=images)


def digest_of(content: Mapping[str, Any]) -> str:
    """Return the digest of a results file's content, which steered and recorded runs store as a metric.

    It is the first 16 hexadecimal digits of a SHA-256 over the rest of the file. It shows later changes, but is no
    signature.
    """
    metrics = {name: value for name, value in content["metrics"].items() if name != DIGEST}
    whole = {**{name: content.get(name) for name in _CONTENT}, "metrics": metrics}
    return json_digest(whole)[:16]


def sign(path: Path, **facts: str) -> None:
    """Add facts and the digest to the metrics of a results file that was just written. If the file cannot be accessed,
    leave it as it is."""
    if not path.is_file():  # for example a terminal
        return
    with suppress(OSError):
        content = json.loads(path.read_text(encoding="utf-8"))
        content["metrics"] |= facts
        content["metrics"][DIGEST] = digest_of(content)
        with atomic_file(path.resolve()) as scratch:
            scratch.write_text(json.dumps(content), encoding="utf-8")


def write_run(run: Run) -> Run:
    """Write the results file of a run as clip_benchmark does, whole or not at all. Return the run as written."""
    content = {name: getattr(run, name) for name in _CONTENT}
    if run.method is not None:
        run = replace(run, metrics={**run.metrics, DIGEST: digest_of(content)})
    with atomic_file(run.path) as scratch:
        scratch.write_text(json.dumps({**content, "metrics": run.metrics}), encoding="utf-8")
    forget_images(run.path)
    return run


def forget_images(path: Path) -> None:
    """Remove per-image results beside a results file that was written without any: they are of an earlier run."""
    with suppress(OSError):
        images_file(path).unlink(missing_ok=True)


def write_table(path: Path, runs: Sequence[Run]) -> None:
    """Write a CSV with the columns of ``clip_benchmark build``, a row per run, whole or not at all."""
    names = ("dataset", "model", "pretrained", "task", "language")
    rows = [
        {name: getattr(run, name) for name in names}
        | {"model_fullname": f"{run.model} {run.pretrained}"}
        | run.metrics
        for run in runs
    ]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_file(path) as scratch, open(scratch, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
