"""The training images that a checkpoint keeps, for methods that look them up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vs2_plugin.arrays import Array, Stack
from vs2_plugin.gallery.contents import RetrievalEncoder

__all__ = ["CLIP", "Gallery"]

#: Name of the CLIP tower's own embeddings; other encoders are named by their timm models.
CLIP = "clip"


@dataclass(frozen=True)
class Gallery:
    """The training images, in one order for all arrays. Large arrays are memory maps, which may exceed the memory."""

    activations: Mapping[str, Array | Stack]
    """Hookpoint -> activations ``[count, d]``, half precision."""
    embeddings: Mapping[str, Array | Stack]
    """Encoder name -> embeddings ``[count, e]``, half precision, not normalised; ``clip``, CLIP's own, always exist."""
    digests: Array
    """Image digests, uint64 ``[count]``, by which a query that is one of the images is recognised."""
    labels: Array | None = None
    """Training labels, int64 ``[count]``; None unless asked for. Only oracles read them."""
    first_labels: Mapping[str, int] = field(default_factory=dict)
    """Data set of the images -> label of its class 0, since the classes of each data set have labels of their own."""
    encoders: Mapping[str, RetrievalEncoder] = field(default_factory=dict)
    """Name -> retrieval encoder."""

    @property
    def datasets(self) -> tuple[str, ...]:
        """Names of the data sets of the images."""
        return tuple(self.first_labels)

    def __len__(self) -> int:
        return len(self.digests)
