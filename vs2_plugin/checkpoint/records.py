"""Records in ``vs2.json`` of a checkpoint's training data and SAEs, and checks of these records."""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vs2_plugin.documented import documented
from vs2_plugin.gallery.contents import GalleryContents
from vs2_plugin.method import ENCODER_NAME
from vs2_plugin.paths import SPLITS, share_files
from vs2_plugin.settings import whole
from vs2_plugin.text import counted, expanded

__all__ = ["FEW", "GIVEN", "SiteSAE", "TrainingData", "problems"]

#: Name of the split for images or activations that belong to no data set.
GIVEN = "given"
#: Advice for an SAE that was trained here and is useless.
_RETRAIN = (
    "train it again with vs2-train-sae --overwrite and more images or --samples, a larger --k, a smaller "
    "--expansion_factor or a lower --lr"
)
#: Advice for an SAE that explains less variance than principal components.
FEW = "more images help most; with fewer than a few hundred, --expansion_factor 1 helps a little"
#: The share of dead latents above which an SAE is useless.
_MOSTLY = 0.5
#: The files of an SAE; see sae.files, which is not imported here since it imports torch.
_FILES = ("cfg.json", "sae.safetensors")
#: The largest number in float32, and a bound above any number of images, classes or dimensions.
_FLOAT32, _MOST = 3.4028234e38, 2**40


def _parts(split: str | None) -> set[str | None]:
    return {"train", "val"} if split == "trainval" else {split}


@documented
@dataclass(frozen=True)
class TrainingData:
    """The images that the SAEs of a checkpoint were trained on."""

    datasets: tuple[str, ...]
    """clip_benchmark's names of the data sets."""
    images: int
    """Number of images, of all data sets."""
    splits: tuple[str, ...] = ()
    """The split of each data set."""
    calibrated_on: tuple[str, ...] = ()
    """The data sets on whose held-out images the FVU and its quantiles were measured."""
    transductive: bool = False
    """Whether images that are evaluated are among the training images."""
    amp: bool = True
    """Whether activations were extracted under autocast."""
    max_images: int | None = None
    """Limit on the images that were taken of each data set; None: all."""
    folders: tuple[str, ...] = ()
    """For each data set, the absolute path of its folder of images, or the list of its shards; empty for one that is
    found by its name. The tuple is empty if all are found by name."""

    def is_of(self, folder: str) -> bool:
        """Return whether all training images that come from folders lie in ``folder`` itself, in the folder of a split
        in it, or in listed shards in it."""
        root = _real(folder)

        def is_split(path: str) -> bool:
            where, name = os.path.split(path)
            splits = {*SPLITS["train"], *SPLITS["test"], *self.splits}
            return where == root and (name.lower() in splits or name.endswith(".tar"))

        return all(path == root or is_split(path) for path in map(_real, filter(None, self.folders)))

    def holds(self, folder: str) -> bool:
        """Return whether images in ``folder``, given as in :attr:`folders`, are among the training images. Links to
        files and folders are followed; copies are not found."""
        return bool(folder) and any(_share(_real(folder), path) for path in map(_real, filter(None, self.folders)))

    def holds_split(self, dataset: str, split: str | None) -> bool:
        """Return whether images of a split are among the training images, for a data set that is found by its name. The
        split ``trainval`` holds those of ``train`` and ``val``."""
        by_name = zip(self.datasets, self.splits, self.folders or [""] * len(self.datasets), strict=False)
        own = [its_split for name, its_split, folder in by_name if name == dataset and not folder]
        return any(not _parts(split).isdisjoint(_parts(its_split)) for its_split in own)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        values = asdict(self)
        return {name: values[name] for name in values if name != "folders" or values[name]}

    def __str__(self) -> str:
        if GIVEN in self.splits and self.datasets in (("images",), ("activations",)):
            return counted(self.images, self.datasets[0].removesuffix("s"))
        return f"{counted(self.images, 'image')} of {' and '.join(self.datasets)}"

    def differences(self, other: TrainingData) -> list[str]:
        """Return, in words, the fields in which ``other`` differs."""
        ours, theirs = asdict(self), asdict(other)
        return [f"{name} {ours[name]}, now {theirs[name]}" for name in ours if ours[name] != theirs[name]]


def _real(path: str) -> str:
    return path if "://" in path else os.path.realpath(path)


def _share(one: str, other: str) -> bool:
    """Return whether two folders share files, or two lists of shards share a shard."""
    if one.endswith(".tar") and other.endswith(".tar"):
        return not set(expanded(one)).isdisjoint(expanded(other))
    return share_files(one, other)


@documented
@dataclass(frozen=True)
class SiteSAE:
    """One SAE of a checkpoint, as ``vs2.json`` describes it."""

    hookpoint: str
    variant: str
    """``plain``, or ``pass`` for an SAE that was trained by PASS."""
    labels: str
    """The labels used in its training: ``none`` or ``train``."""
    width: int
    """d, the width of the activations."""
    mean: list[float] = field(repr=False)
    """Mean activation ``[d]`` over the unlabeled training split."""
    fvu: float
    """FVU over held-out training activations."""
    fvu_quantiles: dict[str, float]
    """Quantile, as text, -> per-sample FVU over held-out training activations."""
    training: dict[str, float | int | str | bool | None]
    """Settings and figures of the training."""
    files: dict[str, str]
    """File name -> SHA-256, for each file of the SAE."""

    @property
    def folder(self) -> str:
        """The name of the SAE's folder in the checkpoint."""
        return self.hookpoint if self.variant == "plain" else f"{self.hookpoint}.{self.variant}"

    @property
    def trained(self) -> str:
        """Words before the name of the data set; an SAE imported from another library was not trained on it."""
        library = self.training.get("library")
        return "trained on" if library is None else f"trained by {library} elsewhere and measured on"

    @property
    def warning(self) -> str | None:
        """The reason why the SAE is useless, in words, or None.

        At an FVU of 1, the SAE explains no more than the mean of the m held-out activations themselves. The mean of the
        training activations has an expected FVU above m/(m-1), which only matters where few are held out. With most
        latents dead, few directions are left to steer along; in an SAE that was trained well enough, at most a third of
        them are dead.
        """
        dead, count = self.training.get("dead"), self.training.get("held_out_count")
        if self.fvu >= (count / (count - 1) if isinstance(count, int) and count > 1 else 1):
            return f"its FVU is {self.fvu:.4g}, while that of the mean activation alone is 1"
        if isinstance(dead, float) and dead > _MOSTLY:
            return f"{dead:.1%} of its latents are dead"
        return None

    @property
    def advice(self) -> str:
        """What to do about a useless SAE."""
        imported = "it was trained elsewhere: is it for this tower, place and preprocessing?"
        return imported if "library" in self.training else _RETRAIN

    @property
    def below_components(self) -> str | None:
        """A note that as many principal components explain more, as with few images or a short training, or None.

        None for an SAE trained by PASS, which trades explained variance for codes that agree within a class, and for an
        imported SAE, which was not trained on these images, whereas the principal components are of them.
        """
        pca_fvu, k = self.training.get("pca_fvu"), self.training.get("k")
        exempt = self.variant == "pass" or "library" in self.training
        if exempt or not isinstance(pca_fvu, float) or self.fvu <= pca_fvu:
            return None
        return (
            f"it explains {1 - self.fvu:.1%} of the variance of images that it has not seen, but as many principal "
            f"components as active latents ({k}) explain {1 - pca_fvu:.1%}"
        )

    @property
    def block(self) -> int | None:
        """The number of the block, counted from 0; None at the output embedding."""
        return whole(self.hookpoint.rpartition(".")[2])


def problems(data: TrainingData, sites: Sequence[SiteSAE], gallery: GalleryContents | None) -> Iterator[str]:
    """Yield, in words, each value that no training writes; each check relies on those before it."""
    folders = [site.folder for site in sites]
    if not folders:
        yield "it has no sites"
    if len(set(folders)) < len(folders):
        yield "two of its SAEs are for the same site"
    if not 0 <= data.images < _MOST:
        yield f"it was made from {reprlib.repr(data.images)} images"
    for number, site in enumerate(sites):
        for problem in _site_problems(site):
            yield f"sites[{number}] {problem}"
    if gallery is not None:
        yield from _gallery_problems(gallery)


def _site_problems(site: SiteSAE) -> Iterator[str]:
    if not re.fullmatch(r"\w{1,50}(\.\w{1,50}){0,10}", site.hookpoint, re.ASCII):  # it names a folder
        yield f"has the hookpoint {reprlib.repr(site.hookpoint)}; expected names joined by dots"
    for name, expected in {"variant": ("plain", "pass"), "labels": ("none", "train")}.items():
        if getattr(site, name) not in expected:
            yield f"has the {name} {reprlib.repr(getattr(site, name))}; expected {' or '.join(expected)}"
    if set(site.files) != set(_FILES):
        yield f"has files {reprlib.repr(sorted(site.files))}; expected {' and '.join(_FILES)}"
    if not 0 < site.width == len(site.mean):
        yield f"has a mean of {len(site.mean)} numbers; expected {site.width}"
    if not all(-_FLOAT32 < value < _FLOAT32 for value in site.mean):
        yield "has a mean that is not finite in float32"
    if not 0 <= site.fvu < _FLOAT32:
        yield f"has FVU {reprlib.repr(site.fvu)}; expected a number of at least 0"
    yield from _quantile_problems(site.fvu_quantiles)


def _quantile_problems(quantiles: Mapping[str, float]) -> Iterator[str]:
    """Yield, in words, what is wrong with FVU quantiles, which a gate reads."""
    strange = [level for level in quantiles if not re.fullmatch(r"0\.\d{1,9}", level, re.ASCII)]
    if strange:
        yield f"has FVU quantiles {reprlib.repr(strange)}; expected levels such as 0.95"
    values = [quantiles[level] for level in sorted(quantiles, key=float)]
    if not all(0 <= value < _FLOAT32 for value in values) or values != sorted(values):
        yield f"has FVU quantiles {reprlib.repr(values)}; expected finite numbers that rise with their levels"


def _gallery_problems(gallery: GalleryContents) -> Iterator[str]:
    if not gallery.parts:
        yield "its gallery has no parts"
    for part in gallery.parts:
        if not 0 < part.count < _MOST or not 0 <= (part.classes or 0) < _MOST:
            shown = reprlib.repr([part.count, part.classes])
            yield f"its gallery has images and classes {shown}; expected numbers of at least 1"
    if "clip" not in gallery.encoders:
        yield "its gallery has no embeddings by clip"
    for name, encoder in gallery.encoders.items():
        if not re.fullmatch(ENCODER_NAME[0], name) or not 0 < encoder.width < _MOST:  # it names files
            shown = reprlib.repr((name, encoder.width))
            yield f"its gallery has embeddings {shown}; expected {ENCODER_NAME[1]}, and a width"
