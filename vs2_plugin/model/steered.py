"""The steered model, with the interface that clip_benchmark expects of a model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from vs2_plugin.checkpoint.checkpoint import Checkpoint
from vs2_plugin.clip.backbone import Loaded
from vs2_plugin.clip.edits import Edit, paused
from vs2_plugin.clip.sites import ClipModel, Sites
from vs2_plugin.clip.tower import Tower
from vs2_plugin.errors import CheckpointReplaced, DataError, HarnessError, ModelStringError, SettingError
from vs2_plugin.method import Scalar
from vs2_plugin.model.activations import Activations, steer_activations
from vs2_plugin.model.classifier import Classifier
from vs2_plugin.model.description import describe
from vs2_plugin.model.explanation import Explanation, explain
from vs2_plugin.model.parts import Parts
from vs2_plugin.model.place import Current
from vs2_plugin.model.places import Places, build_places
from vs2_plugin.model.plain import PlainEmbedding
from vs2_plugin.model.predictions import Images, OneImage, Predictions, one_image, predict
from vs2_plugin.model.readout import Readout
from vs2_plugin.model.replay import Replays, can_replay
from vs2_plugin.modelstring import ModelString
from vs2_plugin.settings import is_count
from vs2_plugin.steering.batch import Batch
from vs2_plugin.steering.context import Task
from vs2_plugin.steering.tally import counted

__all__ = ["SteeredCLIP"]

#: Called after each batch with a function that gives the plain model's embedding of the same images.
ShowPlain = Callable[[Callable[[], Tensor]], None]

P = ParamSpec("P")
R = TypeVar("R")


def _in_turn(method: Callable[Concatenate[SteeredCLIP, P], R]) -> Callable[Concatenate[SteeredCLIP, P], R]:
    """Make threads that call a model wait for each other, since the model holds the batch of the running call."""

    @functools.wraps(method)
    def called(model: SteeredCLIP, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return method(model, *args, **kwargs)
        with model._current.turn:
            return method(model, *args, **kwargs)

    return called


def _require_classifier(weights: object, width: int) -> None:
    """Raise SettingError unless ``weights`` are finite class embeddings ``[width, classes]``."""
    expected = f"expected a tensor [{width}, classes] of floats, as clip_benchmark's zero_shot_classifier gives it"
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        kind = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise SettingError(f"the classifier is of type {kind}; {expected}")
    if weights.ndim != 2 or len(weights) != width or weights.shape[1] == 0:
        raise SettingError(f"the classifier is of shape {list(weights.shape)}; {expected}")
    if not weights.isfinite().all():
        raise SettingError("the classifier holds NaN or infinity; expected finite class embeddings")


class SteeredCLIP(nn.Module):
    """An open_clip model whose image activations are steered in every forward pass.

    It also has the methods and attributes of the model inside (``encode_image``, ``encode_text``, ``generate``,
    ``logit_scale``, …). Steering sits in a hook of the vision tower, so whatever runs the tower is steered.
    """

    def __init__(
        self,
        spec: ModelString,
        loaded: Loaded,
        find_checkpoint: Callable[[Task | None], Checkpoint | None],
        amp: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(amp, bool):
            raise SettingError(f"amp is {amp!r:.80}; expected True or False")
        self.model: ClipModel = loaded.model
        self.spec = spec
        self.sites: Sites = loaded.sites
        #: The preprocessing of an image.
        self.transform: Callable[[Any], Tensor] = loaded.transform
        #: Whether images are classified under autocast, for a classifier that was set as class embeddings only.
        self.amp = amp
        #: The classifier that was set last.
        self.classifier: Classifier | None = None
        self._tower = Tower.of(loaded.model, loaded.transform) if spec.needs_checkpoint else None
        self._find_checkpoint = find_checkpoint
        self._warned: set[str] = set()  # a model that names its checkpoint is bound to it, and later to a data set
        self._current = Current()
        self._places: Places | None = None
        self._edits: list[Edit] = []
        self._targets: Tensor | None = None
        self._plain: PlainEmbedding | None = None
        self._show: ShowPlain | None = None
        #: Whether a GPU may replay a captured forward pass; results are the same either way.
        self.replaying = True
        self._replays = Replays()
        self.eval()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    @_in_turn
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SteeredCLIP:
        self._replays.forget()  # to free GPU memory where the model moves to another device
        before = self._device
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._places is not None and self._device not in (before, torch.device("meta")):
            classifier = self.classifier
            self.bind(self._places.task)  # since galleries, searches and classes are on the device of before
            if classifier is not None:
                self.set_classifier(classifier, quiet=True)
        return self

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def __repr__(self) -> str:
        return describe(self.spec, self._places, self.classifier)

    @_in_turn
    def bind(self, task: Task | None) -> None:
        """Find the checkpoint for ``task`` (None: the one that the model string names) and start steering.

        Raises:
            CheckpointError: no checkpoint is found, or it is of another tower.
            PluginError: the method could not be built.
        """
        for again in (True, True, False):
            parts = Parts(self.model, self.sites, self._tower, self._warned)
            try:
                places = build_places(self.spec, self._find_checkpoint(task), task, parts, self._current)
                break
            except CheckpointReplaced:
                if not again:
                    raise
        # The tower is changed only after everything has been built.
        while self._edits:
            self._edits.pop().remove()
        self._places, self.classifier = places, None
        self._replays.forget()
        self._edits = [Edit(self.model, place.site, place) for place in places]

    @property
    def places(self) -> Places:
        """The places where the tower is steered, in its order.

        Raises:
            ModelStringError: the model is not bound to a data set yet.
        """
        if self._places is None:
            raise ModelStringError(
                f"model {str(self.spec)!r} does not know its data set yet; name a checkpoint ({self.spec.name}:"
                f"{self.spec.backbone}@NAME) or pass dataset= to vs2_plugin.load"
            )
        return self._places

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The checkpoint that the method uses; None if it needs none, or before :meth:`bind`."""
        return None if self._places is None else self._places.checkpoint

    @property
    def readout(self) -> Readout | None:
        """The method on logits that reads the embeddings as classes, if there is one."""
        return self.places.readout

    @_in_turn
    def set_classifier(self, classifier: Tensor | Classifier, quiet: bool = False) -> None:
        """Set the zero-shot classifier ``[embed_dim, classes]``, for classification and methods that need the classes.

        The harness glue calls this, and :func:`vs2_plugin.load` with ``classes``; other callers have to, before they
        encode the first image. Options that are ``auto`` are chosen now, and the choice is logged unless ``quiet``.

        Raises:
            SettingError: a matrix of another type or shape, or one with NaN or infinity.
        """
        weights = classifier.weights if isinstance(classifier, Classifier) else classifier
        _require_classifier(weights, self.sites.output.width)
        if weights.dtype == torch.float64:  # no model computes in float64
            weights = weights.float()
        weights = weights.to(self._device)
        self._replays.forget()
        self.places.set_classifier(weights, quiet)
        if isinstance(classifier, Classifier):
            self.classifier = replace(classifier, weights=weights)
        else:
            self.classifier = Classifier.unnamed(weights, self.amp)

    def classify(self, images: Images, batch_size: int = 64) -> Predictions:
        """Return the steered and the plain model's predictions for images: the numbers of ``clip_benchmark eval`` with
        batches of that size, bit for bit.

        Args:
            images: a PIL image, a path, a list of these, a folder, or preprocessed images ``[images, 3, height,
                width]``, as a tensor or an array.
            batch_size: images that go through the tower at a time.

        Raises:
            HarnessError: no classes are known, or the model was cast to another dtype.
            DataError: an object or a file is no image, or an image has no logits.
            SettingError: ``batch_size`` is no whole number, or below 1.
        """
        if isinstance(images, Iterator):  # outside of the lock: another thread may need the lock to produce them
            images = list(images)
        with self._current.turn:
            return predict(self, self._require_classes(), images, self.transform, batch_size)

    @_in_turn
    def explain(self, image: OneImage, *, top: int = 5, latents: int = 8) -> Explanation:
        """Explain what steering did to one image, latent by latent, in float32, as ``vs2 inspect`` does, but with the
        model's class embeddings (in float32 too, if it was loaded with ``amp=False``). Nearest words are of the image's
        own activations, where those of ``vs2 inspect`` are of the training images' mean ones.

        Args:
            image: a PIL image, a path, or a preprocessed image ``[3, height, width]``, as a tensor or an array.
            top: classes shown, the best before and the best after.
            latents: latents shown for each place, those that contributed most to the lead.

        Raises:
            HarnessError: fewer than two classes are known, the method is on logits or reads the true class, or the
                model was cast to another dtype.
            DataError: no image, or more than one, or one without logits.
            SettingError: ``top`` or ``latents`` is no whole number, or below 1.
        """
        if not is_count(top) or not is_count(latents):
            raise SettingError(f"top is {top!r:.80} and latents {latents!r:.80}; expected whole numbers, at least 1")
        classifier = self._require_classes()
        # In any caller's mode: contributions need gradients.
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(self._device.type, enabled=False):
            prepared = one_image(image, self.transform).to(classifier.weights.device)
            texts = classifier.weights.float().T.contiguous()
            return explain(self, prepared, classifier.names, texts, top=top, latents=latents)

    @_in_turn
    def steer(self, activations: Activations, block: int | None = None) -> Activations:
        """Return steered activations ``[batch, d]``, gate included, as a forward pass of the tower steers them.

        Args:
            activations: activations at one of the places, such as the CLS tokens after a block: a tensor or an array of
                floats, on any device. The result is of the same type and dtype.
            block: number of the place's block, needed where the model steers at several places.

        Raises:
            DataError: activations of another shape or not finite, or a block where the model does not steer.
            HarnessError: the method needs the images themselves.
        """
        return steer_activations(self.model, self.sites, self.places, activations, block)

    def _require_classes(self) -> Classifier:
        if self.classifier is None:
            raise HarnessError(f"model {str(self.spec)!r} knows no classes; load it with classes=['cat', 'dog']")
        dtype = next(self.model.parameters()).dtype
        if dtype != torch.float32:
            raise HarnessError(
                f"model {str(self.spec)!r} has weights of {dtype}; expected float32, as fast under autocast; call "
                "model.float()"
            )
        return self.classifier

    def set_targets(self, targets: Tensor | None) -> None:
        """Set the true classes ``[batch]`` of the images that are encoded next, for oracles."""
        self._targets = targets

    def reset_statistics(self) -> None:
        """Forget the images seen so far; the harness glue calls this before each evaluation."""
        self.places.reset()

    def require_finite(self) -> None:
        """Raise PluginError if a method steered to NaN or infinity; see :meth:`Places.require_finite`."""
        self.places.require_finite()

    def vs2_facts(self) -> dict[str, Scalar]:
        """Return the metrics that describe the steering; see :meth:`Places.results`."""
        return self.places.results()

    def record_images(self, recording: bool, show: ShowPlain | None = None) -> None:
        """Start or stop keeping the figures that :meth:`per_image` returns.

        ``show`` is called after each batch, under the autocast of the moment, with a function that returns the plain
        model's embedding of the same images ``[batch, embed_dim]``, bit for bit.
        """
        self._replays.forget()  # to free its GPU memory
        for gate in self.places.gates:
            gate.recording = recording
        if self._plain is not None:
            self._plain.stop()
        self._show = show if recording else None
        self._plain = None if self._show is None else PlainEmbedding(self.model, self._edits, self.places.inside)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Record and count no images within a ``with`` block that encodes further views of images seen already."""
        gates = [(gate, gate.recording) for gate in self.places.gates]
        show, self._show = self._show, None
        for gate, _ in gates:
            gate.recording = False
        try:
            with counted() as batches:
                yield
        finally:
            self._show = show
            for gate, recording in gates:
                gate.recording = recording
        checks = {place.sums for place in self.places}
        for tally, sums, count in batches:
            if tally in checks:  # activations of a further view, too, have to be finite
                tally.keep(sums, count)

    def per_image(self) -> dict[str, Tensor]:
        """Return figures of the images recorded since :meth:`reset_statistics`; see :meth:`Places.per_image`."""
        return self.places.per_image()

    @_in_turn
    def encode_image(self, image: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the steered image embedding ``[batch, embed_dim]``, in the dtype of the model inside.

        Raises:
            DataError: no tensor of images ``[batch, 3, height, width]``; torch raises errors of its own for another
                size or dtype than the model's.
            HarnessError: the tower ran without its steering.
        """
        if not isinstance(image, Tensor) or image.ndim != 4 or image.shape[1] != 3 or not image.is_floating_point():
            kind = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            raise DataError(f"images of type {kind}; expected a tensor of floats [batch, 3, height, width], as the "
                            "model's transform makes them")  # fmt: skip
        if self._can_replay(image) and not args and not kwargs:
            embedding = self._replays(self.model.visual, self._encode, image)
            if embedding is not None:
                return embedding
        batch = Batch(image, self._targets)
        embedding = self._encode(batch, *args, **kwargs)
        if self._show is not None and self._plain is not None:
            plain = self._plain
            embed = batch.embed if self.places.inside else None
            self._show(embed or (lambda: plain.of(image)))
        return embedding

    def _can_replay(self, image: Tensor) -> bool:
        if not self.replaying or self._show is not None or getattr(self, "_is_replica", False):
            return False
        return can_replay(image)

    def _encode(self, batch: Batch, *args: Any, **kwargs: Any) -> Tensor:
        with self._running(batch), self._all_steered():
            embedding: Tensor = self.model.encode_image(batch.images, *args, **kwargs)
        return embedding

    def at_hand(self, image: Tensor) -> AbstractContextManager[Batch]:
        """Return a context manager that makes images known to the steerings while the tower runs on them."""
        return self._running(Batch(image, self._targets))

    @contextmanager
    def _running(self, batch: Batch) -> Iterator[Batch]:
        places = self.places
        if places.retriever is not None and places.inside:
            with self.unsteered():
                plain = self.model.encode_image(batch.images)
            batch.embed = lambda: plain
        with self._current.running(batch):
            yield batch

    @contextmanager
    def _all_steered(self) -> Iterator[None]:
        """Raise HarnessError if the forward pass in a ``with`` block missed an edit: torch.compile does not check if
        hooks were added since it compiled another tower of the same class."""
        # A replica by DataParallel has edits of its own.
        edits: list[Any] = [self.model.get_submodule(edit.path) for edit in self._edits]
        for edit in edits:
            edit.ran = False
        yield
        if not all(edit.ran for edit in edits):
            raise HarnessError(
                f"model {str(self.spec)!r}: the tower ran without its steering: it was code that torch.compile made "
                "for another tower; call torch._dynamo.reset() before torch.compile"
            )

    def unsteered(self, start: int = 0) -> AbstractContextManager[None]:
        """Return a context manager that runs the tower without its steerings, from place number ``start`` on."""
        return paused(self._edits[start:])

    def encode_text(self, text: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the text embedding, which steering does not change."""
        return self.model.encode_text(text, *args, **kwargs)

    @_in_turn
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward pass of the model inside on images and texts, with steering."""
        image = kwargs.get("image", args[0] if args else None)
        if image is None:
            return self.model(*args, **kwargs)
        with self.at_hand(image), self._all_steered():
            return self.model(*args, **kwargs)
