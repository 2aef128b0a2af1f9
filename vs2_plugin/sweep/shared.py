"""What the points of a sweep have in common is computed once: codes, neighbours, sums over neighbours.

All of it stands in for the real thing and gives the very same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from vs2_plugin.clip.sites import Site
from vs2_plugin.gallery.retriever import Neighbours, Retriever
from vs2_plugin.sae.topk import TopKSAE

__all__ = ["Batch", "Lookup", "Remembered", "RememberedSums", "remember_codes"]


class Batch:
    """One batch of the test split, as points see it in place of its images."""

    def __init__(self, targets: Tensor) -> None:
        self.targets = targets
        #: Point -> its image features, where the tower had to be run for them.
        self.features: dict[Any, Tensor] = {}
        self._kept: dict[Site, Tensor] = {}
        self._shown: dict[Site, tuple[Tensor, int]] = {}

    def to(self, device: str) -> Batch:
        """Itself: clip_benchmark moves what it takes for images to the device."""
        return self

    def keep(self, site: Site, activation: Tensor) -> None:
        """Keep the plain activation ``[batch, d]`` at a site, in the tower's dtype."""
        self._kept[site] = activation.detach().clone(memory_format=torch.contiguous_format)

    def dtype(self, site: Site) -> torch.dtype:
        """The dtype of the tower at a site."""
        return self._kept[site].dtype

    def activation(self, site: Site) -> Tensor:
        """The activation in float32: the same tensor every time, unless somebody has edited it in place."""
        shown, version = self._shown.get(site, (None, None))
        if shown is None or shown._version != version:
            shown = self._kept[site].to(torch.float32, copy=True)
            self._shown[site] = shown, shown._version
        return shown


class Remembered:
    """A function of a tensor, or of a tuple of them, that remembers its results as long as the (first) tensor lives.

    A plugin may edit in place what it is given; what was edited is not used again.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function
        self._known = WeakIdKeyDictionary()

    def __call__(self, given: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        if torch.is_inference_mode_enabled():  # there, nobody can tell whether a tensor was edited
            return self._function(given)
        first, *rest = _parts(given)
        others, versions, result = self._known.get(first, ((), None, None))
        same = versions is not None and all(one is other for one, other in zip(rest, others, strict=True))
        if not same or versions != _versions(given, result):
            result = self._function(given)
            self._known[first] = rest, _versions(given, result), result
        return result


def _parts(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def _versions(*values: Tensor | tuple[Tensor, ...]) -> list[int]:
    return [part._version for value in values for part in _parts(value)]


def remember_codes(sae: TopKSAE) -> TopKSAE:
    """The SAE itself, which from now on encodes and combines each tensor once."""
    sae.encode, sae.combine = Remembered(sae.encode), Remembered(sae.combine)
    return sae


class RememberedSums:
    """The ``combine(rows, weights)`` of a gallery's codes or activations, once for the same rows and equal weights."""

    def __init__(self, combine: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._combine = combine
        self._known = WeakIdKeyDictionary()

    def __call__(self, rows: Tensor, weights: Tensor) -> Tensor:
        known = self._known.setdefault(rows, [])
        for others, result in known:
            if torch.equal(weights, others):
                return result
        known.append((weights, self._combine(rows, weights)))
        return known[-1][1]


class Lookup:
    """A retriever that looks at each batch once, however many points ask about it."""

    def __init__(self, retriever: Retriever) -> None:
        self._retriever = retriever
        self._seen: dict[Batch, tuple[Tensor, Tensor, Neighbours]] = {}
        self._knows_classes = False
        self.end()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._retriever, name)

    def set_classifier(self, classifier: Tensor) -> None:
        """Take the classifier, which is the same for all points, with what is derived from it."""
        if not self._knows_classes:
            self._retriever.set_classifier(classifier)
            self._knows_classes = True

    def look(self, batch: Batch, images: Tensor, embedding: Callable[[], Tensor]) -> None:
        """Find the neighbours of the images ``[batch, 3, height, width]`` with that plain embedding."""
        if batch in self._seen:
            return
        found = self._retriever
        found.begin(images)
        found.embed(embedding)
        with torch.autocast(found.device.type, enabled=False):  # as in a steering
            self._seen[batch] = found.embedding(), found.classes(), found.neighbours()
        found.end()

    def begin(self, batch: Batch, targets: Tensor | None = None) -> None:
        """That batch is at hand; ``targets`` ``[batch]``, for an oracle."""
        self._batch, self.targets = batch, targets

    def begin_own(self, rows: Tensor) -> None:
        """Images of the gallery itself are at hand: int64 ``[batch]``. Each point that looks at them asks anew."""
        self._retriever.begin_own(rows)
        self._batch = None

    def embed(self, embedding: Callable[[], Tensor]) -> None:
        """Nothing to do: the embedding was given to :meth:`look`."""

    def end(self) -> None:
        """Forget the batch at hand."""
        self._retriever.end()
        self._batch: Batch | None = None
        self.targets: Tensor | None = None

    def embedding(self) -> Tensor:
        """See :class:`Retriever`, as for the next two."""
        return self._retriever.embedding() if self._batch is None else self._seen[self._batch][0]

    def classes(self) -> Tensor:
        """The zero-shot class of each query."""
        return self._retriever.classes() if self._batch is None else self._seen[self._batch][1]

    def neighbours(self) -> Neighbours:
        """The nearest images of each query."""
        return self._retriever.neighbours() if self._batch is None else self._seen[self._batch][2]
