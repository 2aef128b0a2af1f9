"""Predictions of a steered model: the probabilities of named classes for images, with steering and without it."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vs2_plugin.data.folders import open_files
from vs2_plugin.data.given import Prepare
from vs2_plugin.documented import documented
from vs2_plugin.errors import DataError, SettingError
from vs2_plugin.host import zero_shot_classification
from vs2_plugin.model.classifier import Classifier
from vs2_plugin.model.readout import Read, Readout
from vs2_plugin.settings import is_count
from vs2_plugin.text import counted

__all__ = ["Images", "OneImage", "Predictions", "best_first", "one_image", "predict", "require_numbers"]

#: Images to classify: a picture, a file, a folder, a list of pictures or files, or preprocessed images
#: ``[batch, 3, h, w]``.
Images = Image.Image | str | Path | Sequence[Image.Image | str | Path | Tensor | np.ndarray] | Tensor | np.ndarray
#: One image to classify or explain.
OneImage = Image.Image | str | Path | Tensor | np.ndarray
_EXPECTED = "expected a PIL image, a path, a list of these, or preprocessed images [batch, 3, height, width]"
#: Images that a repr shows.
_SHOWN = 10


@documented
@dataclass(frozen=True, eq=False, repr=False)
class Predictions:
    """Predictions of a model for some images. All tensors are on the CPU.

    >>> result = Predictions(("cat", "dog"), torch.tensor([[3.0, 1]]), torch.tensor([[1.0, 2]]),
    ...                      torch.tensor([0.25]), torch.tensor([True]), ("a.jpg",))
    >>> result.names, result.changed.tolist(), result.top(1)
    (['cat'], [True], [[('cat', 0.8807970285415649)]])
    >>> result
    1 image, 2 classes; steering changed 1
      a.jpg: cat 88.1 %, without steering dog 73.1 %; FVU 0.250
    """

    classes: tuple[str, ...]
    """Names of the classes, in the order of the columns of ``logits``."""
    logits: Tensor
    """Logits, 100 times the cosines unless a method on logits gives them: float32 ``[images, classes]``."""
    plain_logits: Tensor
    """Logits of the model without steering, bit for bit: float32 ``[images, classes]``."""
    fvu: Tensor
    """FVU, the share of variance that the SAE leaves unexplained: float32 ``[images]``; NaN without an SAE."""
    steered: Tensor
    """Whether the gate let the image be steered: bool ``[images]``."""
    images: tuple[str, ...] = ()
    """Names of the images: their paths, or numbers."""

    def __len__(self) -> int:
        return len(self.logits)

    @property
    def probabilities(self) -> Tensor:
        """The probabilities with steering: float32 ``[images, classes]``."""
        return self.logits.softmax(1)

    @property
    def plain(self) -> Tensor:
        """The probabilities without steering: float32 ``[images, classes]``."""
        return self.plain_logits.softmax(1)

    @property
    def labels(self) -> Tensor:
        """Index of each image's best class with steering: int64 ``[images]``."""
        return best_first(self.logits)[:, 0]

    @property
    def plain_labels(self) -> Tensor:
        """Index of each image's best class without steering: int64 ``[images]``."""
        return best_first(self.plain_logits)[:, 0]

    @property
    def names(self) -> list[str]:
        """Name of each image's best class with steering."""
        return [self.classes[label] for label in self.labels.tolist()]

    @property
    def changed(self) -> Tensor:
        """Whether steering changed the best class: bool ``[images]``."""
        return self.labels != self.plain_labels

    def top(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """Return each image's ``k`` best classes with their probabilities, best first. Raises SettingError if k < 1."""
        if not is_count(k):
            raise SettingError(f"k is {k!r:.80}; expected a number of classes, at least 1")
        order = best_first(self.logits, max(k, 5))[:, :k]
        chances = self.probabilities.gather(1, order)
        return [
            [(self.classes[label], chance) for label, chance in zip(*pair, strict=True)]
            for pair in zip(order.tolist(), chances.tolist(), strict=True)
        ]

    def rows(self) -> list[dict[str, Any]]:
        """Return one mapping per image, for a table: ``pandas.DataFrame(predictions.rows())``."""
        plain_chances = self.plain.gather(1, self.plain_labels[:, None])[:, 0]
        columns = {
            "image": self.images or tuple(map(str, range(len(self)))),
            "class": self.names,
            "probability": [best[0][1] for best in self.top(1)],
            "plain_class": [self.classes[label] for label in self.plain_labels.tolist()],
            "plain_probability": plain_chances.tolist(),
            "changed": self.changed.tolist(),
            "fvu": self.fvu.tolist(),
            "steered": self.steered.tolist(),
        }
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def __repr__(self) -> str:
        changed = int(self.changed.sum())
        head = f"{counted(len(self), 'image')}, {len(self.classes)} classes; steering changed {changed:,}"
        lines = [f"  {_line(row)}" for row in self.rows()[:_SHOWN]]
        more = [f"  and {len(self) - _SHOWN:,} more: see rows()"] if len(self) > _SHOWN else []
        return "\n".join([head, *lines, *more])


def _line(row: dict[str, Any]) -> str:
    chance, plain = (f"{100 * row[name]:.1f} %" for name in ("probability", "plain_probability"))
    before = f"without steering {row['plain_class']} {plain}" if row["changed"] else f"without {plain}"
    fvu = "" if row["fvu"] != row["fvu"] else f"; FVU {row['fvu']:.3f}"  # NaN
    return f"{row['image']}: {row['class']} {chance}, {before}{fvu}{'' if row['steered'] else ', not steered'}"


def best_first(logits: Tensor, count: int = 5) -> Tensor:
    """Return the classes of the largest logits, best first: int64 ``[images, count]``, or as many as there are.

    Under autocast, logits may be equal. The order of the first five is that of clip_benchmark's own top-5."""
    return logits.topk(min(count, logits.shape[1]), dim=1).indices


class _Steered(Protocol):
    """A model that also gives each batch's embeddings without steering, such as ``SteeredCLIP``."""

    @property
    def readout(self) -> Readout | None: ...
    def reset_statistics(self) -> None: ...
    def record_images(self, recording: bool, show: Callable[[Callable[[], Tensor]], None] | None = None) -> None: ...
    def per_image(self) -> dict[str, Tensor]: ...
    def require_finite(self) -> None: ...


def predict(
    model: _Steered, classifier: Classifier, images: Images, transform: Callable[[Any], Tensor], batch_size: int
) -> Predictions:
    """Classify images by clip_benchmark's own function, so that logits equal those of its evaluation, bit for bit.

    Raises:
        DataError: an object or a file that is no image, or an image without logits.
        SettingError: ``batch_size`` is no whole number, or below 1.
    """
    weights, plain = classifier.weights, []
    pictures = _pictures(images, transform)
    if not is_count(batch_size):
        raise SettingError(f"batch_size is {batch_size!r:.80}; expected a whole number, at least 1")

    def see(embedding: Callable[[], Tensor]) -> None:  # inside run_classification's autocast, by its own formula
        plain.append((100.0 * F.normalize(embedding(), dim=-1) @ weights).float().cpu())

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(pictures), batch_size):
            batch = _batch(pictures[start : start + batch_size], transform, start)
            yield batch.to(weights.device), torch.zeros(len(batch))

    model.reset_statistics()
    model.record_images(True, see)
    try:
        with zero_shot_classification() as harness:
            classify = inspect.unwrap(harness.run_classification)
            readout = model.readout
            reader = model if readout is None else Read(model, readout)
            logits, _ = classify(reader, weights, batches(), str(weights.device), amp=classifier.amp)
            logits = logits if readout is None else readout.replace(logits)
        facts = model.per_image()
    finally:
        model.record_images(False)
    count, plain_logits = len(logits), torch.cat(plain)
    model.require_finite()  # before the pixels are blamed
    require_numbers(logits, plain_logits)
    return Predictions(
        classes=classifier.names,
        logits=logits,
        plain_logits=plain_logits,
        fvu=facts.get("fvu", torch.full((count,), float("nan"))),
        steered=facts.get("steered", torch.ones(count, dtype=torch.bool)),
        images=tuple(str(image) if isinstance(image, (str, Path)) else str(n) for n, image in enumerate(pictures)),
    )


def require_numbers(*logits: Tensor) -> None:
    """Raise DataError, which names the image, for logits ``[images, classes]`` that are NaN: they tell no class."""
    for values in logits:
        wrong = values.isnan().any(1)
        if wrong.any():
            raise DataError(
                f"image number {int(wrong.int().argmax())} has logits that are NaN, since its pixels, or the model's "
                "weights, are too large to compute with; expected pixels as the model's transform makes them"
            )


def one_image(image: OneImage, transform: Callable[[Any], Tensor]) -> Tensor:
    """Return one image, preprocessed: ``[1, 3, height, width]``.

    Raises:
        DataError: no image, or several.
    """
    pictures = _pictures(image, transform)
    if len(pictures) != 1:
        raise DataError(f"{len(pictures)} images; expected one")
    return _batch(pictures, transform)


def _pictures(images: Any, transform: Callable[[Any], Tensor]) -> Sequence[Any]:
    """Return images as a sequence: a list of pictures or paths, or a tensor ``[batch, 3, height, width]``."""
    if isinstance(images, (str, Path)) and os.path.isdir(images):
        return open_files([images]).paths
    if isinstance(images, (Image.Image, str, Path)):
        return [images]
    if isinstance(images, np.ndarray) and images.dtype == np.uint8:  # pixels of one picture or several
        images = list(images) if images.ndim == 4 else [images]
    if isinstance(images, (Tensor, np.ndarray)):
        batch = images[None] if images.ndim == 3 else images
        height, width = transform(Image.new("RGB", (8, 8))).shape[1:]
        if batch.shape[1:] != (3, height, width) or not _has_floats(batch):
            raise DataError(
                f"images of shape {tuple(images.shape)} and type {images.dtype}; expected floats "
                f"[images, 3, {height}, {width}], as the model's transform makes them, or PIL images or paths in a list"
            )
        pictures: Sequence[Any] = batch  # type: ignore[assignment]  # a sequence of tensors or arrays
    elif isinstance(images, Iterable):
        pictures = list(images)
    else:
        raise DataError(f"{type(images).__name__} is not an image; {_EXPECTED}")
    if len(pictures) == 0:
        raise DataError(f"no images; {_EXPECTED}")
    return pictures


def _batch(pictures: Sequence[Any], transform: Callable[[Any], Tensor], first: int = 0) -> Tensor:
    """Return preprocessed images ``[batch, 3, height, width]``; ``first`` is the first one's number, for errors."""
    if isinstance(pictures, Tensor):
        batch = pictures.float()
    elif isinstance(pictures, np.ndarray):  # torch has neither its negative strides, nor all of its types
        batch = torch.from_numpy(np.ascontiguousarray(pictures, np.float32))
    else:
        prepare = Prepare(transform)
        batch = torch.stack([prepare.image(number, item) for number, item in enumerate(pictures, first)])
    if not batch.sum().isfinite():  # a finite sum shows that all are finite, in a twentieth of the time
        wrong = ~batch.flatten(1).isfinite().all(1)
        if wrong.any():
            raise DataError(f"image number {first + int(wrong.int().argmax())} holds NaN or infinity; {_EXPECTED}")
    return batch


def _has_floats(values: Tensor | np.ndarray) -> bool:
    return values.is_floating_point() if isinstance(values, Tensor) else values.dtype.kind == "f"
