"""Pictures for pages: image files, and training images read again by their row in a gallery."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vs2_plugin.errors import DataError, Vs2Error

if TYPE_CHECKING:
    from PIL.Image import Image

    from vs2_plugin.checkpoint.checkpoint import Checkpoint
    from vs2_plugin.gallery.contents import GalleryPart
    from vs2_plugin.gallery.gallery import Gallery

__all__ = ["Thumbnail", "TrainingPictures", "read_image", "thumbnail"]

_SIDE = 160


@dataclass(frozen=True)
class Thumbnail:
    """A small picture that stands in the page itself."""

    uri: str
    width: int
    height: int


def thumbnail(image: Image, side: int = _SIDE) -> Thumbnail:
    """The image, at most ``side`` pixels wide and high. Smaller ones stay as they are."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    data = io.BytesIO()
    # The few pixels of a small image would suffer from JPEG.
    kind = "png" if max(image.size) <= side // 2 else "jpeg"
    small.save(data, kind, **({"quality": 82} if kind == "jpeg" else {}))
    return Thumbnail(f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}", *small.size)


def read_image(path: Path) -> Image:
    """An image file, decoded.

    Raises:
        DataError: there is none that can be read.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"there is no file {str(path)!r}; expected an image (png, jpg, webp)") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # all of them come from PIL
        reason = getattr(error, "strerror", None) or "it is damaged or of another format"
        raise DataError(f"{str(path)!r} is no readable image (png, jpg, webp): {reason}") from error


class TrainingPictures:
    """The images of a gallery, read again from their data sets.

    A picture is shown only if its preprocessed pixels have the digest that the gallery keeps, so that no other image
    can take its place.
    """

    def __init__(
        self, checkpoint: Checkpoint, gallery: Gallery, root: str, transform: Any, wds_cache_dir: str | None = None
    ) -> None:
        self._gallery, self._transform = gallery, transform
        #: Why pictures are not shown, one sentence each; filled in as they are asked for.
        self.problems: dict[str, None] = {}
        self._parts: list[tuple[int, str, Callable[[], Any]]] = []  # end row, data set, how to open its images
        end = 0
        for part, split in zip(checkpoint.require_gallery().parts, checkpoint.data.splits, strict=True):
            end += part.count
            self._parts.append((end, part.dataset, self._opener(checkpoint, part, split, root, wds_cache_dir)))
        self._opened: dict[str, Any] = {}
        self._made: dict[int, Thumbnail | None] = {}
        self._seen: Image | None = None

    def _opener(
        self, checkpoint: Checkpoint, part: GalleryPart, split: str, root: str, wds_cache_dir: str | None
    ) -> Callable[[], Any]:
        def open_part() -> Any:
            from torch.utils.data import IterableDataset

            from vs2_plugin.data.images import open_images

            images = open_images(
                part.dataset, root, split, self._keep, max_images=checkpoint.data.max_images,
                seed=checkpoint.sites[0].training.get("seed", 0), wds_cache_dir=wds_cache_dir,
            )  # fmt: skip
            if isinstance(images.source, IterableDataset):
                raise DataError("a stream of shards cannot be read by row; fetch the shards and name their folder")
            if len(images.source) != part.count:
                raise DataError(f"{len(images.source):,} images in {root!r}, the gallery has {part['count']:,}")
            return images.source

        return open_part

    def _keep(self, image: Image) -> Any:
        """The tower's preprocessing, and a copy of what comes before it."""
        self._seen = image
        return self._transform(image)

    def __call__(self, row: int) -> Thumbnail | None:
        """The picture of a row, or None where it cannot be shown."""
        if row not in self._made:
            self._made[row] = self._make(row)
        return self._made[row]

    def _make(self, row: int) -> Thumbnail | None:
        from vs2_plugin.data.images import image_digest

        start = 0
        for end, dataset, open_part in self._parts:
            if row < end:
                break
            start = end
        if dataset not in self._opened:
            try:
                self._opened[dataset] = open_part()
            except Vs2Error as error:
                self._opened[dataset] = None
                self.problems[f"Training images of {dataset} are not shown: {error}"] = None
        source = self._opened[dataset]
        if source is None:
            return None
        try:
            item = source[row - start]
        except Exception as error:  # whatever a data set's own code raises
            self.problems[f"Some training images of {dataset} are not shown: {type(error).__name__}: {error}"] = None
            return None
        image = item[0] if isinstance(item, (tuple, list)) else item
        if image_digest(image) != int(self._gallery.digests[row]):
            self.problems[
                f"Some training images of {dataset} are not shown: what --dataset_root holds now is not what the "
                "checkpoint's gallery was made from"
            ] = None
            return None
        return thumbnail(self._seen)

    def of(self, rows: Sequence[int]) -> list[Thumbnail]:
        """The pictures of several rows that can be shown; a row of -1 stands for none."""
        return [found for row in rows if row >= 0 and (found := self(int(row))) is not None]
