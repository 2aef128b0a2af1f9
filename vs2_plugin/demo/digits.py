"""Real handwritten digits (scikit-learn's ``load_digits``: 1,797 images of 8 × 8 pixels) as webdataset shards."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

__all__ = ["CLASSES", "TEMPLATES", "TRAIN", "write_digits"]

CLASSES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEMPLATES = ["a photo of the digit {c}"]
#: The first 900 images, in the order of the file, are the training split; the other 897 the test split.
TRAIN = 900
_SHARDS = 4  # clip_benchmark reads none at all where there are fewer shards than loader workers (4 by default)


def write_digits(folder: Path) -> None:
    """Write the shards, class names and templates, in the layout that clip_benchmark reads as ``wds/digits``."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * 255 / 16).round().astype("uint8")
    for split, rows in (("train", range(TRAIN)), ("test", range(TRAIN, len(pixels)))):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for shard in range(_SHARDS):
            with tarfile.open(folder / split / f"{shard}.tar", "w") as tar:
                for row in rows[shard::_SHARDS]:
                    image = io.BytesIO()
                    Image.fromarray(pixels[row]).save(image, "png")
                    _add(tar, f"{row:04d}.png", image.getvalue())
                    _add(tar, f"{row:04d}.cls", str(digits.target[row]).encode())
        (folder / split / "nshards.txt").write_text(f"{_SHARDS}\n")
    (folder / "classnames.txt").write_text("\n".join(CLASSES) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
