"""The subject of the checks: a method on the tiny CLIP, with a few digits and a small SAE, trained once per process."""

from __future__ import annotations

import atexit
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vs2_plugin.checkpoint.checkpoint import Checkpoint
from vs2_plugin.clip.backbone import load_backbone
from vs2_plugin.clip.edits import reading
from vs2_plugin.demo.digits import CLASSES, MODEL, TEMPLATES, read_digits
from vs2_plugin.harness.loader import load
from vs2_plugin.harness.shared import Shared
from vs2_plugin.method import Scalar
from vs2_plugin.model.builder import build, read_by_all, weights_of
from vs2_plugin.model.classifier import Classifier
from vs2_plugin.model.readout import Read, plain_gallery
from vs2_plugin.model.steered import SteeredCLIP
from vs2_plugin.modelstring import ModelString, parse
from vs2_plugin.seeds import seeded
from vs2_plugin.steering.batch import Batch, call
from vs2_plugin.steering.context import Context
from vs2_plugin.training import train

__all__ = ["Act", "Subject"]

#: Number of digits that the SAE is trained on and that make the gallery, and of digits in a batch.
_TRAINED, _COUNT = 240, 8
_SETTINGS = {"model": MODEL, "samples": 20_000, "k": 16, "amp": False, "quiet": True, "gallery_labels": True}


@contextmanager
def _quietly() -> Iterator[None]:
    """Suppress warnings within a ``with`` block, such as that an SAE trained for a second is useless."""
    logger = logging.getLogger("vs2_plugin")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@cache
def _store() -> str:
    """Return a folder that is removed when the process ends."""
    folder = tempfile.mkdtemp(prefix="vs2-testing-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def _checkpoint(sae: str) -> Checkpoint:
    """Return the checkpoint, trained at the first call in a process: the plain SAE, and for ``pass`` a PASS SAE too."""
    if sae == "pass":
        _checkpoint("plain")
    pairs = list(zip(*(part[:_TRAINED] for part in read_digits("train")), strict=True))
    with _quietly():
        checkpoint = train(pairs, **_SETTINGS, store=_store(), **({"pass_weight": 0.8} if sae == "pass" else {}))
    assert isinstance(checkpoint, Checkpoint)
    return checkpoint


class _Backbone:
    """The tiny CLIP, which all models share, with the digits' classes and a few test digits."""

    def __init__(self, device: str) -> None:
        self.device, self._shared = device, Shared()
        loaded = load_backbone(MODEL, "", None, device, self._shared.twin)
        self._classes = Classifier.of(loaded.model, loaded.tokenizer, CLASSES, TEMPLATES, amp=False)
        pictures, labels = (part[: _COUNT + _COUNT // 2] for part in read_digits("test"))
        #: ``[12, 3, height, width]``.
        self.images = torch.stack(list(map(loaded.transform, pictures))).to(device)
        self.targets = torch.tensor(labels, device=device)

    def load(self, model: str, checkpoint: Checkpoint | None) -> SteeredCLIP:
        """Load a steered model, and set its classes."""
        with _quietly(), seeded(0):  # models that share weights start from the same seed
            steered, *_ = load(
                model, "", None, self.device, dataset="images", checkpoint=checkpoint, amp=False, store=_store(),
                shared=self._shared,
            )  # fmt: skip
            steered.set_classifier(self._classes, quiet=True)
        return steered


_backbone = cache(_Backbone)


class Act(NamedTuple):
    """What a method built, to be called outside a model, with an input for it."""

    call: Callable[[Tensor], Any]
    """Function from an input to what the method returns."""
    x: Tensor
    """The input: activations or embeddings of a few digits."""
    returned: tuple[int, ...]
    """Expected shape of the output for ``x``."""
    held: Callable[[], Mapping[str, Tensor | None]]
    """Returns name in words -> tensor that the method may read but not edit, with those computed on its request."""
    built: Any
    """The object that the method built."""


class Subject:
    """A method with its options, on which the checks are made."""

    def __init__(self, method: str) -> None:
        """``method``: name of the method, with options as in a model string.

        Raises:
            ModelStringError: there is no such method or option.
        """
        name, *options = method.split("@")
        self.asked = parse("@".join([f"{name}:{MODEL}", *options]))
        self.method, self.protocol = self.asked.method, self.asked.protocol
        self.on_logits = self.method.site == "logits"
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        # Options set to auto take the last of their automatic values, the one with the largest effect.
        automatic: dict[str, Scalar] = {
            option.name: option.auto[-1] for option in self.method.automatic(self.asked.options) if option.auto
        }
        #: The model string that is checked.
        self.spec = replace(self.asked, given=self.asked.given | automatic)

    @property
    def identity(self) -> ModelString | None:
        """Model string with all options that accept ``auto`` at their first automatic value; None if there are none."""
        first: dict[str, Scalar] = {option.name: option.auto[0] for option in self.method.options if option.auto}
        unset = {name for option in self.method.options if option.auto for name in option.excludes}
        options = {name: value for name, value in self.asked.given.items() if name not in unset}
        return replace(self.asked, given=options | first) if first else None

    def images(self, others: bool = False) -> tuple[Tensor, Tensor]:
        """Return eight digits ``[8, 3, height, width]`` and their true classes; with ``others``, the last four are
        other digits."""
        backbone, half = _backbone(self.device), _COUNT // 2
        rows = [*range(half), *range(half + half * others, _COUNT + half * others)]
        return backbone.images[rows], backbone.targets[rows]

    @cached_property
    def model(self) -> SteeredCLIP:
        """Steered model that most checks use."""
        return self.load()

    def load(self, spec: ModelString | None = None) -> SteeredCLIP:
        """Load the steered model anew. Raises Vs2Error if it cannot be built."""
        spec = spec or self.spec
        return _backbone(self.device).load(
            str(spec), _checkpoint(self.method.sae) if spec.needs_checkpoint else None
        )

    def outcome(self, model: SteeredCLIP, images: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return the embeddings ``[8, embed_dim]`` of images, or logits ``[8, classes]`` for a method on logits."""
        pixels, targets = images or self.images()
        model.reset_statistics()
        model.set_targets(targets)
        if model.readout is None:
            return model.encode_image(pixels)
        Read(model, model.readout).encode_image(pixels)
        return model.readout.logits()

    @contextmanager
    def act(self) -> Iterator[Act]:
        """Yield what the method built, with an input for it, within a ``with`` block."""
        model, (images, targets) = self.model, self.images()
        model.set_targets(targets)
        place = model.places[-1]
        with torch.no_grad():
            with model.unsteered(), reading(model.model, [place.site]) as seen:
                plain = model.model.encode_image(images)
            if self.on_logits:
                yield self._reading(model, F.normalize(plain.float(), dim=-1), images)
                return
            with model.at_hand(images) as batch:
                batch.embed = lambda: plain
                x = seen[place.site].float()
                sae = None if place.gate is None else place.gate.sae

                def held() -> dict[str, Tensor | None]:
                    return {**weights_of(model.model), **read_by_all(sae, place.retriever, batch)}

                first = Batch(images[:1], None if targets is None else targets[:1], embed=lambda: plain[:1])

                def steer(z: Tensor) -> Any:
                    return call(place.steering, z, batch if len(z) == len(x) else first)

                yield Act(steer, x, tuple(x.shape), held, place.steering)

    def _reading(self, model: SteeredCLIP, x: Tensor, images: Tensor) -> Act:
        """Return what a method on logits built, with an input of the kind that its protocol asks for."""
        assert model.classifier is not None and model.readout is not None and self.spec.reading is not None
        classifier, unlabeled = F.normalize(model.classifier.weights.float(), dim=0), None
        if model.readout.views > 1:
            noise = torch.randn(len(x), model.readout.views - 1, x.shape[1], generator=torch.Generator().manual_seed(0))
            x = F.normalize(torch.cat([x[:, None], x[:, None] + 0.02 * noise.to(x)], dim=1), dim=-1)
        if self.protocol == "unlabeled" and model.checkpoint is not None:
            unlabeled = plain_gallery(model.checkpoint.open_gallery(), x.device)
        if self.protocol == "transductive":
            unlabeled = x.clone()
        context = Context(model.model, "logits", x.shape[-1], classifier=classifier, unlabeled=unlabeled)
        options = {option.name: self.spec.options[option.name] for option in self.method.options}
        read = build(self.method, context, options)
        x = x[:1] if self.protocol == "stream" else x
        batch = Batch(rows=torch.arange(len(x))) if self.protocol == "transductive" else Batch(images[: len(x)])
        held = {"context.classifier": classifier, **({} if unlabeled is None else {"context.unlabeled": unlabeled})}
        return Act(lambda z: call(read, z, batch), x, (len(x), classifier.shape[1]), lambda: held, read)
