"""The training images that a checkpoint keeps, for methods that look them up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vs2_plugin.arrays import Array, Stack
from vs2_plugin.gallery.contents import RetrievalEncoder

__all__ = ["CLIP", "Gallery"]

#: Name of the embeddings that the CLIP tower itself gives; other encoders have the names of their timm models.
CLIP = "clip"


@dataclass(frozen=True)
class Gallery:
    """The training images, in one order for all arrays. Large arrays are memory maps, and may exceed the memory."""

    activations: Mapping[str, Array | Stack]
    """By hookpoint: ``[count, d]``, half precision."""
    embeddings: Mapping[str, Array | Stack]
    """Encoder -> ``[count, e]``, half precision, not normalised. CLIP's plain embedding, ``clip``, is always there."""
    digests: Array
    """uint64 ``[count]``: tells whether a query is one of the images."""
    labels: Array | None = None
    """int64 ``[count]``: the training labels, where they were asked for. Only oracles read them."""
    first_labels: Mapping[str, int] = field(default_factory=dict)
    """Data set that the images are of -> its class 0 among the labels: the classes of one are not those of another."""
    encoders: Mapping[str, RetrievalEncoder] = field(default_factory=dict)
    """The retrieval encoders, by name."""

    @property
    def datasets(self) -> tuple[str, ...]:
        """The data sets that the images are of."""
        return tuple(self.first_labels)

    def __len__(self) -> int:
        return len(self.digests)
