"""Per-image results of zero-shot classification, on request: ``VS2_PER_IMAGE=1 clip_benchmark eval …``.

The metrics in ``X.json`` then hold ``vs2_ece`` (expected calibration error, 15 bins), ``vs2_seconds`` and
``vs2_peak_memory`` too, of plain models as well. Beside it lies ``X.images.npz``: arrays with one entry per image, in
the order of the run.

    digest               uint64   of the preprocessed image: the same in every run, whereas the order is not
    target, prediction   int32    class numbers
    rank                 int32    how many classes the model prefers to the target
    confidence           float32  probability of the prediction (softmax at the logit scale of 100)
    target_probability   float32  probability of the target
    fvu                  float32  steered models: share of variance that the SAE does not explain (last site)
    steered              bool     steered models: whether the gate let the image through (last site)

and, of the run as a whole, ``classes`` (their names), ``seconds`` (wall clock, loading included) and ``peak_memory``
(bytes: the process's resident set, or what torch allocated on the CUDA device; 0 where it cannot be told).
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vs2_plugin.data.images import image_digest
from vs2_plugin.report.statistics import calibration

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
        self._arrays: dict[str, np.ndarray] = {}
        self._digests: list[int] = []
        self.classes: Sequence[str] | None = None
        _reset_peak()

    def watch(self, dataloader) -> Iterator:
        """The batches of ``dataloader``, with the digests of their images taken."""
        self._digests = []
        for images, target in dataloader:
            self._digests += [image_digest(image) for image in images]
            yield images, target

    def finish(self, logits: Tensor, target: Tensor, facts: dict[str, Tensor]) -> None:
        """Take logits ``[count, classes]`` and targets ``[count]``, and what else is known of each image."""
        if target.ndim != 1:  # several labels per image
            return
        probability = logits.float().softmax(1)
        best = probability.max(1)
        target = target.long()
        preferred = (logits > logits.gather(1, target[:, None])).sum(1)
        # Autocast makes equal logits. Among the first five, the order is that of clip_benchmark's own top-5.
        first = logits.topk(min(5, logits.shape[1]), dim=1).indices
        found = first == target[:, None]
        rank = torch.where(found.any(1), found.int().argmax(1), preferred.clamp_min(first.shape[1]))
        self._arrays = {
            "digest": np.array(self._digests, dtype=np.uint64),
            "target": target.numpy().astype(np.int32),
            "prediction": first[:, 0].numpy().astype(np.int32),
            "rank": rank.numpy().astype(np.int32),
            "confidence": best.values.numpy(),
            "target_probability": probability.gather(1, target[:, None])[:, 0].numpy(),
            **{name: values.numpy() for name, values in facts.items()},
        }

    def facts(self) -> dict[str, float | int]:
        """For the metrics: expected calibration error, seconds so far, and peak memory."""
        known = {"seconds": round(time.monotonic() - self._started, 3), "peak_memory": _peak()}
        if self._arrays:
            correct = self._arrays["prediction"] == self._arrays["target"]
            known["ece"] = calibration(self._arrays["confidence"], correct).ece
        return {f"vs2_{name}": value for name, value in known.items()}

    def save(self, output: str) -> None:
        """Write the file that belongs to ``output``, whole or not at all. Nothing if there was no classification."""
        if not self._arrays:
            return
        arrays = {
            **self._arrays,
            "classes": np.array([str(name) for name in self.classes or []], dtype=np.str_),
            "seconds": np.float64(time.monotonic() - self._started),
            "peak_memory": np.int64(_peak()),
        }
        path = images_file(output)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".npz", delete=False) as file:
            np.savez_compressed(file, **arrays)
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)


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
