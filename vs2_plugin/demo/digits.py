"""The demo's data: real handwritten digits (scikit-learn's ``load_digits``: 1,797 images of 8 × 8 pixels), as pictures
and as webdataset shards, and the tiny CLIP that classifies them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["CLASSES", "MODEL", "TEMPLATES", "TINY_CLIP", "TRAIN", "read_digits", "write_digits"]

#: The folder of the tiny CLIP that comes with this package, and its open_clip model name.
TINY_CLIP = Path(__file__).parent / "tiny_clip"
MODEL = f"local-dir:{TINY_CLIP}"

CLASSES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEMPLATES = ["a photo of the digit {c}"]
#: The first 900 images, in the order of the file, are the training split; the other 897 the test split.
TRAIN = 900
_SHARDS = 4  # with fewer shards than loader workers (4 by default), clip_benchmark reads no images at all


def read_digits(split: str) -> tuple[list[Image], list[int]]:
    """Return the images of the split ``train`` or ``test``, and the digit that each image shows."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * 255 / 16).round().astype("uint8")
    rows = {"train": slice(TRAIN), "test": slice(TRAIN, None)}[split]
    return [Image.fromarray(image) for image in pixels[rows]], digits.target[rows].tolist()


def write_digits(folder: Path) -> None:
    """Write the shards, class names and templates, in the layout that clip_benchmark reads as ``wds/digits``."""
    for split, first in (("train", 0), ("test", TRAIN)):
        pictures = list(zip(*read_digits(split), strict=True))
        (folder / split).mkdir(parents=True, exist_ok=True)
        for shard in range(_SHARDS):
            with tarfile.open(folder / split / f"{shard}.tar", "w") as tar:
                for number in range(shard, len(pictures), _SHARDS):
                    picture, label = pictures[number]
                    image = io.BytesIO()
                    picture.save(image, "png")
                    _add(tar, f"{first + number:04d}.png", image.getvalue())
                    _add(tar, f"{first + number:04d}.cls", str(label).encode())
        (folder / split / "nshards.txt").write_text(f"{_SHARDS}\n")
    (folder / "classnames.txt").write_text("\n".join(CLASSES) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
