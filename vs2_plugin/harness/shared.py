"""State that the models of one command share: the weights of the backbone that was loaded last, and the embeddings of
texts."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from vs2_plugin.arrays import digest_of

__all__ = ["Shared", "twin"]

#: Limit on the bytes of cached text embeddings. Those of 1,000 classes with 80 prompts each, 1,024 wide, take 328 MB.
_LIMIT = 400_000_000


class Shared:
    """The backbone that a command loaded last, and the text embeddings of its models.

    A plain model is always loaded by the stock loader and encodes its own texts; later steered models reuse its
    weights and text embeddings. One backbone is held at a time.
    """

    def __init__(self) -> None:
        self._key: Hashable = None
        self._loaded: tuple[Any, Any, Any] | None = None
        self._texts: dict[Hashable, dict[str, Tensor]] = {}
        self._size = 0

    def load(self, stock: Callable[[], tuple[Any, Any, Any]], *arguments: Hashable) -> tuple[Any, Any, Any]:
        """Load a model by ``stock()``, and hold it for later steered models.

        Args:
            stock: the stock loader.
            arguments: name, weights, cache folder and device that the loader was given.
        """
        key = _key(arguments)
        if self._loaded is not None:
            self._loaded = None
            gc.collect()  # a steered model and its edits form a cycle, which would keep the weights a while
        self._loaded = model, _, _ = stock()
        self._key, self._versions, self._generator = key, _versions(model), torch.get_rng_state()
        return self._loaded

    def twin(self, stock: Callable[[], tuple[Any, Any, Any]], *arguments: Hashable) -> tuple[Any, Any, Any]:
        """Return a twin of the model that is held, for steering, or of the one of ``stock()`` if that differs.

        The random number generator is left in the state in which ``stock()`` would leave it.
        """
        if self._loaded is None or self._key != _key(arguments) or self._versions != _versions(self._loaded[0]):
            self.load(stock, *arguments)
        else:
            torch.set_rng_state(self._generator)
        assert self._loaded is not None
        model, transform, tokenizer = self._loaded
        return twin(model), transform, tokenizer

    def with_texts(self, model: Any, steered: bool) -> Any:
        """Return ``model``, which was loaded last, wrapped so that its text embeddings are cached; a ``steered`` one
        also reuses those cached before."""
        return _WithTexts(model, self, self._key, steered)

    def text(self, backbone: Hashable, key: str) -> Tensor | None:
        """Return cached text embeddings, on the CPU, or None."""
        return self._texts.get(backbone, {}).get(key)

    def keep_text(self, backbone: Hashable, key: str, embedding: Tensor) -> None:
        """Cache a copy of text embeddings if there is room; other backbones' are dropped for it, the oldest first."""
        size = embedding.nbytes
        for other in [name for name in self._texts if name != backbone]:
            if self._size + size > _LIMIT:
                self._size -= sum(text.nbytes for text in self._texts.pop(other).values())
        if self._size + size <= _LIMIT:
            self._size += size
            self._texts.setdefault(backbone, {})[key] = embedding.detach().to("cpu", copy=True)


def _key(arguments: tuple[Hashable, ...]) -> Hashable:
    """Return a key of all that a loaded model depends on; random weights depend on the random state too."""
    return (*arguments, torch.get_rng_state().numpy().tobytes())


def _versions(model: nn.Module) -> list[int]:
    """Return how often each of the weights was edited in place."""
    return [weight._version for weight in model.parameters()]


def twin(model: nn.Module) -> nn.Module:
    """Return a copy of a model that shares its weights, with modules, hooks, buffers and gradients of its own."""
    weights = {id(weight): nn.Parameter(weight.detach(), weight.requires_grad) for weight in model.parameters()}
    return copy.deepcopy(model, weights)  # deepcopy uses the entries of ``weights`` instead of copies


class _WithTexts:
    """A model whose text embeddings are cached, and may be reused by other models of its backbone."""

    def __init__(self, model: Any, shared: Shared, backbone: Hashable, steered: bool) -> None:
        self._model, self._shared, self._backbone, self._steered = model, shared, backbone, steered
        #: Whether its first text embeddings equal the cached ones; None until they have been compared.
        self._same: bool | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def encode_text(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the text embeddings ``[batch, embed_dim]``, bit for bit those of the model.

        The first texts that are found in the cache are encoded all the same, to compare. If a bit differs (a plugin
        changed the text tower), the model encodes all further texts itself, and none is cached.
        """
        plain_call = isinstance(text, Tensor) and not args and not kwargs
        if not plain_call or torch.is_grad_enabled() or self._model.training or self._same is False:
            return self._model.encode_text(text, *args, **kwargs)
        kind = text.device.type
        precision = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        key = digest_of({f"{text.device} {precision}": text})
        cached = self._shared.text(self._backbone, key)
        if cached is not None and self._same:
            return cached.to(text.device, copy=True)
        embedding = self._model.encode_text(text)
        if cached is None:
            self._shared.keep_text(self._backbone, key, embedding)
        elif self._steered:
            self._same = embedding.dtype == cached.dtype and torch.equal(embedding.cpu(), cached)
        return embedding
