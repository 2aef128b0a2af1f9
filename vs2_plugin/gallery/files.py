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

import numpy as np

from vs2_plugin.arrays import Array, stack
from vs2_plugin.errors import CheckpointError
from vs2_plugin.gallery.contents import GalleryContents
from vs2_plugin.gallery.gallery import Gallery

__all__ = ["GalleryFiles", "index_file", "open_gallery"]


@dataclass(frozen=True)
class GalleryFiles:
    """What is written into a checkpoint."""

    contents: GalleryContents
    files: Sequence[Mapping[str, Path]]
    """For each part: name in the gallery, without ``.npy`` -> the file that was extracted."""

    def write(self, folder: Path) -> None:
        """Link or copy the files into ``folder``."""
        for number, files in enumerate(self.files):
            (folder / str(number)).mkdir(parents=True)
            for name, source in files.items():
                _link(source, folder / str(number) / f"{name}.npy")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(source, target)


def open_gallery(folder: Path, contents: GalleryContents, widths: Mapping[str, int]) -> Gallery:
    """Open the gallery in ``folder``, its large arrays memory-mapped.

    Args:
        folder: where its files lie.
        contents: what is there.
        widths: hookpoint -> d, for each site whose activations are wanted.

    Raises:
        CheckpointError: a file is missing or of another shape.
    """

    def read(name: str, width: int | None = None) -> list[Array]:
        return [_read(folder / str(number) / f"{name}.npy", part.count, width) for number, part in parts]

    parts = list(enumerate(contents.parts))
    *starts, _ = np.cumsum([0, *(part.classes or 0 for part in contents.parts)]).tolist()
    labels = None
    if contents.labels:
        found = read("labels")
        for (number, part), own in zip(parts, found, strict=True):
            if own.min() < 0 or own.max() >= (part.classes or 0):
                file = folder / str(number) / "labels.npy"
                raise _damaged(f"{file} holds labels from {own.min()} to {own.max()}, for {part.classes} classes")
        labels = np.concatenate([part + start for part, start in zip(found, starts, strict=True)])
    return Gallery(
        activations={site: stack(read(site, widths[site])) for site in contents.sites if site in widths},
        embeddings={
            name: stack(read(f"embedding.{name}", encoder.width)) for name, encoder in contents.encoders.items()
        },
        digests=np.concatenate(read("digests")),
        labels=labels,
        first_labels=dict(zip((part.dataset for part in contents.parts), starts, strict=True)),
        encoders=contents.encoders,
    )


def _read(path: Path, count: int, width: int | None) -> Array:
    """Read an array ``[count, width]`` as a memory map, or one ``[count]`` into memory."""
    shape = (count,) if width is None else (count, width)
    try:
        array: Array = np.load(path, mmap_mode=None if width is None else "r")
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(f"{path}: {error}") from error
    if array.shape != shape:
        raise _damaged(f"{path} has shape {array.shape}, expected {shape}")
    return array


def _damaged(problem: str) -> CheckpointError:
    return CheckpointError(f"the checkpoint's gallery is damaged: {problem}; train the checkpoint again")


def index_file(folder: Path, encoder: str) -> Path:
    """Return where the FAISS index over an encoder's embeddings lies, or will lie, in a gallery's folder."""
    return folder / f"{encoder}.faiss"
