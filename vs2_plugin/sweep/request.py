"""What is asked of a sweep. No heavy imports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["TASK", "SweepRequest"]

TASK = "zeroshot_classification"


@dataclass(frozen=True)
class SweepRequest:
    """The settings of a sweep, with the names and defaults that they have in ``clip_benchmark eval``."""

    model: Sequence[str]
    """Model strings with ranges and lists, and plain models."""
    dataset: str
    """A data set of clip_benchmark; ``wds/NAME`` for webdataset shards."""
    pretrained: str = "laion400m_e32"
    """open_clip's weights tag, or a file."""
    dataset_root: str = "root"
    """Its folder; ``{dataset}`` is filled in."""
    split: str = "test"
    """The split under evaluation."""
    batch_size: int = 64
    num_workers: int = 4
    amp: bool = True
    """Whether to evaluate under autocast."""
    seed: int = 0
    """For random weights."""
    language: str = "en"
    """Of class names and prompts."""
    custom_classname_file: str | None = None
    """JSON file: data set -> class names."""
    custom_template_file: str | None = None
    """JSON file: data set -> prompts."""
    model_cache_dir: str | None = None
    wds_cache_dir: str | None = None
    output: str = "sweep/{model}.json"
    """The results file of each point."""
    skip_existing: bool = False
    """Whether to keep the results that are there."""
    task: str = TASK
    """The only one there is."""
    model_type: str = "open_clip"
    pretrained_model: str = ""
    skip_load: bool = False
