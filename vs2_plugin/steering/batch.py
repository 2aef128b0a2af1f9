"""The images at hand: what steerings ask about them is computed once. And how a steering is called with them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vs2_plugin.devices import to_processor
from vs2_plugin.errors import HarnessError, PluginError
from vs2_plugin.sae.topk import TopKSAE
from vs2_plugin.steering.move import Code, Move

__all__ = ["Batch", "Steering", "call", "steer", "unchanged"]

T = TypeVar("T")


class Batch:
    """A batch of images on its way through a tower.

    A steering that has a parameter ``batch`` is given one in each forward pass; a plain ``steer(x)`` is not. Several
    steerings of the same images (sites, methods, points of a sweep) share it, and with it all that :meth:`once` keeps.
    """

    def __init__(
        self,
        images: Tensor | None = None,
        targets: Tensor | None = None,
        rows: Tensor | None = None,
        embed: Callable[[], Tensor] | None = None,
    ) -> None:
        """
        Args:
            images: ``[batch, 3, height, width]``, as preprocessed for the tower; None where they are not at hand.
            targets: true classes, int64 ``[batch]``, for oracles.
            rows: int64 ``[batch]``, where the images are some of the gallery's.
            embed: gives the plain CLIP embedding ``[batch, embed_dim]``; called at most once.
        """
        self.images, self.targets, self.rows, self.embed = images, targets, rows, embed
        #: Where nobody waits for a GPU: told what is taken to be False of every image, bool ``[batch]``.
        self.assume: Callable[[Tensor], None] | None = None
        self._known: dict[Hashable, Any] = {}
        self._codes: dict[Hashable, tuple[Tensor, Code]] = {}

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """The result of ``make()``, which is called for the first ask under ``key``; objects in a key count by
        identity, or by their own equality."""
        if key not in self._known:
            self._known[key] = make()
        value: T = self._known[key]
        return value

    def known(self, key: Hashable) -> Any:
        """What :meth:`once` keeps under ``key``; None if that was not asked for yet."""
        return self._known.get(key)

    def embedding(self) -> Tensor:
        """The plain CLIP embedding: float32 ``[batch, embed_dim]``, of unit norm.

        Raises:
            HarnessError: the tower runs by itself, outside of ``encode_image``, so that the images are not known.
        """
        if self.embed is None:
            raise HarnessError(
                "methods with a gallery steer within encode_image only; call model.encode_image. (A method that asks "
                "for batch.embedding() before the tower's end has to declare a gallery.)"
            )
        embed = self.embed
        return self.once("embedding", lambda: F.normalize(embed().float(), dim=-1))

    def ask(self, of_images: Tensor) -> Callable[[], Tensor]:
        """Begin to copy what is known of each image, bool ``[batch]``, to the processor. What is returned waits for it,
        and gives it; where nobody waits, it gives False of every image."""
        if self.assume is None:
            return to_processor(of_images)
        self.assume(of_images)
        return lambda: torch.zeros(len(of_images), dtype=torch.bool)

    def code(self, sae: TopKSAE, x: Tensor) -> Code:
        """The sparse code of activations ``[batch, d]``, computed once for the same tensor."""
        key = sae, id(x)
        if key not in self._codes:  # the tensor is kept beside its code: as long as it lives, no other has its id
            self._codes[key] = x, Code.of(sae, x)
        return self._codes[key][1]

    def shared(self) -> dict[str, Tensor | None]:
        """The tensors that all steerings of these images read, by their names in words."""
        named = {"batch.images": self.images, "batch.targets": self.targets, "batch.rows": self.rows}
        named["batch.embedding()"] = self.known("embedding")
        for number, (_, code) in enumerate(self._codes.values()):
            named |= {f"batch.code() {number}, its {part}": tensor for part, tensor in code.tensors().items()}
        return named


#: What a method builds: from activations ``[batch, d]``, and the batch where it has a parameter of that name.
Steering = Callable[..., Tensor | Move]


def call(steering: Steering, x: Tensor, batch: Batch) -> Any:
    """Call a steering on activations ``[batch, d]`` of the images at hand.

    A plain function of x is given a copy, which it may edit in place. One that has a parameter ``batch`` is given x
    itself, so that ``batch.code(sae, x)`` is the code that others have asked for.

    Returns:
        What it gives: activations ``[batch, d]``, or a :class:`Move`.
    """
    function = steering.forward if isinstance(steering, nn.Module) else steering
    try:
        wants_batch = "batch" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # some functions written in C tell nothing of themselves
        wants_batch = False
    return steering(x, batch=batch) if wants_batch else steering(x.clone())


def steer(steering: Steering, x: Tensor, batch: Batch) -> Tensor:
    """The steered activations ``[batch, d]``: what :func:`call` gives, moves applied.

    Raises:
        PluginError: it gives anything but a tensor of the shape, dtype and device of x.
    """
    steered = call(steering, x, batch)
    result = steered.apply(x) if isinstance(steered, Move) else steered
    if not isinstance(result, Tensor):
        raise PluginError(f"the steering returned {type(result).__name__}; expected activations {tuple(x.shape)}")
    for what in ("shape", "dtype", "device", "layout"):
        found, expected = getattr(result, what), getattr(x, what)
        if found != expected:
            words = (tuple(found), tuple(expected)) if what == "shape" else (found, expected)
            raise PluginError(f"the steering returned activations of {what} {words[0]}; expected {words[1]}")
    return result


@contextmanager
def unchanged(held: Callable[[], Mapping[str, Tensor | None]]) -> Iterator[None]:
    """Refuse edits in place, within a ``with`` block, of the tensors that ``held()`` names. It costs microseconds.

    Raises:
        PluginError: one of them was edited, or another put in its place.
    """
    before = {name: (tensor, _version(tensor)) for name, tensor in held().items() if tensor is not None}
    yield
    after = held()
    for name, (tensor, version) in before.items():
        if after.get(name) is not tensor or _version(tensor) != version:
            raise PluginError(f"the steering edited {name} in place; expected new tensors, or a copy that it edits")


def _version(tensor: Tensor) -> int:
    """How often it was edited in place; tensors of the inference mode do not tell."""
    return 0 if tensor.is_inference() else tensor._version
