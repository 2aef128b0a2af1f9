"""The gallery's files in a checkpoint: hard links to the extracted files, so that they take no further disk space.

gallery/
  0/                                         one folder per data set
    visual.transformer.resblocks.11.npy      activations [count, d], half precision, per site of an SAE
    embedding.clip.npy                       plain CLIP embeddings [count, e]; one file per retrieval encoder
    digests.npy                              uint64 [count]
    labels.npy                               int64 [count], only if asked for
    *.npy.sha256                             digests of an array's rows; see arrays.Column
    verified.json                            arrays that were compared with their digests and are untouched since
  clip.faiss                                 index of FAISS, built at the first search
  auto/                                      automatic choices; see model.automatic
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vs2_plugin.arrays import Array, check_all, stack, sums_of, trust_all
from vs2_plugin.errors import CheckpointError
from vs2_plugin.files import hidden
from vs2_plugin.gallery.contents import GalleryContents, GalleryPart
from vs2_plugin.gallery.gallery import Gallery

__all__ = ["GalleryFiles", "index_file", "open_gallery"]


@dataclass(frozen=True)
class GalleryFiles:
    """The files of a gallery that is to be written into a checkpoint."""

    contents: GalleryContents
    files: Sequence[Mapping[str, Path]]
    """For each part: name in the gallery, without ``.npy`` -> extracted file."""

    def write(self, folder: Path) -> None:
        """Link or copy the files into ``folder``."""
        for number, (part, files) in enumerate(zip(self.contents.parts, self.files, strict=True)):
            own = folder / str(number)
            own.mkdir(parents=True)
            linked = [_link(source, own / f"{name}.npy") for name, source in files.items()]
            if part.contents is not None:
                for name, source in files.items():
                    _link(sums_of(source), sums_of(own / f"{name}.npy"))
                if all(linked):  # they were compared when the cache was opened
                    trust_all(own, _digests(part))


def _link(source: Path, target: Path) -> bool:
    """Link a file, or copy it if that fails. Return whether the file is linked."""
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(source, target)
        return False
    return True


def _digests(part: GalleryPart) -> dict[str, str]:
    """Return file name -> digest for the arrays of a part."""
    return {f"{name}.npy": digest for name, digest in (part.contents or {}).items()}


def _verify(folder: Path, part: GalleryPart, thorough: bool = False) -> None:
    """Raise CheckpointError if an array of a part is not as it was written; see :func:`vs2_plugin.arrays.check_all`."""
    try:
        check_all(folder, _digests(part), thorough)
    except OSError as error:
        reason = hidden(error, Path(error.filename or folder))
        raise CheckpointError(reason) if reason else _damaged(f"{error.filename}: {error.strerror}") from error
    except ValueError as error:
        raise _damaged(str(error)) from error


def open_gallery(
    folder: Path, contents: GalleryContents, widths: Mapping[str, int], thorough: bool = False
) -> Gallery:
    """Open the gallery in ``folder``, its large arrays memory-mapped.

    Args:
        folder: folder of the gallery's files.
        contents: contents of the gallery.
        widths: hookpoint -> d, for each site whose activations are to be opened.
        thorough: compare every array with its digests; otherwise only arrays touched since the last comparison.

    Raises:
        CheckpointError: a file is missing, has another shape, or is not as it was written.
    """

    def read(name: str, width: int | None = None) -> list[Array]:
        return [_read(folder / str(number) / f"{name}.npy", part.count, width) for number, part in parts]

    parts = list(enumerate(contents.parts))
    for number, part in parts:
        _verify(folder / str(number), part, thorough)
    *starts, _ = np.cumsum([0, *(part.classes or 0 for part in contents.parts)]).tolist()
    labels = None
    if contents.labels:
        label_arrays = read("labels")
        for (number, part), own in zip(parts, label_arrays, strict=True):
            if own.min() < 0 or own.max() >= (part.classes or 0):
                file = folder / str(number) / "labels.npy"
                raise _damaged(f"{file} holds labels from {own.min()} to {own.max()}, for {part.classes} classes")
        labels = np.concatenate([part + start for part, start in zip(label_arrays, starts, strict=True)])
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
        array: Array = np.load(path, mmap_mode="r")  # mapped, so the size in a damaged header is not allocated
    except Exception as error:  # numpy raises anything for a damaged header
        raise _damaged(f"{path}: {error}") from error
    if array.shape != shape:
        raise _damaged(f"{path} has shape {array.shape}, expected {shape}")
    return np.array(array) if width is None else array


def _damaged(problem: str) -> CheckpointError:
    return CheckpointError(f"the checkpoint's gallery is damaged: {problem}; train the checkpoint again")


def index_file(folder: Path, encoder: str) -> Path:
    """Return where the FAISS index over an encoder's embeddings lies, or will lie, in a gallery's folder."""
    return folder / f"{encoder}.faiss"
