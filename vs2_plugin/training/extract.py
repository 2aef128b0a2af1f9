"""The first half of ``vs2-train-sae``: what is read of the training images, and what of it becomes the gallery."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vs2_plugin.checkpoint.store import Store
from vs2_plugin.data.splits import Split
from vs2_plugin.distributed import ALONE, Processes
from vs2_plugin.errors import DataError, SettingError
from vs2_plugin.gallery.contents import GalleryContents, GalleryPart, RetrievalEncoder, split_name
from vs2_plugin.gallery.files import GalleryFiles
from vs2_plugin.gallery.gallery import CLIP
from vs2_plugin.method import ENCODER_NAME as NAME
from vs2_plugin.text import gigabytes

if TYPE_CHECKING:
    from vs2_plugin.clip.remembered import Backbone
    from vs2_plugin.clip.sites import Site
    from vs2_plugin.data.cache import Encode, Extracted
    from vs2_plugin.data.images import TrainingImages
    from vs2_plugin.gallery.encoders import TimmEncoder

__all__ = ["Extraction", "Part", "all_labels", "load_encoders"]

#: Retrieval encoder -> the encoder, and the facts by which it is loaded again.
Encoders = dict[str, tuple["TimmEncoder", RetrievalEncoder]]


@dataclass(frozen=True)
class Part:
    """What one data set contributes."""

    dataset: str
    """Its name."""
    tower: Extracted
    """Columns: hookpoint -> activations; with a gallery also the output embedding."""
    encoded: dict[str, Extracted]
    """Retrieval encoder -> its embeddings, in a column of its name."""

    def __len__(self) -> int:
        return len(self.tower)


def all_labels(parts: Sequence[Part]) -> np.ndarray:
    """The labels of all data sets, whose classes are not each other's: int64 ``[count]``."""
    starts = np.cumsum([0, *(int(part.tower.labels.max()) + 1 for part in parts)])
    return np.concatenate([part.tower.labels + start for part, start in zip(parts, starts, strict=False)])


def load_encoders(
    args: argparse.Namespace, held: Sequence[GalleryContents], preprocessing: dict[str, Any], device: str
) -> Encoders:
    """The retrieval encoders beside CLIP: those asked for, and those whose embeddings galleries hold already."""
    wanted = dict(split_name(text) for text in args.retrieval_encoder)
    for name, facts in ((name, facts) for gallery in held for name, facts in gallery.encoders.items()):
        if name != CLIP:
            wanted.setdefault(name, facts.weights)
    if CLIP in wanted:
        raise SettingError("--retrieval_encoder clip: the CLIP embedding is always kept; expected names of timm models")
    for name in wanted:
        if not re.fullmatch(NAME[0], name):
            raise SettingError(f"--retrieval_encoder {name!r}: expected {NAME[1]}, and after a comma a file of weights")
    if (wanted or args.gallery_labels) and not args.gallery:
        flag = "--retrieval_encoder" if wanted else "--gallery_labels"
        raise SettingError(f"{flag} is for the gallery; leave out --no_gallery")
    loaded = {}
    for name, weights in wanted.items():
        from vs2_plugin.gallery.encoders import load_encoder

        encoder = load_encoder(name, weights, preprocessing, device)
        loaded[name] = encoder, encoder.identity(name, weights and os.path.abspath(weights))
    return loaded


@dataclass(frozen=True)
class Extraction:
    """What is read of every image, by one command line."""

    args: argparse.Namespace
    """The command line."""
    store: Store
    """Where the cache lies."""
    backbone: Backbone
    """The model, not loaded where all is cached."""
    sites: Sequence[Site]
    """Where activations are read."""
    encoders: Encoders
    """Retrieval encoders."""
    labels: bool
    """Whether labels are read."""
    device: str
    """Where the model is."""
    say: Callable[..., None]
    """Tells the user."""
    processes: Processes = ALONE
    """Who shares the work."""

    def run(self, dataset: str, split: Split) -> Part:
        """Everything of one data set, from the cache or extracted into it.

        Raises:
            DataError: an image cannot be read, or the disk is too small.
        """
        from vs2_plugin.data.images import Preprocessing, open_images

        args = self.args
        images = open_images(
            dataset,
            args.dataset_root,
            split.name,
            Preprocessing(lambda: self.backbone.loaded.transform),
            max_images=args.max_images,
            seed=args.seed[0],
            wds_cache_dir=args.wds_cache_dir,
            labels=self.labels,
        )
        places = ", ".join(map(str, self.sites))
        self.say(f"{args.model} on the split {split.name!r} of {dataset}: {places}, on {self.device}")
        remote = "://" in args.dataset_root
        source = {  # all that the images depend on
            "preprocessing": self.backbone.tower.preprocessing,
            "dataset": dataset,
            "root": args.dataset_root if remote else os.path.abspath(args.dataset_root),
            "split": split.name,
            "images": images.fingerprint,
            "max_images": args.max_images,
            "seed": args.seed[0] if args.max_images else None,
            "labels": self.labels,
            "amp": args.amp,
            "device": self.device.partition(":")[0],
            "dtype": args.cache_dtype,
        }
        read = list(dict.fromkeys([*self.sites, *([self.backbone.sites.output] if args.gallery else [])]))
        widths = {site.hookpoint: site.width for site in read}
        key = {"tower": self.backbone.tower.to_json(), "sites": list(widths), **source}
        of_tower = self._cached(self._reading(read), widths, images, key, "activations")
        encoded = {}
        for name, (encoder, facts) in self.encoders.items():
            encode = self._encoding(name, encoder)
            key = {"encoder": facts.to_json(), **source}
            encoded[name] = self._cached(encode, {name: encoder.width}, images, key, f"embeddings by {name}")
            if not np.array_equal(encoded[name].digests, of_tower.digests):
                raise DataError(f"{dataset} gave its images in another order the second time; expected a fixed one")
        return Part(dataset, of_tower, encoded)

    def _reading(self, sites: Sequence[Site]) -> Encode:
        from vs2_plugin.data.cache import activations_at

        return lambda images: activations_at(self.backbone.loaded.model, sites, self.args.amp)(images)

    def _encoding(self, name: str, encoder: TimmEncoder) -> Encode:
        import torch

        def encode(images):
            with torch.autocast(images.device.type, enabled=self.args.amp):
                return {name: encoder(images)}

        return encode

    def _cached(
        self, encode: Encode, widths: dict[str, int], images: TrainingImages, key: dict[str, Any], name: str
    ) -> Extracted:
        from vs2_plugin.data.cache import ActivationCache, extract, require_space

        cache = ActivationCache(self.store.activations)
        found = None if self.args.refresh_cache else cache.open(key, widths, images.labels)
        if found is not None:
            self.say(f"{name} of {len(found):,} images: cached, in {cache.folder(key)}")
            return found
        dtype, count = np.dtype(self.args.cache_dtype), images.count
        if count is None:
            self.say(f"{name} of an unknown number of images: into {cache.folder(key)}")
        else:
            needed = count * sum(widths.values()) * dtype.itemsize
            free, where = require_space(self.store.activations, needed), cache.folder(key)
            self.say(f"{name} of {count:,} images: {gigabytes(needed)} on disk, in {where} ({gigabytes(free)} free)")
        return extract(
            encode,
            widths,
            images,
            cache,
            key,
            device=self.device,
            batch_size=self.args.batch_size,
            num_workers=self.args.num_workers,
            dtype=dtype,
            name=name,
            quiet=self.args.quiet,
            processes=self.processes,
        )

    def gallery(self, parts: Sequence[Part]) -> GalleryFiles | None:
        """The gallery of a checkpoint: the extracted files, under the names that they have there."""
        if not self.args.gallery:
            return None
        facts = {
            CLIP: RetrievalEncoder(self.backbone.sites.output.width),
            **{name: facts for name, (_, facts) in self.encoders.items()},
        }
        kept = tuple(self._gallery_part(part) for part in parts)
        contents = GalleryContents(kept, tuple(site.hookpoint for site in self.sites), facts, self.labels)
        return GalleryFiles(contents, [self._gallery_files(part) for part in parts])

    def _gallery_part(self, part: Part) -> GalleryPart:
        classes = int(part.tower.labels.max()) + 1 if self.labels else None
        return GalleryPart(part.dataset, len(part), classes, part.tower.folder.name)

    def _gallery_files(self, part: Part) -> dict[str, Path]:
        folder = part.tower.folder
        files = {site.hookpoint: folder / f"{site.hookpoint}.npy" for site in self.sites}
        files[f"embedding.{CLIP}"] = folder / f"{self.backbone.sites.output.hookpoint}.npy"
        files |= {f"embedding.{name}": found.folder / f"{name}.npy" for name, found in part.encoded.items()}
        files["digests"] = folder / "digests.npy"
        if self.labels:
            files["labels"] = folder / "labels.npy"
        return files
