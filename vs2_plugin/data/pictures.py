"""Image files, read as pictures."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from vs2_plugin.errors import DataError

__all__ = ["open_picture"]


def open_picture(path: Path) -> Image.Image:
    """Read and decode an image file, of several frames the first, as RGB.

    Raises:
        DataError: there is none that can be read.
    """
    try:
        with Image.open(path) as image:
            picture: Image.Image = image.convert("RGB")
            return picture
    except FileNotFoundError:
        raise DataError(f"there is no file {str(path)!r}; expected an image (png, jpg, webp)") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # all of them come from PIL
        reason = getattr(error, "strerror", None) or "it is damaged or of another format"
        raise DataError(f"{str(path)!r} is no readable image (png, jpg, webp): {reason}") from error
