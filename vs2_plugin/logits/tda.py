"""TDA: two small caches of the images that came before (arXiv 2403.18293)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["Stream"]

#: Numbers of images of each predicted class that the two caches keep.
_POSITIVE, _NEGATIVE = 3, 2
#: Images between these entropies are unsure: they count against classes. In nats over the binary logarithm of the
#: number of classes, as in the authors' code.
_UNSURE = (0.2, 0.5)
#: An unsure image counts against the classes above this probability, of which there are at most 33.
_POSSIBLE = 0.03


class _Cache:
    """The embeddings of the images of least entropy of each predicted class."""

    def __init__(self, classes: int, size: int, width: int, device: torch.device) -> None:
        self.keys = torch.zeros(classes, size, width, device=device)
        self._entropies = torch.full((classes, size), torch.inf, device=device)

    def add(self, x: Tensor, entropy: float, label: int) -> int | None:
        """Keep ``x`` ``[e]`` and return its place in its class, or None if all kept there have less entropy."""
        place = int(self._entropies[label].argmax())
        if not entropy < self._entropies[label, place]:
            return None
        self.keys[label, place], self._entropies[label, place] = x, entropy
        return place

    def near(self, x: Tensor, sharpness: float) -> Tensor:
        """Return ``exp(-b (1 - x . key))`` ``[classes, size]`` of the keys, and 0 for empty places."""
        return (-sharpness * (1 - self.keys @ x)).exp() * self._entropies.isfinite()


class Stream:
    """Maps the embeddings ``[1, e]`` of a stream, one after the other, to logits ``[1, classes]``:
    ``s + a Σ exp(-b (1 - x . key)) onehot - a' Σ exp(-b' (1 - x . key')) m'``, where m' marks the classes that an
    unsure image counts against."""

    def __init__(
        self, classifier: Tensor, positive: float, sharpness: float, negative: float, negative_sharpness: float
    ) -> None:
        """Start with empty caches.

        Args:
            classifier: t, ``[e, classes]``, of unit norm; ``s = 100 x . t``.
            positive: a.
            sharpness: b.
            negative: a'.
            negative_sharpness: b'.
        """
        self._classifier = classifier
        self._positive, self._negative = (positive, sharpness), (negative, negative_sharpness)
        width, classes = classifier.shape
        self._sure = _Cache(classes, _POSITIVE, width, classifier.device)
        self._unsure = _Cache(classes, _NEGATIVE, width, classifier.device)
        # The numbers of the classes that each unsure image counts against; unused places hold the number of classes.
        count = min(classes, int(1 / _POSSIBLE))
        self._possible = torch.full((classes, _NEGATIVE, count), classes, device=classifier.device)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the logits of one image, after adding it to the caches if its entropy is low enough."""
        image, logits = x[0], 100 * x[0] @ self._classifier
        shares = logits.softmax(0)
        entropy, label = float(torch.special.entr(shares).sum()), int(shares.argmax())
        self._sure.add(image, entropy, label)
        classes = len(shares)
        if _UNSURE[0] < entropy / math.log2(max(classes, 2)) < _UNSURE[1]:
            place = self._unsure.add(image, entropy, label)
            if place is not None:
                best = shares.topk(self._possible.shape[2])
                self._possible[label, place] = torch.where(best.values > _POSSIBLE, best.indices, classes)
        weight, sharpness = self._positive
        logits = logits + weight * self._sure.near(image, sharpness).sum(1)
        weight, sharpness = self._negative
        near = self._unsure.near(image, sharpness)[..., None].expand_as(self._possible)
        against = torch.zeros(classes + 1, device=x.device).index_add_(0, self._possible.flatten(), near.flatten())
        return (logits - weight * against[:classes])[None]
