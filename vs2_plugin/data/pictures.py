"""Image files and PIL images, read as clip_benchmark reads the images in shards.

That is by ``convert("RGB")``: it reads CMYK and palettes, drops transparency, and ignores the rotation that EXIF asks
for. Two cases differ: grey values of 16 bits, which would be clipped to white, are scaled to 8, and so are those of 32
bits if one exceeds 255; and floating-point numbers are refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

from vs2_plugin.errors import DataError

__all__ = ["as_rgb", "open_picture"]

#: Formats whose integers have at most 16 bits, though older versions of PIL decode them to 32.
_OF_16_BITS = ("PNG", "PPM")
_BITS_PER_SAMPLE = 258  # a tag of TIFF


def open_picture(path: str | os.PathLike[str]) -> Image.Image:
    """Read and decode an image file as RGB; of several frames, the first.

    Raises:
        DataError: the file cannot be read. The error's cause has an ``errno`` if the system refused the file.
    """
    named = repr(os.fspath(path))  # escapes line breaks in the name
    with _told(named), Image.open(path) as image:
        return as_rgb(image, named)


def as_rgb(image: Image.Image, named: str) -> Image.Image:
    """Return a PIL image as RGB. Raises DataError, which says ``named`` for the image, if that is impossible."""
    with _told(named):
        if 0 in image.size:
            raise DataError(f"{named} has no pixels, as it is {image.width} x {image.height}; expected at least 1 x 1")
        if image.mode.startswith("I"):  # 16 bits, or 32 that may hold 16
            grey = np.asarray(image).astype(np.int64)
            bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, ())
            if image.mode != "I" or image.format in _OF_16_BITS or 16 in bits or grey.max() > 255:
                grey >>= 8
            return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
        if image.mode == "F":  # PIL would turn values from 0 to 1 into black
            raise DataError(f"{named} is not a readable image: it holds floating-point numbers; expected whole numbers")
        return image.convert("RGB")


@contextmanager
def _told(named: str) -> Iterator[None]:
    """Raise whatever is raised while an image is read as a DataError that says ``named`` for the image."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"there is no file {named}; expected an image (png, jpg, webp)") from error
    except Image.DecompressionBombError as error:
        most = f"{2 * (Image.MAX_IMAGE_PIXELS or 0):,}"
        raise DataError(f"{named} has more than {most} pixels, which PIL refuses as a possible attack; scale it "
                        "down") from error
    except MemoryError as error:
        raise DataError(f"{named} needs more memory than is available; scale it down") from error
    except Exception as error:  # PIL's readers of damaged files raise about everything
        reason = getattr(error, "strerror", None) or "it is damaged or in another format"
        raise DataError(f"{named} is not a readable image (png, jpg, webp, gif, bmp, tif): {reason}") from error
