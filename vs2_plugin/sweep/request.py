"""The request of a sweep: its settings, declared. No heavy imports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vs2_plugin.settings import setting, validate

__all__ = ["PassRequest", "SweepRequest"]


@dataclass(frozen=True, kw_only=True)
class PassRequest:
    """The settings of an evaluation of many models in one pass over the images, with the names and defaults of
    ``clip_benchmark eval``.

    Raises:
        SettingError: a value outside its range.
    """

    task: ClassVar[str] = "zeroshot_classification"
    """The only task that can be evaluated in this way."""
    model: tuple[str, ...] = setting(help="model strings")
    pretrained: str = setting("laion400m_e32", help="open_clip's weights tag or file")
    dataset: str = setting(help="a folder of images (photos/), a data set of clip_benchmark, or wds/NAME for shards")
    dataset_root: str = setting("root", help="where it is, if not given by a path; {dataset} is filled in")
    split: str = setting("test", help="the split under evaluation")
    batch_size: int = setting(64, minimum=1, help="images per forward pass; results depend on it in the last digits")
    num_workers: int = setting(4, minimum=0, help="processes that load images")
    amp: bool = setting(True, help="no autocast: float32 throughout")
    seed: int = setting(0, help="seed for random weights")
    language: str = setting("en", help="language of class names and prompts")
    custom_classname_file: str | None = setting(None, help="JSON file: data set -> class names")
    custom_template_file: str | None = setting(None, help="JSON file: data set -> prompts")
    model_cache_dir: str | None = setting(None, help="where downloaded models are kept")
    wds_cache_dir: str | None = setting(None, help="where downloaded shards are kept")

    def __post_init__(self) -> None:
        validate(self)


@dataclass(frozen=True, kw_only=True)
class SweepRequest(PassRequest):
    """The settings of a sweep.

    Raises:
        SettingError: a value outside its range.
    """

    model: tuple[str, ...] = setting(help="model strings, with ranges and lists")
    output: str = setting("sweep/{model}.json", help="results files")
    skip_existing: bool = setting(False, help="keep existing results, to continue after an interruption")
