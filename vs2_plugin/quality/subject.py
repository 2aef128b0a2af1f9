"""The subject of a measurement: an SAE of a checkpoint, with the activations, embeddings and labels at hand."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vs2_plugin.checkpoint.checkpoint import Checkpoint
from vs2_plugin.checkpoint.records import SiteSAE
from vs2_plugin.checkpoint.store import Store
from vs2_plugin.data.given import read_activations
from vs2_plugin.errors import CheckpointError, DataError
from vs2_plugin.gallery.gallery import CLIP
from vs2_plugin.sae.fit import HELD_OUT, held_out_fvu, parted
from vs2_plugin.sae.source import Rows, Source
from vs2_plugin.sae.topk import TopKSAE
from vs2_plugin.text import counted

__all__ = ["Images", "Subject", "open_elsewhere", "open_subject", "require_comparable"]

#: File name endings of activations.
_FILES = (".npy", ".safetensors")
#: How far, as a share of it, a FVU may be from the recorded one, by rounding on another machine.
_SAME = 0.01


@dataclass(frozen=True)
class Images:
    """Activations, embeddings and labels of images, in the same order in all arrays."""

    about: str
    activations: Rows
    """``[count, d]``, at the SAE's site."""
    embeddings: Rows
    """``[count, e]``: the embeddings by which images are compared."""
    embedded_by: str
    held: np.ndarray
    """int64: numbers of at most 10,000 images that the SAE was not trained on, as far as is known."""
    others: np.ndarray
    """int64: numbers of the images that the SAE was trained on, in random order; empty if there are none."""
    labels: np.ndarray | None = None
    """int64 ``[count]``: classes of the images."""
    datasets: tuple[str, ...] = ()
    """The data sets whose classes the labels number, one after another; empty where a file gives the labels."""

    @property
    def held_out(self) -> str:
        """Number of the images :attr:`held`, in words, and whether the SAE was trained on them. That is known where
        those of its training can be told."""
        known = "was not trained on" if len(self.others) else "may have been trained on"
        return f"{counted(len(self.held), 'image')} that it {known}"


@dataclass(frozen=True)
class Subject:
    """An SAE with the images that it is measured on."""

    checkpoint: Checkpoint
    site: SiteSAE
    sae: TopKSAE
    images: Images | None
    """None if no images are at hand."""

    @property
    def name(self) -> str:
        """The checkpoint's name, followed by the SAE's folder if the checkpoint has several SAEs."""
        return self.checkpoint.name + (f", {self.site.folder}" if len(self.checkpoint.sites) > 1 else "")


def open_subject(
    name: str, store: Store, block: int | None = None, variant: str = "plain", activations: Path | None = None,
    labels: Path | None = None,
) -> Subject:  # fmt: skip
    """Read an SAE with its activations, embeddings and labels.

    Args:
        name: name of the checkpoint, its folder, or ``hf:owner/name``.
        store: the store that holds the checkpoint.
        block: block of the SAE; by default, the last one.
        variant: ``plain``, or ``pass``.
        activations: a file of activations in place of the checkpoint's gallery.
        labels: a ``.npy`` file with the labels of ``activations``.

    Raises:
        CheckpointError: there is no such SAE, or the checkpoint is damaged.
        DataError: a file cannot be read, or does not fit the SAE.
    """
    checkpoint = store.find(name)
    [site] = checkpoint.select(block, variant)
    sae, _ = checkpoint.sae(site)
    images = None
    if activations is not None:
        images = _given(site, sae, activations, labels)
    elif checkpoint.gallery is not None and site.hookpoint in checkpoint.gallery.sites:
        images = _gallery(checkpoint, site)
    return Subject(checkpoint, site, sae, images)


def _gallery(checkpoint: Checkpoint, site: SiteSAE) -> Images:
    """Return the training images that a checkpoint keeps."""
    gallery = checkpoint.open_gallery()
    others = [name for name in gallery.embeddings if name != CLIP]
    encoder = others[0] if others else CLIP  # CLIP's own embeddings are the least independent of the SAE
    held, rest = _parted(site, len(gallery))
    return Images(
        f"{checkpoint.data}, from the gallery", gallery.activations[site.hookpoint], gallery.embeddings[encoder],
        "CLIP itself" if encoder == CLIP else encoder, held, rest, gallery.labels,
        gallery.datasets,
    )  # fmt: skip


def _given(site: SiteSAE, sae: TopKSAE, path: Path, labels: Path | None) -> Images:
    """Return activations of a file. By their mean it is decided whether the SAE was trained on them, and by the FVU of
    the held-out ones whether they are in the order in which it was."""
    rows = read_rows(path, site)
    held, rest = _parted(site, len(rows))
    mean = np.mean(rows, axis=0, dtype=np.float64)
    own = len(rest) > 0 and np.allclose(mean, site.mean, rtol=1e-4, atol=1e-4 * float(np.abs(mean).max()))
    ordered = own and abs(held_out_fvu(sae, Source(rows, "cpu"), held) - site.fvu) <= _SAME * site.fvu
    if not ordered:
        order = np.random.default_rng(0).permutation(len(rows))
        held, rest = order[:HELD_OUT], order[:0]
    origin = "those that it was trained on" if own else "whose mean is not that of those that it was trained on"
    origin += ", in another order" if own and not ordered else ""
    about = f"{counted(len(rows), 'activation')} of {path.name}, {origin}"
    classes = None if labels is None else _labels(labels, len(rows))
    return Images(about, rows, rows, "the activations themselves", held, rest, classes)


def _parted(site: SiteSAE, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of the images that a training held out, and of the others. Where the SAE was not trained here,
    or on another number of images, random images count as held out, and there are no others."""
    training, seed = site.training, site.training.get("seed")
    if isinstance(seed, int):
        held, others = parted(count, seed)
        if (training.get("held_out_count"), training.get("train_count")) == (len(held), len(others)):
            return held, others
    order = np.random.default_rng(0).permutation(count)
    return order[:HELD_OUT], order[:0]


def read_rows(path: Path, site: SiteSAE, flag: str = "--activations") -> np.ndarray:
    """Read a file of activations for an SAE. Raises DataError if it cannot be read or has another width."""
    rows = read_activations(path, flag).rows
    if rows.shape[1] != site.width:
        raise DataError(f"the activations in {path} have width {rows.shape[1]}; expected {site.width}, the SAE's")
    return rows


def _labels(path: Path, count: int) -> np.ndarray:
    try:
        labels = np.asarray(np.load(path))
    except Exception as error:  # NumPy raises about everything for a damaged header
        reason = getattr(error, "strerror", None) or "it is not an npy file, or damaged"
        raise DataError(f"--labels {str(path)!r} cannot be read: {reason}; expected a file NAME.npy") from error
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"--labels {str(path)!r} holds {labels.dtype} {list(labels.shape)}; expected {count} whole numbers, one "
            "per activation"
        )
    return np.asarray(labels, np.int64)


def open_elsewhere(name: str, store: Store, subject: Subject) -> Rows:
    """Return activations of another data set ``[count, d]``: from the gallery of another checkpoint of the same tower,
    or a file.

    Raises:
        CheckpointError: there is no such checkpoint, it is of another tower, or keeps no activations at this site.
        DataError: a file cannot be read, or has another width.
    """
    site = subject.site
    if name.endswith(_FILES):
        return read_rows(Path(os.path.expanduser(name)), site, "--elsewhere")
    other = store.find(name)
    ours, theirs = subject.checkpoint.tower, other.tower
    difference = "" if ours is None or theirs is None else ours.difference(theirs)
    if theirs is None:
        raise CheckpointError(
            f"checkpoint {other.name!r} is of activations without a model, and keeps none; give them as a file: "
            "--elsewhere FILE.npy"
        )
    if ours is None or difference:
        raise CheckpointError(
            f"checkpoint {other.name!r} is for another tower than {subject.checkpoint.name!r}"
            f"{f': {difference}' if difference else ''}; expected one of {subject.checkpoint.model}"
        )
    if site.hookpoint not in other.require_gallery().sites:
        raise CheckpointError(
            f"checkpoint {other.name!r} keeps no activations at {site.hookpoint} (available: "
            f"{', '.join(other.require_gallery().sites)}); train it with the same --blocks"
        )
    return other.open_gallery().activations[site.hookpoint]


def require_comparable(subjects: Sequence[Subject]) -> None:
    """Check that SAEs are of the same tower and site, since only then their directions can be compared.

    Raises:
        CheckpointError: two SAEs are of different towers, sites or widths.
    """
    first = subjects[0]
    for other in subjects[1:]:
        ours, theirs = first.checkpoint.tower, other.checkpoint.tower
        difference = None if ours is None or theirs is None else ours.difference(theirs)
        if (ours is None) != (theirs is None) or first.site.hookpoint != other.site.hookpoint:
            difference = f"it is for {first.site.hookpoint}, and the other for {other.site.hookpoint}"
        if difference or first.site.width != other.site.width:
            raise CheckpointError(
                f"checkpoints {first.checkpoint.name!r} and {other.checkpoint.name!r} cannot be compared: "
                f"{difference or f'widths {first.site.width} and {other.site.width}'}; measure them one by one"
            )
