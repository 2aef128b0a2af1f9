"""What the models of one command share: the weights of the backbone that was loaded last, and the texts that were
encoded."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from vs2_plugin.arrays import digest_of

__all__ = ["Shared", "twin"]

#: Bytes of text embeddings that are kept. Those of 1,000 classes with 80 prompts each, 1,024 wide, take 328 MB.
_LIMIT = 400_000_000


class Shared:
    """The backbone that a command loaded last, and the texts that its models encoded.

    A plain model is always loaded by the stock loader and encodes its own texts; it only lends them, and its weights,
    to the steered models that come after it. One backbone is held at a time.
    """

    def __init__(self) -> None:
        self._key: Hashable = None
        self._loaded: tuple[Any, Any, Any] | None = None
        self._texts: dict[Hashable, dict[str, Tensor]] = {}
        self._size = 0

    def load(self, stock: Callable[[], tuple[Any, Any, Any]], *arguments: Hashable) -> tuple[Any, Any, Any]:
        """Load a model by ``stock()``, and hold it for the steered ones.

        Args:
            stock: the stock loader.
            arguments: name, weights, cache and device, which it was given.
        """
        key = _key(arguments)
        if self._loaded is not None:
            self._loaded = None
            gc.collect()  # a steered model is in a circle with its edits, and would keep the weights a while
        self._loaded = model, _, _ = stock()
        self._key, self._versions, self._generator = key, _versions(model), torch.get_rng_state()
        return self._loaded

    def twin(self, stock: Callable[[], tuple[Any, Any, Any]], *arguments: Hashable) -> tuple[Any, Any, Any]:
        """The same for a steered model: a twin of the model that is held, if it is the one that ``stock()`` would load.

        The generator of random numbers is left as ``stock()`` would have left it.
        """
        if self._loaded is None or self._key != _key(arguments) or self._versions != _versions(self._loaded[0]):
            self.load(stock, *arguments)
        else:
            torch.set_rng_state(self._generator)
        assert self._loaded is not None
        model, transform, tokenizer = self._loaded
        return twin(model), transform, tokenizer

    def with_texts(self, model: Any, steered: bool) -> Any:
        """The model that was loaded last, as it is, but for texts: they are kept, and a ``steered`` one is given those
        that were kept before."""
        return _WithTexts(model, self, self._key, steered)

    def text(self, backbone: Hashable, key: str) -> Tensor | None:
        """Text embeddings that were kept, on the CPU."""
        return self._texts.get(backbone, {}).get(key)

    def keep_text(self, backbone: Hashable, key: str, embedding: Tensor) -> None:
        """Keep a copy of text embeddings as long as there is room: other backbones make room, the oldest first."""
        size = embedding.nbytes
        for other in [one for one in self._texts if one != backbone]:
            if self._size + size > _LIMIT:
                self._size -= sum(text.nbytes for text in self._texts.pop(other).values())
        if self._size + size <= _LIMIT:
            self._size += size
            self._texts.setdefault(backbone, {})[key] = embedding.detach().to("cpu", copy=True)


def _key(arguments: tuple[Hashable, ...]) -> Hashable:
    """What a model that is loaded depends on: random weights on the generator of random numbers too."""
    return (*arguments, torch.get_rng_state().numpy().tobytes())


def _versions(model: nn.Module) -> list[int]:
    """How often each of the weights was edited in place."""
    return [weight._version for weight in model.parameters()]


def twin(model: nn.Module) -> nn.Module:
    """A copy of a model that shares its weights: modules, hooks, buffers and gradients are its own."""
    weights = {id(one): nn.Parameter(one.detach(), one.requires_grad) for one in model.parameters()}
    return copy.deepcopy(model, weights)  # it copies nothing that is in there


class _WithTexts:
    """A model that is asked for the embeddings of texts that others of its backbone may have been asked for."""

    def __init__(self, model: Any, shared: Shared, backbone: Hashable, steered: bool) -> None:
        self._model, self._shared, self._backbone, self._steered = model, shared, backbone, steered
        #: Whether its first texts had the same embeddings as those kept; None as long as that is not known.
        self._same: bool | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def encode_text(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        """The text embeddings ``[batch, embed_dim]``, bit for bit those of the model.

        The first texts that others had are encoded all the same. If a bit differs (a plugin changed the text tower),
        the model encodes all of its own, and keeps none.
        """
        plain_call = isinstance(text, Tensor) and not args and not kwargs
        if not plain_call or torch.is_grad_enabled() or self._model.training or self._same is False:
            return self._model.encode_text(text, *args, **kwargs)
        kind = text.device.type
        precision = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        key = digest_of({f"{text.device} {precision}": text})
        kept = self._shared.text(self._backbone, key)
        if kept is not None and self._same:
            return kept.to(text.device, copy=True)
        embedding = self._model.encode_text(text)
        if kept is None:
            self._shared.keep_text(self._backbone, key, embedding)
        elif self._steered:
            self._same = embedding.dtype == kept.dtype and torch.equal(embedding.cpu(), kept)
        return embedding
