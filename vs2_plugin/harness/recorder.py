"""Per-image results of zero-shot classification, on request: ``VS2_PER_IMAGE=1 clip_benchmark eval …``.

The metrics in ``X.json`` then hold more, of plain models as well: ``vs2_seconds``, ``vs2_peak_memory`` and the expected
calibration error ``vs2_ece`` with its bins, ``vs2_ece_bins``: ``[images, mean confidence, accuracy]`` of each that has
images, of 15 equal ones by rising confidence. ``clip_benchmark build`` writes the list into the CSV as JSON.

A steered model then encodes every image unsteered too, so that its results say by themselves what steering did:
``vs2_mended`` images that were wrong and are right, ``vs2_broken`` that were right and are wrong, and the calibration
of zero-shot, ``vs2_ece_before`` and ``vs2_ece_before_bins``. The time that this takes is no part of ``vs2_seconds``.

Beside ``X.json`` lies ``X.images.npz``: arrays with one entry per image, in the order of the run.

    digest               uint64   of the preprocessed image: the same in every run, whereas the order is not
    target, prediction   int32    class numbers
    rank                 int32    how many classes the model prefers to the target
    confidence           float32  probability of the prediction (softmax at the logit scale of 100)
    target_probability   float32  probability of the target
    fvu                  float32  steered models: share of variance that the SAE does not explain (last site)
    steered              bool     steered models: whether the gate let the image through (last site)
    plain_prediction     int32    steered models: what the plain model gives in the same batch, bit for bit
    plain_confidence     float32  steered models: probability of that prediction

and, of the run as a whole, ``classes`` (their names), ``seconds`` (wall clock, loading included, without the plain
model's part) and ``peak_memory`` (bytes: the process's resident set, or what torch allocated on the CUDA device; 0
where it cannot be told).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vs2_plugin.data.images import image_digest
from vs2_plugin.files import atomic_file
from vs2_plugin.results.statistics import calibration

__all__ = ["Recorder", "images_file"]


def images_file(output: str) -> Path:
    """Where the per-image results of a results file lie.

    >>> images_file("results/vs2.json").name
    'vs2.images.npz'
    """
    return Path(output).with_suffix("").with_name(Path(output).stem + ".images.npz")


class Recorder:
    """Records one run."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._aside = 0.0
        self._arrays: dict[str, np.ndarray] = {}
        self._digests: list[int] = []
        self._plain: list[tuple[Tensor, Tensor]] = []
        self.classes: Sequence[str] | None = None
        _reset_peak()

    def watch(self, dataloader) -> Iterator:
        """The batches of ``dataloader``, with the digests of their images taken."""
        self._digests, self._plain = [], []
        for images, target in dataloader:
            self._digests += [image_digest(image) for image in images]
            yield images, target

    def see_plain(self, classifier: Tensor, embedding: Callable[[], Tensor]) -> None:
        """Take what the plain model makes of a batch: ``embedding()`` ``[batch, e]``, seen by ``classifier``
        ``[e, classes]`` as in clip_benchmark's ``run_classification``, under whose autocast this is called."""
        with self._unmeasured():
            logits = 100.0 * F.normalize(embedding(), dim=-1) @ classifier
            self._plain.append(_decide(logits.float().cpu()))

    @contextmanager
    def _unmeasured(self) -> Iterator[None]:
        """What is done in the block is no part of the run's time."""
        _wait()
        started = time.monotonic()
        try:
            yield
        finally:
            _wait()
            self._aside += time.monotonic() - started

    def finish(self, logits: Tensor, target: Tensor, facts: dict[str, Tensor]) -> None:
        """Take logits ``[count, classes]`` and targets ``[count]``, and what else is known of each image."""
        if target.ndim != 1:  # several labels per image
            return
        probability = logits.float().softmax(1)
        target = target.long()
        preferred = (logits > logits.gather(1, target[:, None])).sum(1)
        # Autocast makes equal logits. Among the first five, the order is that of clip_benchmark's own top-5.
        first = _first(logits)
        found = first == target[:, None]
        rank = torch.where(found.any(1), found.int().argmax(1), preferred.clamp_min(first.shape[1]))
        self._arrays = {
            "digest": np.array(self._digests, dtype=np.uint64),
            "target": target.numpy().astype(np.int32),
            "prediction": first[:, 0].numpy().astype(np.int32),
            "rank": rank.numpy().astype(np.int32),
            "confidence": probability.amax(1).numpy(),
            "target_probability": probability.gather(1, target[:, None])[:, 0].numpy(),
            **{name: values.numpy() for name, values in facts.items()},
        }
        if self._plain:
            prediction, confidence = (torch.cat(parts).numpy() for parts in zip(*self._plain, strict=True))
            self._arrays |= {"plain_prediction": prediction.astype(np.int32), "plain_confidence": confidence}

    def facts(self) -> dict[str, Any]:
        """For the metrics: seconds so far, peak memory, calibration and, of a steered model, what steering changed."""
        known = {"seconds": round(self._seconds(), 3), "peak_memory": _peak()}
        if self._arrays:
            right = self._arrays["prediction"] == self._arrays["target"]
            known |= _calibration("ece", self._arrays["confidence"], right)
        if "plain_prediction" in self._arrays:
            was = self._arrays["plain_prediction"] == self._arrays["target"]
            known |= {"mended": int((~was & right).sum()), "broken": int((was & ~right).sum())}
            known |= _calibration("ece_before", self._arrays["plain_confidence"], was)
        return {f"vs2_{name}": value for name, value in known.items()}

    def _seconds(self) -> float:
        return time.monotonic() - self._started - self._aside

    def save(self, output: str) -> None:
        """Write the file that belongs to ``output``, whole or not at all. Nothing if there was no classification."""
        if not self._arrays:
            return
        arrays = {
            **self._arrays,
            "classes": np.array([str(name) for name in self.classes or []], dtype=np.str_),
            "seconds": np.float64(self._seconds()),
            "peak_memory": np.int64(_peak()),
        }
        with atomic_file(images_file(output)) as scratch, open(scratch, "wb") as file:
            np.savez_compressed(file, **arrays)


def _first(logits: Tensor) -> Tensor:
    """The classes preferred most, best first: int64 ``[count, 5]``, or as many as there are."""
    return logits.topk(min(5, logits.shape[1]), dim=1).indices


def _decide(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The class that each image is given, int64 ``[count]``, and its probability."""
    return _first(logits)[:, 0], logits.softmax(1).amax(1)


def _calibration(name: str, confidence: np.ndarray, correct: np.ndarray) -> dict[str, Any]:
    """The expected calibration error, and its bins that hold images."""
    found = calibration(confidence, correct)
    columns = found.share * len(correct), found.confidence, found.accuracy
    rows = zip(*(column.tolist() for column in columns), strict=True)
    bins = [[round(count), round(mean, 6), round(accuracy, 6)] for count, mean, accuracy in rows if count]
    return {name: found.ece, f"{name}_bins": bins}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts anew
    except OSError:
        pass


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
