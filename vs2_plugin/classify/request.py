"""The request of a classification: the settings of ``vs2 classify``. No heavy imports."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from vs2_plugin.errors import SettingError
from vs2_plugin.settings import like, setting, validate
from vs2_plugin.training.request import TrainRequest

__all__ = ["FORMATS", "ClassifyRequest"]

#: File name extensions of the table.
FORMATS = (".csv", ".jsonl", ".parquet")


@dataclass(frozen=True, kw_only=True)
class ClassifyRequest:
    """The settings of a classification, with the names that they have in ``clip_benchmark eval``.

    Raises:
        SettingError: a value outside its range, or a file name with another extension.
    """

    photos: tuple[str, ...]
    """Image files, and folders of images, subfolders included."""
    model: str = setting(help="model string: method:backbone[@checkpoint][@key=value]...")
    pretrained: str = setting("laion400m_e32", help="open_clip's weights tag or file")
    classes: str | None = setting(
        None,
        help="file with a class name per line, folder of class folders, or names separated by commas (default: names "
        "of the folders of photos)",
    )
    prompts: str | None = setting(
        None, help="file with a prompt per line, {c} where the class name goes (default: a photo of a {c}.)"
    )
    out: str = setting("predictions.csv", help="the table: a .csv, .jsonl or .parquet file")
    page: str | None = setting(
        None, help="also write an HTML file: pictures by class, first those whose class steering changed"
    )
    train_images: tuple[str, ...] = setting(
        (),
        help="folders of images to train the SAE on, if there is none yet (default: the photos themselves, without "
        "labels)",
    )
    batch_size: int = setting(64, minimum=1, help="images per forward pass; results depend on it in the last digits")
    num_workers: int = setting(min(4, os.cpu_count() or 1), minimum=0, help="processes that load images")
    amp: bool | None = setting(
        None, help="under autocast, or in float32 (default: autocast, unless this processor emulates it)"
    )
    seed: int = setting(0, minimum=0, help="seed for random weights, and for the SAE")
    model_cache_dir: str | None = like(TrainRequest, "model_cache_dir")
    store: str | None = like(TrainRequest, "store")
    overwrite: bool = setting(False, help="replace an existing table")

    def __post_init__(self) -> None:
        photos = (self.photos,) if isinstance(self.photos, (str, os.PathLike)) else self.photos
        object.__setattr__(self, "photos", tuple(map(os.fspath, photos)))
        validate(self)
        if Path(self.out).suffix.lower() not in FORMATS:
            raise SettingError(f"--out {self.out!r}: expected a name that ends in {', '.join(FORMATS[:-1])} or "
                               f"{FORMATS[-1]}")  # fmt: skip
        if self.page is not None and Path(self.page).suffix.lower() not in (".html", ".htm"):
            raise SettingError(f"--page {self.page!r}: expected a name that ends in .html")
