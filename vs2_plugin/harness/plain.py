"""What the plain model makes of the images that a steered model encodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vs2_plugin.clip.sites import Edit, Site, finish, paused

__all__ = ["PlainEmbedding"]


class PlainEmbedding:
    """The plain model's embedding of each batch that a steered model encodes, while images are recorded.

    Where the first steering is at the tower's end, what is left of the tower runs on the activation there. Whether that
    gives the same bits as the whole tower, the first batch of each shape tells. Where it does not, and with a steering
    further in, the whole tower runs once more.
    """

    def __init__(
        self, model: nn.Module, edits: Sequence[Edit], end: Site | None, show: Callable[[Callable[[], Tensor]], None]
    ) -> None:
        self._model, self._edits, self._end, self._show = model, edits, end, show
        self._exact: dict[torch.Size, bool] = {}
        # In front of the steering's own hook.
        self._hook = end and end.module(model).register_forward_hook(self._keep, prepend=True)

    def _keep(self, module: nn.Module, args: object, output: Tensor | tuple) -> None:
        self._activation = self._end.read(output).clone()  # a plugin may edit in place what it is given

    def show(self, image: Tensor, plain: Tensor | None) -> None:
        """Show the plain embedding of the batch just encoded, which may be known already."""
        self._show(lambda: self._embedding(image) if plain is None else plain)

    def _embedding(self, image: Tensor) -> Tensor:
        found = None if self._end is None else finish(self._model, self._end, self._activation)
        if self._exact.get(image.shape):
            return found
        with paused(self._edits):
            plain = self._model.encode_image(image)
        self._exact[image.shape] = found is not None and found.dtype == plain.dtype and torch.equal(found, plain)
        return plain

    def remove(self) -> None:
        """Take out the hook."""
        if self._hook is not None:
            self._hook.remove()
