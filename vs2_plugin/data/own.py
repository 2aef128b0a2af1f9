"""Folders of images and listed shards, opened for evaluation with the arguments and attributes of clip_benchmark's own
data sets."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vs2_plugin.data.folders import FolderImages, Transform, open_folder
from vs2_plugin.data.labels import CLASS_NAMES, PROMPT, TEMPLATES
from vs2_plugin.data.naming import DataSet
from vs2_plugin.data.shards import EXTENSIONS, beside, decoded, fetch, listed_shards
from vs2_plugin.errors import DataError
from vs2_plugin.text import reason_of

__all__ = ["build_folder", "build_listed", "texts_in"]


def build_folder(
    dataset: DataSet,
    split: str,
    transform: Transform = None,
    custom_classname_file: str | None = None,
    custom_template_file: str | None = None,
    **others: Any,
) -> FolderImages:
    """Open a split of a folder for evaluation; ``others`` are ignored.

    Raises:
        DataError: there are no images or labels, or class names or prompts do not fit.
    """
    images = open_folder(dataset.root, split, transform)
    images.require_labels()
    _tell(images, dataset, custom_classname_file, custom_template_file)
    return images


def build_listed(
    dataset: DataSet,
    transform: Transform = None,
    custom_classname_file: str | None = None,
    custom_template_file: str | None = None,
    wds_cache_dir: str | None = None,
    **others: Any,
) -> Any:
    """Open listed shards for evaluation, as clip_benchmark opens those of a folder; ``others`` are ignored.

    Raises:
        DataError: no file names the classes, or class names or prompts do not fit.
    """
    samples = decoded(listed_shards(dataset.root), wds_cache_dir)
    images = samples.to_tuple(list(EXTENSIONS), "cls").map_tuple(transform, None)
    images.classes = _lines(dataset, CLASS_NAMES)
    images.templates = _lines(dataset, TEMPLATES) or [PROMPT]
    _tell(images, dataset, custom_classname_file, custom_template_file)
    if not images.classes:
        raise DataError(
            f"nothing names the classes of {dataset.root!r}: expected {CLASS_NAMES} beside the shards, a name per "
            "line in the order of the labels, or --custom_classname_file"
        )
    return images


def _lines(dataset: DataSet, name: str) -> list[str]:
    """Return the lines of a small file that belongs to listed shards; an empty list if it cannot be read."""
    try:
        if "://" in dataset.root:
            text = fetch(f"{dataset.root.rpartition('/')[0]}/{name}")
        else:
            text = Path(beside(dataset.root), name).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [line.strip() for line in text.splitlines()]


def _tell(images: Any, dataset: DataSet, classnames: str | None, prompts: str | None) -> None:
    """Set the class names and prompts of ``images`` from the files that the command line names.

    Raises:
        DataError: a file cannot be read, or does not fit the images.
    """
    if classnames is not None:
        names, count = _held(classnames, dataset), len(images.classes)
        if not isinstance(names, list) or (count and len(names) != count):
            raise DataError(
                f"--custom_classname_file {classnames!r}: expected a list of {count or 'the'} names for "
                f"{dataset.name!r}, in the order of the classes"
            )
        images.classes = names
    if prompts is not None:
        templates = _held(prompts, dataset, "imagenet1k")  # as clip_benchmark looks them up
        if not isinstance(templates, (list, dict)) or not templates:
            raise DataError(f"--custom_template_file {prompts!r}: expected a list of prompts for {dataset.name!r}")
        lacking = [name for name in images.classes if name not in templates] if isinstance(templates, dict) else []
        if lacking:
            raise DataError(f"--custom_template_file {prompts!r}: no prompts for the class {lacking[0]!r}")
        images.templates = templates


def _held(file: str, dataset: DataSet, *others: str) -> Any:
    """Return the entry of a data set, or else of ``others``, in a JSON file of texts, or None. Raises DataError."""
    texts, keys = texts_in(file), (dataset.name, dataset.name.partition("/")[2], *others)
    return next((texts[key] for key in keys if key in texts), None)


def texts_in(file: str) -> dict[str, Any]:
    """Return the JSON object in a file of class names or prompts, the user's or clip_benchmark's.

    Raises:
        DataError: the file cannot be read, or holds something else.
    """
    from clip_benchmark.datasets import builder

    path = file if os.path.exists(file) else os.path.join(os.path.dirname(builder.__file__), file)
    try:
        texts = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {file!r} ({reason_of(error)}); expected JSON, {{data set: list}}") from None
    if not isinstance(texts, dict):
        raise DataError(f"{file!r} holds {texts!r:.80}; expected a JSON object, {{data set: list}}")
    return texts
