"""The contents of a checkpoint's gallery, as ``vs2.json`` lists them. No heavy imports."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["GalleryContents", "GalleryPart", "RetrievalEncoder", "split_name"]


@dataclass(frozen=True)
class GalleryPart:
    """The part of a gallery that holds the images of one data set."""

    dataset: str
    count: int
    classes: int | None
    """Number of classes, which exceeds every label; None without labels."""
    extraction: str | None = None
    """Identifier of the extraction that wrote the files; only in checkpoints before version 0.2."""
    contents: dict[str, str] | None = None
    """Array name -> SHA-256 that covers its whole content (:meth:`vs2_plugin.arrays.Column.complete`); None in
    checkpoints before version 0.2, whose arrays cannot be verified."""
    left_out: tuple[str, ...] | None = None
    """Files of a folder that cannot be read as images and have no row; None if there are none."""

    def to_json(self) -> dict[str, Any]:
        """Return the part as plain JSON values, without fields that are None, except ``classes``."""
        values = asdict(self)
        return {name: values[name] for name in values if name == "classes" or values[name] is not None}


@dataclass(frozen=True)
class RetrievalEncoder:
    """A model that embeds images for retrieval. For CLIP, whose tower is the checkpoint's, only the width is given."""

    width: int
    """e, the width of the embeddings."""
    model: str | None = None
    """timm's name of the model; None for CLIP."""
    weights: str | None = None
    """A file of weights; None for timm's own weights; empty for random ones."""
    parameters: str | None = None
    """SHA-256 over the model's parameters and buffers; see :func:`vs2_plugin.arrays.digest_of`."""

    def to_json(self) -> dict[str, Any]:
        """Return the encoder as plain JSON values."""
        return {"width": self.width} if self.model is None else asdict(self)


@dataclass(frozen=True)
class GalleryContents:
    """The data sets of a gallery, and the arrays that are kept of their images."""

    parts: tuple[GalleryPart, ...]
    """The parts, one per data set."""
    sites: tuple[str, ...]
    """Hookpoints whose activations are kept."""
    encoders: dict[str, RetrievalEncoder]
    """Name -> retrieval encoder whose embeddings are kept; ``clip`` is CLIP itself."""
    labels: bool

    @property
    def count(self) -> int:
        """Number of images of all parts."""
        return sum(part.count for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        """Return the contents as plain JSON values."""
        return {
            "parts": [part.to_json() for part in self.parts],
            "sites": list(self.sites),
            "encoders": {name: encoder.to_json() for name, encoder in self.encoders.items()},
            "labels": self.labels,
        }


def split_name(text: str) -> tuple[str, str | None]:
    """Return model and weights of ``MODEL`` (timm's own weights), ``MODEL,FILE``, or ``MODEL,`` (random weights).

    >>> split_name("vit_small_patch14_dinov2"), split_name("resnet10t,"), split_name("resnet10t,w.safetensors")
    (('vit_small_patch14_dinov2', None), ('resnet10t', ''), ('resnet10t', 'w.safetensors'))
    """
    model, comma, weights = text.partition(",")
    return model, weights if comma else None
