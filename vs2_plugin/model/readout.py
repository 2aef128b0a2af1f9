"""Runs methods on logits: they read the image embeddings of an evaluation as classes, each by its protocol.

``image`` and ``unlabeled``: each batch as it comes. ``stream``: image by image, after the last batch, in an order that
depends only on the images and a seed, not on loader workers. ``transductive``: all images at once. The method's logits
replace those that clip_benchmark computed for the same images; the metrics are clip_benchmark's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vs2_plugin.arrays import spread
from vs2_plugin.clip.edits import in_float32
from vs2_plugin.clip.sites import ClipModel, embedding_from
from vs2_plugin.data.images import image_digest
from vs2_plugin.errors import HarnessError, PluginError
from vs2_plugin.gallery.gallery import CLIP, Gallery
from vs2_plugin.gallery.search import blocks
from vs2_plugin.method import AUTO, Scalar
from vs2_plugin.model.builder import build, weights_of, whose
from vs2_plugin.model.facts import facts_of
from vs2_plugin.model.place import Place
from vs2_plugin.model.views import views_of
from vs2_plugin.modelstring import Reading
from vs2_plugin.steering.batch import Batch, Steering, call, unchanged
from vs2_plugin.steering.context import Context
from vs2_plugin.steering.neighbours import gallery_batches
from vs2_plugin.strength import RULE, choose, neighbour_graph

__all__ = ["Read", "Readout", "plain_gallery", "steered_gallery", "stream_order"]

#: Most images by which ``@use=auto`` decides whether a method is used, evenly spread over all.
_JUDGED = 10_000


class Readout:
    """A method on logits, for the evaluations of one model."""

    def __init__(
        self, reading: Reading, context: Callable[..., Context], gallery: Callable[[], Tensor] | None
    ) -> None:
        """
        Args:
            reading: the method and its options.
            context: makes the builder's context from a ``classifier`` and from ``unlabeled`` embeddings.
            gallery: returns the embeddings ``[images, embed_dim]``, of unit norm, of the gallery's images, steered as
                evaluated images are; None for a protocol that does not read the gallery.
        """
        self.method, self.options = reading.method, reading.options
        self.protocol = reading.protocol
        views = self.options.get("views") if self.method.views else None
        #: Number of views of each image that the method sees.
        self.views = int(views or 1)
        self._context, self._gallery = context, gallery
        self._read: Steering | None = None
        self._told: Mapping[str, Scalar] = {}
        self._chosen: Mapping[str, Scalar] = {}
        self._classifier: Tensor | None = None
        self._weights: Mapping[str, Tensor] = {}  # of the model, by the names for messages
        self.start()

    def start(self) -> None:
        """Forget the images seen so far."""
        self._logits: list[Tensor] = []
        self._embeddings: list[Tensor] = []
        self._digests: list[int] = []

    def set_classifier(self, classifier: Tensor) -> None:
        """Set the zero-shot classifier ``[embed_dim, classes]``. A method that learns from the gallery does so now."""
        self._classifier, self._read = F.normalize(classifier.detach().float(), dim=0), None
        if self.protocol in ("image", "unlabeled"):
            self._learned()

    def _learned(self) -> Steering:
        """Return the function that reads each batch as it comes, built at the first use, whatever autocast that is
        under."""
        if self._read is None:
            with self._without_autocast():
                self._read = self._build(None) if self._gallery is None else self._stood_up(self._gallery())
        return self._read

    @torch.no_grad()
    def _stood_up(self, unlabeled: Tensor) -> Steering:
        """Return the reading learned from embeddings ``[m, embed_dim]``; with ``@use=auto`` plain CLIP's instead,
        unless the images' classes agree better with their neighbours' by the method; the rule is that for strengths.
        The method is judged on images that it learned from: merely memorised classes show no gain, so they never
        speak for it."""
        read, classifier = self._build(unlabeled), self._require_classifier()
        if self.options.get("use") != AUTO:
            return read
        rows = spread(len(unlabeled), _JUDGED).to(unlabeled.device)
        judged = unlabeled[rows]
        logits = self._checked(read, judged, Batch(rows=rows))
        classes = [(judged @ classifier).argmax(1).cpu(), logits.argmax(1)]
        choice = choose([{"use": 0.0}, {"use": 1.0}], classes, neighbour_graph(judged).cpu(), classifier.shape[1])
        plain, by_it = choice.scores.information
        self._chosen = {
            "used": bool(choice.index),
            "use_reason": f"over {len(judged)} images, a class carries {plain:.3f} nats about the neighbours' classes, "
            f"and {by_it:.3f} by {self.method.name}: {RULE.objection(choice.candidates, choice.scores, 1) or 'enough'}",
        }
        return read if choice.index else lambda x: 100 * x @ classifier

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_read": None}  # it may be a closure, which cannot be pickled; it is built anew

    def encode(self, model: Any, images: Any) -> Tensor:
        """Encode a batch by ``model`` and read it (all views of each image, if there are several). Return the embedding
        ``[batch, embed_dim]`` of the images themselves."""
        if self.views == 1:
            embedding: Tensor = model.encode_image(images)
            self._see(embedding, images)
            return embedding
        views = views_of(images, self.views, int(self.options["crops"] or 0))
        embedding = model.encode_image(images)
        with model.aside():
            others = [model.encode_image(view) for view in views]
        self._see(torch.stack([embedding, *others], dim=1), images)
        return embedding

    @torch.no_grad()
    def _see(self, embeddings: Tensor, images: Any) -> None:
        x = F.normalize(embeddings.detach().float(), dim=-1)
        if self.protocol in ("image", "unlabeled"):
            batch = Batch(images if isinstance(images, Tensor) else None)
            self._logits.append(self._checked(self._learned(), x, batch))
            return
        self._embeddings.append(x)
        if self.protocol == "stream":
            digests = getattr(images, "digests", None)
            self._digests += [image_digest(image) for image in images] if digests is None else digests

    @torch.no_grad()
    def logits(self, rows: Sequence[int] | None = None) -> Tensor:
        """Return the method's logits of all images since :meth:`start`, or of ``rows`` as if there were no others:
        float32 ``[images, classes]``, on the CPU. A stream is read in its own order, or in that of ``rows``.

        Raises:
            PluginError: the method could not be built, or did not return finite logits.
        """
        if self.protocol in ("image", "unlabeled"):
            logits = torch.cat(self._logits)
            return logits if rows is None else logits[list(rows)]
        x = torch.cat(self._embeddings)
        with self._without_autocast():
            return self._of_all(x, None) if rows is None else self._of_all(x[list(rows)], rows)

    def _of_all(self, x: Tensor, rows: Sequence[int] | None) -> Tensor:
        """Return the logits of images that the method sees all at once, or as a stream."""
        if self.protocol == "transductive":
            return self._checked(self._stood_up(x), x, Batch(rows=torch.arange(len(x), device=x.device)))
        read, logits_of = self._build(None), [torch.empty(0)] * len(x)
        order = stream_order(self._digests, int(self.options["order"] or 0)) if rows is None else range(len(x))
        for row in order:
            logits_of[row] = self._checked(read, x[row : row + 1], Batch())
        return torch.cat(logits_of)

    def replace(self, logits: Tensor) -> Tensor:
        """Return the method's logits of all images since :meth:`start`, to take the place of ``logits`` that
        clip_benchmark computed for them; ``logits`` themselves if ``@use=auto`` decided against the method. (Under
        autocast, clip_benchmark rounds its logits, which the method's are not.)"""
        own = self.logits()
        return own if self._chosen.get("used", True) else logits

    def _without_autocast(self) -> torch.autocast:
        return torch.autocast(self._require_classifier().device.type, enabled=False)

    def _require_classifier(self) -> Tensor:
        if self._classifier is None:
            raise HarnessError(f"method {self.method.name!r} needs classes, but none are known")
        return self._classifier

    def _build(self, unlabeled: Tensor | None) -> Steering:
        context = self._context(classifier=self._require_classifier(), unlabeled=unlabeled)
        self._weights = weights_of(context.model)
        options = {option.name: self.options[option.name] for option in self.method.options}
        read = build(self.method, context, options)
        problems = facts_of(read)[1]
        if problems:
            raise PluginError(f"{whose(self.method.name)} has {problems[0]}")
        return read

    def _checked(self, read: Steering, x: Tensor, batch: Batch) -> Tensor:
        """Return the logits ``[batch, classes]`` that ``read`` gives, on the CPU.

        Raises:
            PluginError: the method failed, gave logits of another shape or not finite, or edited a tensor that is not
                its own.
        """
        classifier = self._require_classifier()
        with self._without_autocast():
            try:
                given = {"its embeddings": x, "context.classifier": classifier}
                with unchanged(lambda: {**given, **batch.shared()}, self._weights):
                    logits = call(read, x, batch)
            except PluginError as error:
                raise PluginError(f"{whose(self.method.name)} failed: {error}") from error
        expected = (len(x), classifier.shape[1])
        if not isinstance(logits, Tensor) or tuple(logits.shape) != expected:
            returned = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise PluginError(f"{whose(self.method.name)} returned {returned}; expected logits {expected}")
        logits = logits.float().cpu()
        if not logits.isfinite().all():
            raise PluginError(f"{whose(self.method.name)} gave logits of NaN or infinity; expected finite ones")
        self._told = facts_of(read)[0]
        return logits

    @property
    def facts(self) -> Mapping[str, Scalar]:
        """Facts that the method reports of itself, and with ``@use=auto`` whether it is used and why."""
        return {**self._told, **self._chosen}


class Read:
    """A model with a method on logits, as passed to clip_benchmark's ``run_classification``: each encoded batch is also
    read by the method. The caller replaces clip_benchmark's logits by :meth:`Readout.replace`."""

    def __init__(self, model: Any, readout: Readout) -> None:
        self._model, self._readout = model, readout
        readout.start()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def encode_image(self, images: Any) -> Tensor:
        """Return the embedding ``[batch, embed_dim]``, after the method on logits has read it."""
        return self._readout.encode(self._model, images)


def stream_order(digests: Sequence[int], seed: int) -> list[int]:
    """Return the indices of images in the order of a stream: a permutation that depends on the images and a seed, not
    on the order of loading."""
    by_digest = sorted(range(len(digests)), key=digests.__getitem__)
    shuffled = torch.randperm(len(digests), generator=torch.Generator().manual_seed(seed))
    return [by_digest[index] for index in shuffled.tolist()]


def plain_gallery(gallery: Gallery, device: torch.device) -> Tensor:
    """Return the embeddings ``[images, embed_dim]``, of unit norm, of the gallery's images."""
    return torch.cat([*blocks(gallery.embeddings[CLIP], device)])


@torch.no_grad()
def steered_gallery(gallery: Gallery, model: ClipModel, place: Place) -> Tensor:
    """Return the embeddings ``[images, embed_dim]``, of unit norm, of the gallery's images, steered at ``place``."""
    site, device, embeddings = place.site, next(model.parameters()).device, []
    for x, batch in gallery_batches(gallery, site.hookpoint, place.retriever, device, torch.arange(len(gallery))):
        steered = in_float32(partial(place.steer, batch=batch), x)
        embeddings.append(F.normalize(embedding_from(model, site, steered), dim=-1))
    place.reset()  # its figures so far are not of images under evaluation
    return torch.cat(embeddings)
