"""Per-image results of zero-shot classification, on request: ``VS2_PER_IMAGE=1 clip_benchmark eval …``.

The metrics in ``X.json`` then hold more, of plain models as well: ``vs2_seconds``, ``vs2_peak_memory`` and the expected
calibration error ``vs2_ece`` with its bins, ``vs2_ece_bins``: ``[images, mean confidence, accuracy]`` of each that has
images, of 15 equal ones by rising confidence. ``clip_benchmark build`` writes the list into the CSV as JSON.

A steered model then encodes every image unsteered too, so that its results say by themselves what steering did:
``vs2_mended`` images that were wrong and are right, ``vs2_broken`` that were right and are wrong, and the calibration
of zero-shot, ``vs2_ece_before`` and ``vs2_ece_before_bins``. The time that this takes is no part of ``vs2_seconds``.

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
    """Records one run."""

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
        """Take the data set that is evaluated; later ones (a linear probe's) are not it."""
        self._data = dataset if self._data is None else self._data

    def watch(self, dataloader: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of ``dataloader``, and take the digests of their images."""
        self._digests, self._plain = [], []
        for images, target in dataloader:
            self._digests += [image_digest(image) for image in images]
            yield images, target

    def see_plain(self, classifier: Tensor, embedding: Callable[[], Tensor]) -> None:
        """Take what the plain model makes of a batch: ``embedding()`` ``[batch, e]``, seen by ``classifier``
        ``[e, classes]`` as in clip_benchmark's ``run_classification``, under whose autocast this is called."""
        with self._unmeasured():
            logits = (100.0 * F.normalize(embedding(), dim=-1) @ classifier).float().cpu()
            self._plain.append((best_first(logits)[:, 0], logits.softmax(1).amax(1)))

    @contextmanager
    def _unmeasured(self) -> Iterator[None]:
        """Leave what is done in the block out of the run's time."""
        _wait()
        started = time.monotonic()
        try:
            yield
        finally:
            _wait()
            self._aside += time.monotonic() - started

    def finish(self, logits: Tensor, target: Tensor, facts: dict[str, Tensor]) -> None:
        """Take logits ``[count, classes]`` and targets ``[count]``, and what else is known of each image: columns of
        :class:`Images`."""
        if target.ndim != 1:  # several labels per image
            return
        probability = logits.float().softmax(1)
        index = target.long()[:, None]
        preferred = (logits > logits.gather(1, index)).sum(1)
        # Autocast makes equal logits. Among the first five, the order is that of clip_benchmark's own top-5.
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
        """Return metrics: seconds so far, peak memory, calibration and, of a steered model, what steering changed."""
        known = {"seconds": round(self._seconds(), 3), "peak_memory": _peak()}
        if self._images is not None:
            known |= _calibration("ece", self._images)
            plain = self._images.plain
            if plain is not None:
                was, right = plain.correct, self._images.correct
                known |= {"mended": int((~was & right).sum()), "broken": int((was & ~right).sum())}
                known |= _calibration("ece_before", plain)
        return {f"vs2_{name}": value for name, value in known.items()}

    def _seconds(self) -> float:
        return time.monotonic() - self._started - self._aside

    def save(self, output: str) -> None:
        """Write the file that belongs to ``output``. Nothing if there was no classification."""
        if self._images is not None:
            classes = tuple(str(name) for name in self.classes or ())
            images = replace(self._images, classes=classes, seconds=self._seconds(), peak_memory=_peak())
            images.write(images_file(Path(output)))


def _paths(dataset: Any, digests: np.ndarray) -> Sequence[str]:
    """Return the files of the images ``[count]``; none for what are no files, or came in another order than theirs."""
    paths: Sequence[str] = getattr(dataset, "paths", ())
    if len(paths) != len(digests):
        return ()
    looked_at = spread(len(digests), 5).tolist()
    same = all(image_digest(dataset[index][0]) == int(digests[index]) for index in looked_at)
    return paths if same else ()


def _calibration(name: str, images: Images) -> dict[str, Any]:
    """Return the expected calibration error, and its bins that hold images."""
    found = calibration(images.confidence, images.correct)
    columns = found.share * len(images.correct), found.confidence, found.accuracy
    rows = zip(*(column.tolist() for column in columns), strict=True)
    bins = [[round(count), round(mean, 6), round(accuracy, 6)] for count, mean, accuracy in rows if count]
    return {name: found.ece, f"{name}_bins": bins}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts anew


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
