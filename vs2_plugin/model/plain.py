"""Computes the plain model's embedding of the images that a steered model encodes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vs2_plugin.clip.edits import Edit, paused
from vs2_plugin.clip.sites import ClipModel, finish

__all__ = ["PlainEmbedding"]


class PlainEmbedding:
    """The plain model's embedding of each batch that a steered model encodes, bit for bit.

    Where the first edit is at the tower's end, only the rest of the tower runs on the activation kept there. The first
    batch of each shape shows whether this gives the same bits as the whole tower. If not, or if an edit is further in,
    the whole tower runs once more.
    """

    def __init__(self, model: ClipModel, edits: Sequence[Edit], inside: bool) -> None:
        """``inside``: whether the first edit is before the tower's end."""
        self._model, self._edits = model, edits
        self._exact: dict[torch.Size, bool] = {}
        edits[0].keeping = not inside

    def of(self, image: Tensor) -> Tensor:
        """Return the plain embedding ``[batch, embed_dim]`` of the images that were just encoded."""
        before, quick = self._edits[0].before, None
        if before is not None and self._exact.get(image.shape, True):
            quick = finish(self._model, self._edits[0].site, before)
            if image.shape in self._exact:
                return quick
        with paused(self._edits):
            plain: Tensor = self._model.encode_image(image)
        if quick is not None:
            self._exact[image.shape] = quick.dtype == plain.dtype and torch.equal(quick, plain)
        return plain

    def stop(self) -> None:
        """Stop keeping activations, and drop the kept one."""
        self._edits[0].keeping, self._edits[0].before = False, None
