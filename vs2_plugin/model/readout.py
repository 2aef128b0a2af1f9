"""Methods on logits at work: they read the image embeddings of an evaluation as classes, each by its protocol.

``image`` and ``unlabeled``: each batch as it comes. ``stream``: image by image, once all are there, in an order that
only the images and a seed tell, so that loader workers do not change it. ``transductive``: all images at once. What
comes out takes the place of the logits that clip_benchmark made of the same images, and the metrics are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vs2_plugin.arrays import digest_of, spread
from vs2_plugin.clip.edits import in_float32
from vs2_plugin.clip.sites import ClipModel, embedding_from
from vs2_plugin.data.images import image_digest
from vs2_plugin.errors import HarnessError, PluginError
from vs2_plugin.gallery.gallery import CLIP, Gallery
from vs2_plugin.gallery.search import blocks
from vs2_plugin.method import AUTO, Scalar
from vs2_plugin.model.builder import build, whose
from vs2_plugin.model.facts import facts_of
from vs2_plugin.model.place import Place
from vs2_plugin.model.views import views_of
from vs2_plugin.modelstring import Reading
from vs2_plugin.steering.batch import Batch, Steering, call, unchanged
from vs2_plugin.steering.context import Context
from vs2_plugin.steering.neighbours import gallery_batches
from vs2_plugin.strength import RULE, choose, neighbour_graph

__all__ = ["Read", "Readout", "plain_gallery", "steered_gallery", "stream_order"]

#: How many images of the gallery tell whether a method is used, evenly spread over more.
_JUDGED = 10_000


class Readout:
    """A method on logits, in the evaluations of one model."""

    def __init__(
        self,
        reading: Reading,
        context: Callable[..., Context],
        gallery: Callable[[], Tensor] | None,
    ) -> None:
        """
        Args:
            reading: the method and its options.
            context: makes what the builder is told, of a ``classifier`` and of ``unlabeled`` embeddings.
            gallery: gives the embeddings ``[images, embed_dim]``, of unit norm, of the gallery's images, steered as
                images are; None for a protocol that does not show them.
        """
        self.method, self.options = reading.method, reading.options
        self.protocol = reading.protocol
        views = self.options.get("views") if self.method.views else None
        #: How many views of each image it sees.
        self.views = int(views or 1)
        self._context, self._gallery = context, gallery
        self._read: Steering | None = None
        self._told: Mapping[str, Scalar] = {}
        self._chosen: Mapping[str, Scalar] = {}
        self._classifier: Tensor | None = None
        self._known_for: str | None = None
        self.start()

    def start(self) -> None:
        """Forget the images seen so far."""
        self._logits: list[Tensor] = []
        self._embeddings: list[Tensor] = []
        self._digests: list[int] = []

    def set_classifier(self, classifier: Tensor) -> None:
        """Tell the zero-shot classifier ``[embed_dim, classes]``. What learns from the gallery does so now, once for
        the same classes."""
        classifier = F.normalize(classifier.detach().float(), dim=0)
        known_for = digest_of({"": classifier})
        if known_for != self._known_for:
            self._known_for, self._classifier, self._read = known_for, classifier, None
        if self.protocol in ("image", "unlabeled"):
            self._learned()

    def _learned(self) -> Steering:
        """What reads each batch as it comes."""
        if self._read is None:
            self._read = self._build(None) if self._gallery is None else self._stood_up(self._gallery())
        return self._read

    @torch.no_grad()
    def _stood_up(self, unlabeled: Tensor) -> Steering:
        """What the method learns from images ``[m, embed_dim]``; with ``@use=auto``, what reads as plain CLIP does
        unless their classes fit their neighbours' better by it, as for strengths. Its reading of an image that it
        learned from is compared, which hides what it only knows by heart, but never speaks for that."""
        read, classifier = self._build(unlabeled), self._classifier
        if self.options.get("use") != AUTO:
            return read
        assert classifier is not None
        rows = spread(len(unlabeled), _JUDGED).to(unlabeled.device)
        judged = unlabeled[rows]
        told = self._checked(read, judged, Batch(rows=rows))
        ways = [(judged @ classifier).argmax(1).cpu(), told.argmax(1)]
        choice = choose([{"use": 0.0}, {"use": 1.0}], ways, neighbour_graph(judged).cpu(), classifier.shape[1])
        plain, its = choice.scores.information
        self._chosen = {
            "used": bool(choice.index),
            "use_reason": f"over {len(judged)} images, a class carries {plain:.3f} nats about the neighbours' classes, "
            f"and {its:.3f} by {self.method.name}: {RULE.objection(choice.candidates, choice.scores, 1) or 'enough'}",
        }
        return read if choice.index else lambda x: 100 * x @ classifier

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_read": None}  # a function within another cannot be pickled; it is built anew

    def encode(self, model: Any, images: Any) -> Tensor:
        """Encode a batch by ``model``, read it, and return the embedding ``[batch, embed_dim]`` of the images
        themselves."""
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
            known = getattr(images, "digests", None)
            self._digests += [image_digest(image) for image in images] if known is None else known

    @torch.no_grad()
    def logits(self, rows: Sequence[int] | None = None) -> Tensor:
        """What it makes of all images since :meth:`start`, or of some ``rows`` of them as if they were all: float32
        ``[images, classes]``, on the CPU. A stream comes in its own order, and with ``rows`` in theirs.

        Raises:
            PluginError: it could not be built, or gave something else.
        """
        if self.protocol in ("image", "unlabeled"):
            logits = torch.cat(self._logits)
            return logits if rows is None else logits[list(rows)]
        x = torch.cat(self._embeddings)
        x = x if rows is None else x[list(rows)]
        if self.protocol == "transductive":
            return self._checked(self._stood_up(x), x, Batch(rows=torch.arange(len(x), device=x.device)))
        read, found = self._build(None), [torch.empty(0)] * len(x)
        order = stream_order(self._digests, int(self.options["order"] or 0)) if rows is None else range(len(x))
        for row in order:
            found[row] = self._checked(read, x[row : row + 1], Batch())
        return torch.cat(found)

    def _build(self, unlabeled: Tensor | None) -> Steering:
        if self._classifier is None:
            raise HarnessError(f"method {self.method.name!r} needs classes, but none are known")
        context = self._context(classifier=self._classifier, unlabeled=unlabeled)
        options = {option.name: self.options[option.name] for option in self.method.options}
        read = build(self.method, context, options)
        problems = facts_of(read)[1]
        if problems:
            raise PluginError(f"{whose(self.method.name)} has {problems[0]}")
        return read

    def _checked(self, read: Steering, x: Tensor, batch: Batch) -> Tensor:
        """Return the logits ``[batch, classes]``, on the CPU.

        Raises:
            PluginError: they are no such, or not finite.
        """
        assert self._classifier is not None
        with torch.autocast(x.device.type, enabled=False):
            try:
                with unchanged(lambda: {"its embeddings": x, "context.classifier": self._classifier, **batch.shared()}):
                    logits = call(read, x, batch)
            except PluginError as error:
                raise PluginError(f"{whose(self.method.name)} failed: {error}") from error
        expected = (len(x), self._classifier.shape[1])
        if not isinstance(logits, Tensor) or tuple(logits.shape) != expected:
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise PluginError(f"{whose(self.method.name)} returned {found}; expected logits {expected}")
        logits = logits.float().cpu()
        if not logits.isfinite().all():
            raise PluginError(f"{whose(self.method.name)} gave logits of NaN or infinity; expected finite ones")
        self._told = facts_of(read)[0]
        return logits

    @property
    def facts(self) -> Mapping[str, Scalar]:
        """What the method says of itself, and whether it is used where that was left open."""
        return {**self._told, **self._chosen}


class Read:
    """A model whose classification is that of its method on logits: what clip_benchmark's ``run_classification`` is
    given in its place. The logits it makes of the embeddings are then to be replaced by :meth:`Readout.logits`."""

    def __init__(self, model: Any, readout: Readout) -> None:
        self._model, self._readout = model, readout
        readout.start()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def encode_image(self, images: Any) -> Tensor:
        """The embedding ``[batch, embed_dim]``, which is read as classes by the way."""
        return self._readout.encode(self._model, images)


def stream_order(digests: Sequence[int], seed: int) -> list[int]:
    """Return the indices of images in the order of a stream: a permutation by a seed, the same whatever the order in
    which they were loaded."""
    by_digest = sorted(range(len(digests)), key=digests.__getitem__)
    shuffled = torch.randperm(len(digests), generator=torch.Generator().manual_seed(seed))
    return [by_digest[index] for index in shuffled.tolist()]


def plain_gallery(gallery: Gallery, device: torch.device) -> Tensor:
    """Return the embeddings ``[images, embed_dim]``, of unit norm, of the gallery's images."""
    return torch.cat([*blocks(gallery.embeddings[CLIP], device)])


@torch.no_grad()
def steered_gallery(gallery: Gallery, model: ClipModel, place: Place) -> Tensor:
    """Return the same as they are steered at the end of the tower."""
    site, device, found = place.site, next(model.parameters()).device, []
    for x, batch in gallery_batches(gallery, site.hookpoint, place.retriever, device, torch.arange(len(gallery))):
        steered = in_float32(partial(place.steer, batch=batch), x)
        found.append(F.normalize(embedding_from(model, site, steered), dim=-1))
    place.reset()  # these are not the images under evaluation
    return torch.cat(found)
