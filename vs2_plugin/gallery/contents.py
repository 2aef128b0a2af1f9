"""What the gallery of a checkpoint holds, as ``vs2.json`` lists it. No heavy imports."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["GalleryContents", "GalleryPart", "RetrievalEncoder", "split_name"]


@dataclass(frozen=True)
class GalleryPart:
    """The images of one data set."""

    dataset: str
    count: int
    classes: int | None
    """Labels are below this; None without labels."""
    extraction: str | None = None
    """Of checkpoints before version 0.2: what identifies the extraction that the files are of."""
    contents: dict[str, str] | None = None
    """Array -> SHA-256 that tells of its whole content (:meth:`vs2_plugin.arrays.Column.complete`); None in checkpoints
    before version 0.2, whose arrays cannot be verified."""
    left_out: tuple[str, ...] | None = None
    """Files of a folder that are no readable images, and so have no row; None if there are none."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        given = asdict(self)
        return {name: given[name] for name in given if name == "classes" or given[name] is not None}


@dataclass(frozen=True)
class RetrievalEncoder:
    """A model that embeds images for retrieval. CLIP itself has a width only: its tower is the checkpoint's."""

    width: int
    """e, the width of its embeddings."""
    model: str | None = None
    """timm's name of it."""
    weights: str | None = None
    """A file; None for timm's own weights; empty for random ones."""
    parameters: str | None = None
    """SHA-256 over its parameters and buffers; see :func:`vs2_plugin.arrays.digest_of`."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"width": self.width} if self.model is None else asdict(self)


@dataclass(frozen=True)
class GalleryContents:
    """The data sets, and what is kept of their images."""

    parts: tuple[GalleryPart, ...]
    """One per data set."""
    sites: tuple[str, ...]
    """Hookpoints whose activations are there."""
    encoders: dict[str, RetrievalEncoder]
    """The retrieval encoders whose embeddings are there, by name; ``clip`` is CLIP itself."""
    labels: bool

    @property
    def count(self) -> int:
        """The number of images."""
        return sum(part.count for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
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
