"""The first half of a training: the extraction of activations and embeddings, and the gallery made of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vs2_plugin.clip.backbone import Loaded
from vs2_plugin.clip.edits import reading
from vs2_plugin.clip.sites import Site
from vs2_plugin.clip.tower import Tower
from vs2_plugin.data.cache import ActivationCache, Encode, Extracted, extract, require_space
from vs2_plugin.data.given import GivenImages
from vs2_plugin.data.images import SUBSET, TrainingImages, open_images
from vs2_plugin.data.naming import DataSet
from vs2_plugin.data.splits import Split
from vs2_plugin.distributed import ALONE, Processes
from vs2_plugin.errors import DataError, SettingError
from vs2_plugin.files import part_of
from vs2_plugin.gallery.contents import GalleryContents, GalleryPart, RetrievalEncoder, split_name
from vs2_plugin.gallery.encoders import TimmEncoder, load_encoder
from vs2_plugin.gallery.files import GalleryFiles
from vs2_plugin.gallery.gallery import CLIP
from vs2_plugin.text import gigabytes
from vs2_plugin.training.request import TrainRequest

__all__ = ["Extraction", "Part", "Report", "activations_at", "all_labels", "load_encoders"]

#: Function that shows a line to the user.
Report = Callable[[str], None]
#: Name of a retrieval encoder -> the encoder and its identity.
Encoders = Mapping[str, tuple[TimmEncoder, RetrievalEncoder]]


@dataclass(frozen=True)
class Part:
    """The extracted columns of one data set."""

    dataset: DataSet
    folder: str
    """Folder of the images; see :attr:`vs2_plugin.data.images.TrainingImages.folder`."""
    tower: Extracted
    """Columns of activations, by hookpoint; with a gallery also the output embedding."""
    encoded: dict[str, Extracted]
    """Name of a retrieval encoder -> its embeddings, in a column of this name."""

    def __len__(self) -> int:
        return len(self.tower)

    @property
    def labels(self) -> np.ndarray:
        """Labels, int64 ``[count]``. Raises DataError if the extraction did not read labels."""
        if self.tower.labels is None:
            raise DataError(f"the labels of {self.dataset.name} were not read")
        return self.tower.labels

    @property
    def classes(self) -> int:
        """Number of classes: the largest label plus one."""
        return int(self.labels.max()) + 1


def all_labels(parts: Sequence[Part]) -> np.ndarray:
    """Return the labels of all data sets, int64 ``[count]``, shifted so that no two data sets share a class."""
    starts = np.cumsum([0, *(part.classes for part in parts)])
    return np.concatenate([part.labels + start for part, start in zip(parts, starts, strict=False)])


def load_encoders(
    request: TrainRequest, held: Sequence[GalleryContents], preprocessing: Mapping[str, Any], device: str
) -> Encoders:
    """Load the retrieval encoders beside CLIP: those requested, and those whose embeddings existing galleries hold."""
    weights_of = dict(split_name(text) for text in request.retrieval_encoder)
    if CLIP in weights_of:
        raise SettingError("--retrieval_encoder clip: the CLIP embedding is always kept; expected names of timm models")
    for gallery in held:
        for name, identity in gallery.encoders.items():
            if name != CLIP:
                weights_of.setdefault(name, identity.weights)
    encoders = {}
    for name, weights in weights_of.items():
        encoder = load_encoder(name, weights, preprocessing, device)
        encoders[name] = encoder, encoder.identity(name, weights and os.path.abspath(weights))
    return encoders


def activations_at(model: nn.Module, sites: Sequence[Site], amp: bool) -> Encode:
    """Return an encoder for :func:`extract` that gives the activations of an open_clip model at ``sites``."""
    encode_image: Callable[[Tensor], Tensor] = model.encode_image  # type: ignore[assignment]

    def encode(images: Tensor) -> dict[str, Tensor]:
        with torch.autocast(images.device.type, enabled=amp), reading(model, sites) as activations:
            encode_image(images)
        return {site.hookpoint: activations[site] for site in sites}

    return encode


@dataclass(frozen=True)
class Extraction:
    """An extraction of columns from every image of data sets."""

    request: TrainRequest
    cache: Path
    """Folder of the cache."""
    loaded: Loaded
    tower: Tower
    """Identity of the vision tower."""
    sites: Sequence[Site]
    """Sites at which activations are read."""
    encoders: Encoders
    labels: bool
    amp: bool
    device: str
    say: Report
    given: GivenImages | None = None
    """Images that Python code supplies in place of a data set."""
    processes: Processes = ALONE
    reserved: int = 0
    """Bytes that must stay free in the store, for the checkpoints that are written afterwards."""

    def run(self, dataset: DataSet, split: Split) -> Part:
        """Return all columns of one data set, from the cache, or extracted into the cache.

        Raises:
            DataError: an image cannot be read, or the disk is too small.
        """
        request, images = self.request, self._open(dataset, split)
        places = ", ".join(map(str, self.sites))
        self.say(
            f"{request.model} on the split {split.name!r} of {dataset.name}: {places}, on {self.device} "
            f"{self._precision()}"
        )
        if images.about:
            self.say(images.about)
        if dataset.is_folder and images.folder == dataset.home:
            self.say("it has no train/ and test/: where all of it is evaluated, results say that it is transductive")
        source = self._source(dataset, split, images)
        output = [self.loaded.sites.output] if request.gallery else []
        sites = list(dict.fromkeys([*self.sites, *output]))
        widths = {site.hookpoint: site.width for site in sites}
        key = {"tower": self.tower.to_json(), "sites": list(widths), **source}
        encode = activations_at(self.loaded.model, sites, self.amp)
        of_tower = self._cached(encode, widths, images, key, "activations")
        encoded = {}
        for name, (encoder, identity) in self.encoders.items():
            key = {"encoder": identity.to_json(), **source}
            encode = self._embeddings(name, encoder)
            encoded[name] = self._cached(encode, {name: encoder.width}, images, key, f"embeddings by {name}")
            if not np.array_equal(encoded[name].digests, of_tower.digests):
                raise DataError(
                    f"{dataset.name} gave its images in another order the second time; expected a fixed one"
                )
        return Part(dataset, images.folder, of_tower, encoded)

    def _open(self, dataset: DataSet, split: Split) -> TrainingImages:
        request, transform = self.request, self.loaded.transform
        if self.given is not None:
            return self.given.open(transform, max_images=request.max_images, labels=self.labels)
        return open_images(
            dataset,
            split.name,
            transform,
            max_images=request.max_images,
            wds_cache_dir=request.wds_cache_dir,
            labels=self.labels,
        )

    def _precision(self) -> str:
        if self.amp:
            kind = torch.get_autocast_dtype(torch.device(self.device).type)
            return f"under autocast ({str(kind).removeprefix('torch.')})"
        return "in float32" if self.request.amp is False else "in float32 (this processor would emulate autocast)"

    def _source(self, dataset: DataSet, split: Split, images: TrainingImages) -> dict[str, Any]:
        """Return the part of a cache key that concerns the images and their processing, but not the model."""
        request, root = self.request, dataset.root
        return {
            "preprocessing": self.tower.preprocessing,
            "dataset": dataset.name,
            "root": root if "://" in root else os.path.abspath(root),
            "split": split.name,
            "images": images.fingerprint,
            "max_images": request.max_images,
            "seed": SUBSET if request.max_images else None,
            "labels": self.labels,
            "amp": self.amp,
            "device": self.device.partition(":")[0],
            "dtype": request.cache_dtype,
        }

    def _embeddings(self, name: str, encoder: TimmEncoder) -> Encode:
        def encode(images: Tensor) -> dict[str, Tensor]:
            with torch.autocast(images.device.type, enabled=self.amp):
                return {name: encoder(images)}

        return encode

    def _cached(
        self, encode: Encode, widths: Mapping[str, int], images: TrainingImages, key: dict[str, Any], name: str
    ) -> Extracted:
        cache, request = ActivationCache(self.cache), self.request
        cached = None if request.refresh_cache else cache.open(key, widths, images.labels)
        if cached is not None:
            self.say(f"{name} of {len(cached):,} images: cached, in {cache.folder(key)}")
            if cached.left_out:
                first, more = cached.left_out[0], len(cached.left_out) - 1
                self.say(f"left out, not a readable image: {first}" + (f", and {more:,} more" if more else ""))
            return cached
        dtype, count = np.dtype(request.cache_dtype), images.count
        if count is None:
            self.say(f"{name} of an unknown number of images: into {cache.folder(key)}")
        else:
            needed = count * sum(widths.values()) * dtype.itemsize
            already = sum(path.stat().st_size for path in part_of(cache.folder(key)).glob("*.npy"))
            what = "the activations, and the checkpoints after them,"
            free = require_space(self.cache, needed - min(already, needed) + self.reserved, what)
            where = cache.folder(key)
            self.say(f"{name} of {count:,} images: {gigabytes(needed)} on disk, in {where} ({gigabytes(free)} free)")
        return extract(
            encode,
            widths,
            images,
            cache,
            key,
            device=self.device,
            batch_size=request.batch_size,
            num_workers=request.num_workers,
            dtype=dtype,
            name=name,
            quiet=request.quiet,
            fresh=request.refresh_cache,
            processes=self.processes,
        )

    def gallery(self, parts: Sequence[Part]) -> GalleryFiles | None:
        """Return the gallery of a checkpoint, made of the extracted files; None if the request wants none."""
        if not self.request.gallery:
            return None
        encoders = {
            CLIP: RetrievalEncoder(self.loaded.sites.output.width),
            **{name: identity for name, (_, identity) in self.encoders.items()},
        }
        arrays = [self._arrays(part) for part in parts]
        gallery_parts = tuple(
            GalleryPart(
                part.dataset.name,
                len(part),
                part.classes if self.labels else None,
                left_out=part.tower.left_out or None,
                contents={name: extracted.contents[column] for name, (extracted, column) in of_part.items()},
            )
            for part, of_part in zip(parts, arrays, strict=True)
        )
        files = [
            {name: extracted.folder / f"{column}.npy" for name, (extracted, column) in of_part.items()}
            for of_part in arrays
        ]
        contents = GalleryContents(gallery_parts, tuple(site.hookpoint for site in self.sites), encoders, self.labels)
        return GalleryFiles(contents, files)

    def _arrays(self, part: Part) -> dict[str, tuple[Extracted, str]]:
        """Return name of an array in the gallery -> the extraction, and the column in it."""
        arrays = {site.hookpoint: (part.tower, site.hookpoint) for site in self.sites}
        arrays[f"embedding.{CLIP}"] = part.tower, self.loaded.sites.output.hookpoint
        arrays |= {f"embedding.{name}": (embeddings, name) for name, embeddings in part.encoded.items()}
        arrays["digests"] = part.tower, "digests"
        if self.labels:
            arrays["labels"] = part.tower, "labels"
        return arrays
