"""Pictures for pages: of image files, and of training images that are read again by their row in a gallery."""

from __future__ import annotations

import base64
import io
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, Subset

from vs2_plugin.checkpoint.checkpoint import Checkpoint
from vs2_plugin.checkpoint.records import GIVEN
from vs2_plugin.data.images import image_digest, open_images
from vs2_plugin.data.naming import DataSet
from vs2_plugin.data.pictures import open_picture
from vs2_plugin.errors import DataError, Vs2Error
from vs2_plugin.text import printable

__all__ = ["ImageFile", "Thumbnail", "TrainingPictures", "read_image", "thumbnail"]

#: Usual side of a thumbnail, in pixels.
_SIDE = 160


@dataclass(frozen=True)
class Thumbnail:
    """A small picture that is embedded in the page."""

    uri: str
    width: int
    height: int
    name: str = ""
    """Name of the picture's file; empty for a picture that has no file."""


class ImageFile(NamedTuple):
    """An image and its name."""

    name: str
    image: Image.Image


def thumbnail(image: Image.Image, side: int = _SIDE, name: str = "") -> Thumbnail:
    """Return the image scaled down to at most ``side`` pixels in width and height; a smaller image is not scaled."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    data = io.BytesIO()
    # The few pixels of a small image would suffer from JPEG.
    kind = "png" if max(image.size) <= side // 2 else "jpeg"
    small.save(data, kind, **({"quality": 82} if kind == "jpeg" else {}))
    uri = f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"
    return Thumbnail(uri, *small.size, printable(name))


def read_image(path: Path) -> ImageFile:
    """Read and decode an image file.

    Raises:
        DataError: the file cannot be read as an image.
    """
    return ImageFile(str(path), open_picture(path))


class TrainingPictures:
    """The images of a gallery, read again from their data sets.

    A picture is shown only if its preprocessed pixels have the digest that the gallery keeps, so that no other image
    can take its place.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        at_hand: DataSet,
        transform: Callable[[Any], Tensor],
        wds_cache_dir: str | None,
        problems: dict[str, None],
    ) -> None:
        """Reasons why pictures cannot be shown are added to ``problems``, one sentence each, as rows are requested."""
        self._parts = checkpoint.require_gallery().parts
        self.gallery = checkpoint.open_gallery()
        self._checkpoint, self._transform, self._problems = checkpoint, transform, problems
        self._at_hand, self._wds_cache_dir = at_hand, wds_cache_dir
        self._starts = [0, *accumulate(part.count for part in self._parts)]
        self._opened: dict[int, Any] = {}
        self._thumbnails: dict[int, Thumbnail | None] = {}
        self._seen: Image.Image | None = None

    def __call__(self, row: int) -> Thumbnail | None:
        """Return the picture of a row, or None where it cannot be shown."""
        if row not in self._thumbnails:
            part = bisect_right(self._starts, row) - 1
            if part not in self._opened:
                self._opened[part] = self._open(part)
            images = self._opened[part]
            self._thumbnails[row] = None if images is None else self._read(part, images, row)
        return self._thumbnails[row]

    def of(self, rows: Iterable[int]) -> list[Thumbnail]:
        """Return the pictures of those ``rows`` that can be shown; a row of -1 is skipped."""
        return [picture for row in rows if row >= 0 and (picture := self(int(row))) is not None]

    def _open(self, part: int) -> Any:
        """Return the images of a part of the gallery, or None where they cannot be read by row."""
        dataset, count, checkpoint = self._parts[part].dataset, self._parts[part].count, self._checkpoint
        try:
            if checkpoint.data.splits[part] == GIVEN:
                raise DataError("they were given to train() in Python, and are not kept")
            source: Any = open_images(
                self._data_set(part), checkpoint.data.splits[part], self._prepare,
                max_images=checkpoint.data.max_images, wds_cache_dir=self._wds_cache_dir,
            ).source  # fmt: skip
            if isinstance(source, IterableDataset):
                raise DataError("a stream of shards cannot be read by row; fetch the shards and name their folder")
            left_out = self._parts[part].left_out
            if left_out:
                source = Subset(source, [row for row in range(len(source)) if _path(source, row) not in left_out])
            if len(source) != count:
                raise DataError(f"{len(source):,} images in {self._data_set(part).root!r}, the gallery has {count:,}")
        except Vs2Error as error:
            self._problems[f"Training images of {dataset} are not shown: {error}"] = None
            return None
        return source

    def _data_set(self, part: int) -> DataSet:
        """Return the data set to read a part from: the part's own folder, if another one than the data set at hand.

        Raises:
            DataError: the data set at hand is another folder, and the part's own is not known.
        """
        name, folders = self._parts[part].dataset, self._checkpoint.data.folders
        folder = folders[part] if folders else ""
        if folder and (name != self._at_hand.name or not self._checkpoint.data.is_of(self._at_hand.home)):
            return DataSet(name, folder)
        if self._at_hand.home and name != self._at_hand.name:
            raise DataError(
                f"the checkpoint does not say in which folder they are; name it with --dataset {name} --dataset_root "
                "FOLDER, and classes of other data with --classes FILE"
            )
        return DataSet.of(name, self._at_hand.template)

    def _read(self, part: int, images: Any, row: int) -> Thumbnail | None:
        dataset = self._parts[part].dataset
        try:
            item = images[row - self._starts[part]]
            image = item[0] if isinstance(item, (tuple, list)) else item
            same = isinstance(image, Tensor) and image_digest(image) == int(self.gallery.digests[row])
        except Exception as error:  # a data set's own code may raise anything
            self._problems[f"Some training images of {dataset} are not shown: {type(error).__name__}: {error}"] = None
            return None
        if self._seen is None or not same:  # None: an unreadable image was replaced by another
            earlier = self._checkpoint.data.max_images is not None
            self._problems[
                f"Some training images of {dataset} are not shown: what --dataset_root holds now is not what the "
                "checkpoint's gallery was made from"
                + (", or an earlier version drew another subset by --max_images and --seed" if earlier else "")
            ] = None
            return None
        return thumbnail(self._seen, name=_path(images, row - self._starts[part]))

    def _prepare(self, image: Image.Image) -> Tensor:
        """Return the preprocessed image, and keep the image before preprocessing, for its thumbnail."""
        self._seen = image
        return self._transform(image)


def _path(images: Any, row: int) -> str:
    """Return the path of an image's file; an empty text for an image without a file."""
    while isinstance(images, Subset):
        images, row = images.dataset, images.indices[row]
    return images.paths[row] if hasattr(images, "paths") else ""
