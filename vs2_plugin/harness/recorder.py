"""Per-image results of zero-shot classification, on request: ``VS2_PER_IMAGE=1 clip_benchmark eval …``.

The metrics in ``X.json`` then also hold, for plain models too, ``vs2_seconds``, ``vs2_peak_memory``, the expected
calibration error ``vs2_ece`` and its bins ``vs2_ece_bins``: ``[images, mean confidence, accuracy]`` of each bin that
holds images, of 15 equal ones by rising confidence. ``clip_benchmark build`` writes this list into the CSV as JSON.

A steered model then encodes every image unsteered too, so that its results show the effect of steering: ``vs2_mended``,
the number of images that steering corrects, ``vs2_broken``, the number that it makes wrong, and the calibration of the
plain model, ``vs2_ece_before`` and ``vs2_ece_before_bins``. The time for this is not part of ``vs2_seconds``.

Beside ``X.json`` lies ``X.images.npz``, whose columns :class:`vs2_plugin.results.images.Images` declares.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vs2_plugin.arrays import spread
from vs2_plugin.data.images import image_digest
from vs2_plugin.model.predictions import best_first
from vs2_plugin.results.images import Images, images_file
from vs2_plugin.results.statistics import calibration

__all__ = ["Recorder"]


class Recorder:
    """Records the per-image results of one run."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._aside = 0.0
        self._images: Images | None = None
        self._digests: list[int] = []
        self._plain: list[tuple[Tensor, Tensor]] = []
        self._data: Any = None
        self.classes: Sequence[str] | None = None
        _reset_peak()

    def see_data(self, dataset: Any) -> None:
        """Take the data set that is evaluated, the first one; later ones (a linear probe's) are ignored."""
        self._data = dataset if self._data is None else self._data

    def watch(self, dataloader: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of ``dataloader``, and record the digests of their images."""
        self._digests, self._plain = [], []
        for images, target in dataloader:
            self._digests += [image_digest(image) for image in images]
            yield images, target

    def see_plain(self, classifier: Tensor, embedding: Callable[[], Tensor]) -> None:
        """Record the plain model's predictions for a batch: ``embedding()`` ``[batch, e]`` times ``classifier``
        ``[e, classes]`` as in clip_benchmark's ``run_classification``, under whose autocast this is called."""
        with self._unmeasured():
            logits = (100.0 * F.normalize(embedding(), dim=-1) @ classifier).float().cpu()
            self._plain.append((best_first(logits)[:, 0], logits.softmax(1).amax(1)))

    @contextmanager
    def _unmeasured(self) -> Iterator[None]:
        """Exclude the time of the block from the run's time."""
        _wait()
        started = time.monotonic()
        try:
            yield
        finally:
            _wait()
            self._aside += time.monotonic() - started

    def finish(self, logits: Tensor, target: Tensor, facts: dict[str, Tensor]) -> None:
        """Record the logits ``[count, classes]`` and targets ``[count]`` of the run, and ``facts``, further columns of
        :class:`Images`."""
        if target.ndim != 1:  # several labels per image
            return
        probability = logits.float().softmax(1)
        index = target.long()[:, None]
        preferred = (logits > logits.gather(1, index)).sum(1)
        # Under autocast, logits may be equal; among the first five, the order is that of clip_benchmark's own top-5.
        first = best_first(logits)
        hit = first == index
        columns = {
            "target": target,
            "prediction": first[:, 0],
            "rank": torch.where(hit.any(1), hit.int().argmax(1), preferred.clamp_min(first.shape[1])),
            "confidence": probability.amax(1),
            "target_probability": probability.gather(1, index)[:, 0],
            **facts,
        }
        if self._plain:
            predictions, confidences = zip(*self._plain, strict=True)
            columns |= {"plain_prediction": torch.cat(predictions), "plain_confidence": torch.cat(confidences)}
        arrays: dict[str, Any] = {name: values.numpy() for name, values in columns.items()}
        digests = np.array(self._digests, dtype=np.uint64)
        self._images = Images(digest=digests, paths=_paths(self._data, digests), **arrays)

    def facts(self) -> dict[str, Any]:
        """Return metrics: seconds so far, peak memory, calibration and, for a steered model, the effect of steering."""
        metrics = {"seconds": round(self._seconds(), 3), "peak_memory": _peak()}
        if self._images is not None:
            metrics |= _calibration("ece", self._images)
            plain, moved = self._images.plain, self._images.moved
            if plain is not None and moved is not None:
                metrics |= {"mended": moved[0], "broken": moved[1]}
                metrics |= _calibration("ece_before", plain)
        return {f"vs2_{name}": value for name, value in metrics.items()}

    def _seconds(self) -> float:
        return time.monotonic() - self._started - self._aside

    def save(self, output: str) -> None:
        """Write the per-image results beside ``output``; nothing if there was no classification."""
        if self._images is not None:
            classes = tuple(str(name) for name in self.classes or ())
            images = replace(self._images, classes=classes, seconds=self._seconds(), peak_memory=_peak())
            images.write(images_file(Path(output)))


def _paths(dataset: Any, digests: np.ndarray) -> Sequence[str]:
    """Return the paths of the images ``[count]``; none if the images are no files, or were read in another order."""
    paths: Sequence[str] = getattr(dataset, "paths", ())
    if len(paths) != len(digests):
        return ()
    compared = spread(len(digests), 5).tolist()
    same = all(image_digest(dataset[index][0]) == int(digests[index]) for index in compared)
    return paths if same else ()


def _calibration(name: str, images: Images) -> dict[str, Any]:
    """Return the expected calibration error, and those of its bins that hold images."""
    curve = calibration(images.confidence, images.correct)
    columns = curve.share * len(images.correct), curve.confidence, curve.accuracy
    rows = zip(*(column.tolist() for column in columns), strict=True)
    bins = [[round(count), round(mean, 6), round(accuracy, 6)] for count, mean, accuracy in rows if count]
    return {name: curve.ece, f"{name}_bins": bins}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: reset the peak


def _peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        try:
            import resource
        except ImportError:  # Windows
            return 0
        # Of the whole process so far: kilobytes, on macOS bytes.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
