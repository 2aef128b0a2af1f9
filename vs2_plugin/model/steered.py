"""The steered model, as clip_benchmark sees it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from vs2_plugin.checkpoint.checkpoint import Checkpoint
from vs2_plugin.clip.backbone import Loaded
from vs2_plugin.clip.edits import Edit, paused
from vs2_plugin.clip.sites import ClipModel, Sites
from vs2_plugin.clip.tower import Tower
from vs2_plugin.errors import CheckpointReplaced, HarnessError, ModelStringError, SettingError
from vs2_plugin.method import Scalar
from vs2_plugin.model.activations import Activations, steer_activations
from vs2_plugin.model.description import describe
from vs2_plugin.model.explanation import Explanation, explain
from vs2_plugin.model.parts import Parts
from vs2_plugin.model.place import Current
from vs2_plugin.model.places import Places, build_places
from vs2_plugin.model.plain import PlainEmbedding
from vs2_plugin.model.predictions import Classifier, Images, OneImage, Predictions, one_image, predict
from vs2_plugin.model.readout import Readout
from vs2_plugin.model.replay import Replays, can_replay
from vs2_plugin.modelstring import ModelString
from vs2_plugin.steering.batch import Batch
from vs2_plugin.steering.context import Task

__all__ = ["SteeredCLIP"]

#: Called after each batch with a function that gives the plain model's embedding of the same images.
ShowPlain = Callable[[Callable[[], Tensor]], None]

P = ParamSpec("P")
R = TypeVar("R")


def _in_turn(method: Callable[Concatenate[SteeredCLIP, P], R]) -> Callable[Concatenate[SteeredCLIP, P], R]:
    """Have threads that call a model wait for each other: what is known of a batch lies in the model meanwhile."""

    @functools.wraps(method)
    def called(model: SteeredCLIP, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return method(model, *args, **kwargs)
        with model._current.turn:
            return method(model, *args, **kwargs)

    return called


def _require_classifier(weights: object, width: int) -> None:
    """Raise SettingError if these are no class embeddings of that width."""
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

    It has the methods and attributes of the model inside (``encode_image``, ``encode_text``, ``generate``,
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
        self.model: ClipModel = loaded.model
        self.spec = spec
        self.sites: Sites = loaded.sites
        #: The preprocessing of an image.
        self.transform: Callable[[Any], Tensor] = loaded.transform
        #: Whether images are classified under autocast, where class embeddings are given.
        self.amp = amp
        #: The classes that it was told last.
        self.classifier: Classifier | None = None
        self._tower = Tower.of(loaded.model, loaded.transform) if spec.needs_checkpoint else None
        self._find_checkpoint = find_checkpoint
        self._current = Current()
        self._places: Places | None = None
        self._edits: list[Edit] = []
        self._targets: Tensor | None = None
        self._plain: PlainEmbedding | None = None
        self._show: ShowPlain | None = None
        #: Whether a GPU may replay what it was told of other batches; results are the same either way.
        self.replaying = True
        self._replays = Replays()
        self.eval()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SteeredCLIP:
        self._replays.forget()  # for its memory, where it goes to another device
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __repr__(self) -> str:
        return describe(self.spec, self._places, self.classifier)

    @_in_turn
    def bind(self, task: Task | None) -> None:
        """Find the checkpoint for ``task`` (None: the one that the model string names) and start steering.

        Raises:
            CheckpointError: there is none, or it is of another tower.
            PluginError: the method could not be built.
        """
        for again in (True, True, False):
            parts = Parts(self.model, self.sites, self._tower)
            try:
                places = build_places(self.spec, self._find_checkpoint(task), task, parts, self._current)
                break
            except CheckpointReplaced:
                if not again:
                    raise
        # Only when all of it could be built is the tower touched.
        while self._edits:
            self._edits.pop().remove()
        self._places, self.classifier = places, None
        self._replays.forget()
        self._edits = [Edit(self.model, place.site, place) for place in places]

    @property
    def places(self) -> Places:
        """Where the tower is steered, in its order.

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
        """The checkpoint that it steers along, if its method needs one."""
        return None if self._places is None else self._places.checkpoint

    @property
    def readout(self) -> Readout | None:
        """The method on logits that reads what comes out of the tower, if there is one."""
        return self.places.readout

    @_in_turn
    def set_classifier(self, classifier: Tensor | Classifier, quiet: bool = False) -> None:
        """Tell a method that needs the classes the zero-shot classifier ``[embed_dim, classes]``. The harness glue does
        so, and :func:`vs2_plugin.load` with ``classes``; elsewhere it is up to the caller, before the first image is
        encoded. Options that are ``auto`` are chosen now, and the choice is logged unless ``quiet``.

        Raises:
            SettingError: it is no such matrix, or holds NaN or infinity.
        """
        weights = classifier.weights if isinstance(classifier, Classifier) else classifier
        _require_classifier(weights, self.sites.output.width)
        if weights.dtype == torch.float64:  # which no model has
            weights = weights.float()
        told = classifier if isinstance(classifier, Classifier) else Classifier.unnamed(weights, self.amp)
        self._replays.forget()
        self.places.set_classifier(told.weights, quiet)
        self.classifier = told

    def classify(self, images: Images, batch_size: int = 64) -> Predictions:
        """Return what the steered model, and the plain one beside it, make of images: the numbers of ``clip_benchmark
        eval`` with batches of that size, bit for bit.

        Args:
            images: a PIL image, a path, a list of these, a folder, or preprocessed images ``[images, 3, height,
                width]``, as a tensor or an array.
            batch_size: how many go through the tower at a time.

        Raises:
            HarnessError: no classes are known, or the model was cast to another dtype.
            DataError: something is no image.
        """
        if isinstance(images, Iterator):  # before the turn, for which somebody may wait who is to give them
            images = list(images)
        with self._current.turn:
            return predict(self, self._require_classes(), images, self.transform, batch_size)

    @_in_turn
    def explain(self, image: OneImage, *, top: int = 5, latents: int = 8) -> Explanation:
        """Return what steering did to one image, latent by latent, in float32: what ``vs2 inspect`` says of it.

        Args:
            image: a PIL image, a path, or a preprocessed image ``[3, height, width]``, as a tensor or an array.
            top: classes shown, the best before and the best after.
            latents: latents shown for each place, those that contributed most to the change.

        Raises:
            HarnessError: fewer than two classes are known, the method reads the true class, or the model was cast to
                another dtype.
            DataError: it is no image, or more than one.
            SettingError: fewer than one class or latent.
        """
        if min(top, latents) < 1:
            raise SettingError(f"top is {top} and latents {latents}; expected whole numbers, at least 1")
        classifier = self._require_classes()
        with torch.inference_mode(False), torch.enable_grad():  # latents are told by gradients, whoever calls
            prepared = one_image(image, self.transform).to(classifier.weights.device)
            texts = classifier.weights.float().T.contiguous()
            return explain(self, prepared, classifier.names, texts, top=top, latents=latents)

    @_in_turn
    def steer(self, activations: Activations, block: int | None = None) -> Activations:
        """Steer activations ``[batch, d]`` by themselves, gate included, as the tower does on its way.

        Args:
            activations: of one place where the model steers, such as the CLS tokens after a block: floats, on any
                device. What comes back is of the same kind: a tensor or an array, of that dtype.
            block: which place, where the model steers at several.

        Raises:
            DataError: activations of another shape, or that are not finite; or a block where it does not steer.
            HarnessError: the method asks about images, which are not at hand.
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
        """Tell an oracle the true classes ``[batch]`` of the images that are encoded next."""
        self._targets = targets

    def reset_statistics(self) -> None:
        """Forget the images seen so far; the harness glue calls this before each evaluation."""
        self.places.reset()

    def vs2_facts(self) -> dict[str, Scalar]:
        """The metrics that describe the steering; see :meth:`Places.results`."""
        return self.places.results()

    def record_images(self, recording: bool, show: ShowPlain | None = None) -> None:
        """Keep, or no longer keep, what :meth:`per_image` tells.

        ``show`` is called after each batch, under the autocast of the moment, with a function that gives the plain
        model's embedding of the same images ``[batch, embed_dim]``, bit for bit.
        """
        self._replays.forget()  # for its memory
        for gate in self.places.gates:
            gate.recording = recording
        if self._plain is not None:
            self._plain.stop()
        self._show = show if recording else None
        self._plain = None if self._show is None else PlainEmbedding(self.model, self._edits, self.places.inside)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within the ``with`` block, images that are encoded are not recorded: they are views of others that were."""
        gates = [(gate, gate.recording) for gate in self.places.gates]
        show, self._show = self._show, None
        for gate, _ in gates:
            gate.recording = False
        try:
            yield
        finally:
            self._show = show
            for gate, recording in gates:
                gate.recording = recording

    def per_image(self) -> dict[str, Tensor]:
        """The last site's gate on each image since :meth:`reset_statistics`: ``fvu`` and ``steered``."""
        return self.places.per_image()

    @_in_turn
    def encode_image(self, image: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The steered image embedding ``[batch, embed_dim]``, in the dtype of the model inside.

        Raises:
            HarnessError: the tower ran without its steering.
        """
        if self._can_replay(image) and not args and not kwargs:
            embedding = self._replays(self.model.visual, self._encode, image)
            if embedding is not None:
                return embedding
        batch = Batch(image, self._targets)
        embedding = self._encode(batch, *args, **kwargs)
        if self._show is not None and self._plain is not None:
            plain = self._plain
            known = batch.embed if self.places.inside else None
            self._show(known or (lambda: plain.of(image)))
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
        """Within the ``with`` block the tower runs on these images, which steerings may ask about."""
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
        """Refuse a forward pass in the block that did not run through every edit: torch.compile does not look whether
        hooks were added since it compiled another tower of the same class."""
        # A replica by DataParallel has edits of its own.
        edits: list[Any] = [self.model.get_submodule(one.path) for one in self._edits]
        for one in edits:
            one.ran = False
        yield
        if not all(one.ran for one in edits):
            raise HarnessError(
                f"model {str(self.spec)!r}: the tower ran without its steering: it was code that torch.compile made "
                "for another tower; call torch._dynamo.reset() before torch.compile"
            )

    def unsteered(self, start: int = 0) -> AbstractContextManager[None]:
        """Leave the tower, within a ``with`` block, as it is without its steerings from that place on."""
        return paused(self._edits[start:])

    def encode_text(self, text: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The text embedding; steering leaves it alone."""
        return self.model.encode_text(text, *args, **kwargs)

    @_in_turn
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass of the model inside, of images and texts."""
        image = kwargs.get("image", args[0] if args else None)
        if image is None:
            return self.model(*args, **kwargs)
        with self.at_hand(image), self._all_steered():
            return self.model(*args, **kwargs)
