"""The gallery's files in a checkpoint: hard links to what was extracted, so that they take no room of their own.

<name>/gallery/
  0/                                         one folder per data set
    visual.transformer.resblocks.11.npy      activations [count, d], half precision, per site of an SAE
    embedding.clip.npy                       plain CLIP embeddings [count, e]; one file per retrieval encoder
    digests.npy                              uint64 [count]
    labels.npy                               int64 [count], only if asked for
  clip.faiss                                 an index, made when it is first used
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vs2_plugin.arrays import stack
from vs2_plugin.checkpoint.checkpoint import GALLERY, Checkpoint
from vs2_plugin.errors import CheckpointError
from vs2_plugin.gallery.gallery import Gallery

__all__ = ["GalleryFiles", "GalleryPart", "index_file", "open_gallery"]


@dataclass(frozen=True)
class GalleryPart:
    """The images of one data set."""

    dataset: str
    """Its name."""
    count: int
    """Images."""
    classes: int | None
    """Labels are below this; None without labels."""
    extraction: str
    """What identifies the extraction that the files are of."""
    files: Mapping[str, Path]
    """Name in the gallery, without ``.npy`` -> the file."""


@dataclass(frozen=True)
class GalleryFiles:
    """What is written into a checkpoint."""

    parts: Sequence[GalleryPart]
    """One per data set."""
    sites: Sequence[str]
    """Hookpoints whose activations are there."""
    encoders: Mapping[str, Mapping[str, Any]]
    """Encoder -> its facts, with ``width``."""
    labels: bool
    """Whether the training labels are there."""

    def write(self, folder: Path) -> dict[str, Any]:
        """Link or copy the files into ``folder``. Returns the facts for ``vs2.json``."""
        for number, part in enumerate(self.parts):
            (folder / str(number)).mkdir(parents=True)
            for name, source in part.files.items():
                _link(source, folder / str(number) / f"{name}.npy")
        return {
            "parts": [
                {key: getattr(part, key) for key in ("dataset", "count", "classes", "extraction")}
                for part in self.parts
            ],
            "sites": list(self.sites),
            "encoders": {name: dict(facts) for name, facts in self.encoders.items()},
            "labels": self.labels,
        }


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(source, target)


def open_gallery(checkpoint: Checkpoint) -> Gallery:
    """The gallery of a checkpoint, its large arrays memory-mapped.

    Raises:
        CheckpointError: there is none, or a file is missing or of another shape.
    """
    facts = checkpoint.require_gallery()
    folder = checkpoint.folder / GALLERY
    widths = {site.hookpoint: site.width for site in checkpoint.sites}

    def read(name: str, width: int | None = None) -> list[np.ndarray]:
        arrays = []
        for number, part in enumerate(facts["parts"]):
            path = folder / str(number) / f"{name}.npy"
            shape = (part["count"],) if width is None else (part["count"], width)
            try:
                array = np.load(path, mmap_mode=None if width is None else "r")
            except (OSError, ValueError, EOFError) as error:
                raise CheckpointError(f"checkpoint {checkpoint.name!r} is damaged: {path}: {error}") from error
            if array.shape != shape:
                raise CheckpointError(
                    f"checkpoint {checkpoint.name!r} is damaged: {path} has shape {array.shape}, expected {shape}"
                )
            arrays.append(array)
        return arrays

    datasets = [part["dataset"] for part in facts["parts"]]
    starts = np.cumsum([0, *(part["classes"] or 0 for part in facts["parts"])]).tolist()
    labels = None
    if facts["labels"]:
        labels = np.concatenate([part + start for part, start in zip(read("labels"), starts, strict=False)])
    return Gallery(
        activations={site: stack(read(site, widths[site])) for site in facts["sites"]},
        embeddings={
            name: stack(read(f"embedding.{name}", encoder["width"])) for name, encoder in facts["encoders"].items()
        },
        digests=np.concatenate(read("digests")),
        labels=labels,
        first_labels=dict(zip(datasets, starts, strict=False)),
        encoders=facts["encoders"],
    )


def index_file(checkpoint: Checkpoint, encoder: str) -> Path:
    """Where the FAISS index over an encoder's embeddings lies, or will lie."""
    return checkpoint.folder / GALLERY / f"{encoder}.faiss"
