"""The plain model's embedding of the images that a steered model encodes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vs2_plugin.clip.edits import Edit, paused
from vs2_plugin.clip.sites import ClipModel, finish

__all__ = ["PlainEmbedding"]


class PlainEmbedding:
    """The plain model's embedding of each batch that a steered model encodes, bit for bit.

    Where the first edit is at the tower's end, what is left of the tower runs on the activation there. Whether that
    gives the same bits as the whole tower, the first batch of each shape tells. Where it does not, and with an edit
    further in, the whole tower runs once more.
    """

    def __init__(self, model: ClipModel, edits: Sequence[Edit], inside: bool) -> None:
        """``inside``: whether the first edit is before the tower's end."""
        self._model, self._edits, self._inside = model, edits, inside
        self._exact: dict[torch.Size, bool] = {}
        edits[0].keeping = not inside

    def of(self, image: Tensor) -> Tensor:
        """The plain embedding ``[batch, embed_dim]`` of the batch just encoded."""
        before = self._edits[0].before
        quick = None if self._inside or before is None else finish(self._model, self._edits[0].site, before)
        if quick is not None and self._exact.get(image.shape):
            return quick
        with paused(self._edits):
            plain: Tensor = self._model.encode_image(image)
        self._exact[image.shape] = quick is not None and quick.dtype == plain.dtype and torch.equal(quick, plain)
        return plain

    def stop(self) -> None:
        """Keep no more activations."""
        self._edits[0].keeping, self._edits[0].before = False, None
