"""The batch of images under evaluation, which caches results for all steerings; and calls of steerings with a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vs2_plugin.devices import to_processor
from vs2_plugin.errors import HarnessError, PluginError, Vs2Error, is_interruption
from vs2_plugin.plugin_faults import fault_of
from vs2_plugin.sae.topk import TopKSAE
from vs2_plugin.steering.move import Code, Move

__all__ = ["Batch", "Steering", "blamed", "call", "steer", "unchanged"]

T = TypeVar("T")


class Batch:
    """A batch of images on its way through a tower.

    A steering with a parameter ``batch`` gets the batch in each forward pass; a plain ``steer(x)`` does not. Several
    steerings of the same images (sites, methods, points of a sweep) share one batch, and the results of :meth:`once`.
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
            images: ``[batch, 3, height, width]``, preprocessed for the tower; None where they are not available.
            targets: true classes, int64 ``[batch]``, for oracles.
            rows: row numbers in the gallery, int64 ``[batch]``, if the images are from the gallery.
            embed: returns the plain CLIP embedding ``[batch, embed_dim]``; called at most once.
        """
        self.images, self.targets, self.rows, self.embed = images, targets, rows, embed
        #: Set where nothing may wait for the GPU: called with each bool ``[batch]`` that :meth:`ask` takes to be False.
        self.assume: Callable[[Tensor], None] | None = None
        self._known: dict[Hashable, Any] = {}
        self._codes: dict[Hashable, tuple[Tensor, Code]] = {}

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the result of ``make()``, which is called only for the first request of ``key``; objects in a key are
        compared by identity, or by their own equality."""
        if key not in self._known:
            self._known[key] = make()
        value: T = self._known[key]
        return value

    def known(self, key: Hashable) -> Any:
        """Return the result that :meth:`once` has cached under ``key``; None if there is none yet."""
        return self._known.get(key)

    def embedding(self) -> Tensor:
        """Return the plain CLIP embedding: float32 ``[batch, embed_dim]``, of unit norm.

        Raises:
            HarnessError: the tower is called directly, not by ``encode_image``, so that the images are unknown.
        """
        if self.embed is None:
            raise HarnessError(
                "methods with a gallery steer within encode_image only; call model.encode_image. (A method that asks "
                "for batch.embedding() before the tower's end has to declare a gallery.)"
            )
        embed = self.embed
        return self.once("embedding", lambda: F.normalize(embed().float(), dim=-1))

    def ask(self, of_images: Tensor) -> Callable[[], Tensor]:
        """Begin to copy ``of_images``, bool ``[batch]``, to the CPU. Return a function that waits for the copy and
        returns it; where :attr:`assume` is set, the function returns False for every image without waiting."""
        if self.assume is None:
            return to_processor(of_images)
        self.assume(of_images)
        return lambda: torch.zeros(len(of_images), dtype=torch.bool)

    def code(self, sae: TopKSAE, x: Tensor) -> Code:
        """Return the sparse code of activations ``[batch, d]``, computed once per SAE and tensor."""
        key = sae, id(x)
        if key not in self._codes:  # the tensor is kept with its code, so that no other tensor can get its id
            self._codes[key] = x, Code.of(sae, x)
        return self._codes[key][1]

    def shared(self) -> dict[str, Tensor | None]:
        """Return the tensors that all steerings of these images share, by a name for messages."""
        named = {"batch.images": self.images, "batch.targets": self.targets, "batch.rows": self.rows}
        named["batch.embedding()"] = self.known("embedding")
        for number, (_, code) in enumerate(self._codes.values()):
            named |= {f"batch.code() {number}, its {part}": tensor for part, tensor in code.tensors().items()}
        return named


#: A method builds this: a function of activations ``[batch, d]`` and, if it has such a parameter, of ``batch``.
Steering = Callable[..., Tensor | Move]


def call(steering: Steering, x: Tensor, batch: Batch) -> Any:
    """Call a steering on activations ``[batch, d]`` of the images of ``batch``.

    A plain function of x gets a copy, which it may edit in place. A steering with a parameter ``batch`` gets x itself,
    so that ``batch.code(sae, x)`` is the code that it shares with others.

    Returns:
        The steering's result: activations ``[batch, d]``, or a :class:`Move`.

    Raises:
        PluginError: the steering raised an exception that is not of this package, or would have ended the process.
    """
    function = steering.forward if isinstance(steering, nn.Module) else steering
    try:
        wants_batch = "batch" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # some functions written in C have no signature
        wants_batch = False
    with blamed():
        return steering(x, batch=batch) if wants_batch else steering(x.clone())


@contextmanager
def blamed() -> Iterator[None]:
    """Raise PluginError, with file and line, for what the code of a plugin raises within a ``with`` block; memory that
    runs out, and an interruption, are not its fault."""
    try:
        yield
    except (Vs2Error, MemoryError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:
        if is_interruption(error):
            raise
        raise PluginError(fault_of(error)) from error


def steer(steering: Steering, x: Tensor, batch: Batch) -> Tensor:
    """Return the steered activations ``[batch, d]``: the result of :func:`call`, with a move applied.

    Raises:
        PluginError: the result is not a tensor of the shape, dtype, device and layout of x.
    """
    steered = call(steering, x, batch)
    with blamed():  # a move may compute its code only now
        result = steered.apply(x) if isinstance(steered, Move) else steered
    if not isinstance(result, Tensor):
        raise PluginError(f"the steering returned {type(result).__name__}; expected activations {tuple(x.shape)}")
    for what in ("shape", "dtype", "device", "layout"):
        actual, expected = getattr(result, what), getattr(x, what)
        if actual != expected:
            words = (tuple(actual), tuple(expected)) if what == "shape" else (actual, expected)
            raise PluginError(f"the steering returned activations of {what} {words[0]}; expected {words[1]}")
    return result


@contextmanager
def unchanged(
    held: Callable[[], Mapping[str, Tensor | None]], weights: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """Refuse in-place edits, within a ``with`` block, of the tensors that ``held()`` returns and of ``weights``. Takes
    microseconds, since torch counts the edits, though not those by ``.data`` or ``.numpy()``, nor those of tensors of
    the inference mode, of which no weight may be one.

    Raises:
        PluginError: one of the tensors was edited, or replaced by another.
    """
    before = {name: (tensor, _version(tensor)) for name, tensor in held().items() if tensor is not None}
    weights = {} if weights is None or torch.compiler.is_compiling() else weights
    edits = [weight._version for weight in weights.values()]  # a list, as there may be hundreds
    yield
    for name, weight, count in zip(weights, weights.values(), edits, strict=True):
        if weight._version != count:
            raise _edited(name)
    after = held()
    for name, (tensor, version) in before.items():
        if after.get(name) is not tensor or _version(tensor) != version:
            raise _edited(name)


def _edited(name: str) -> PluginError:
    return PluginError(f"the steering edited {name} in place; expected new tensors, or a copy that it edits")


def _version(tensor: Tensor) -> int:
    """Return how often a tensor was edited in place; 0 for tensors of the inference mode, which do not count edits."""
    return 0 if tensor.is_inference() else tensor._version
