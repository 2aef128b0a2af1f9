"""Which split of a data set an SAE may be trained on. No heavy imports."""

from __future__ import annotations

import os
from dataclasses import dataclass

from vs2_plugin.data.naming import DataSet
from vs2_plugin.errors import DataError
from vs2_plugin.paths import SPLITS

__all__ = ["TRAIN_NAMES", "Split", "split_at_hand", "training_split", "without_training_split"]

#: clip_benchmark data sets whose training split has another name than "train".
TRAIN_NAMES = {"pets": "trainval"}

_IGNORES = "clip_benchmark ignores the split and always gives all images, including the test images"
_TEST_ONLY = "it has a test split only"
# Read from clip_benchmark 1.6's datasets/builder.py; asking these for "train" gives the test images, or fails.
_WITHOUT = {
    **dict.fromkeys(("sun397", "eurosat", "caltech101", "winoground", "dummy"), _IGNORES),
    **dict.fromkeys(("multilingual_mscoco_captions", "crossmodal3600", "xtd10", "xtd200", "flickr30k-200"), _IGNORES),
    **dict.fromkeys(
        ("imagenetv2", "imagenet_sketch", "imagenet-a", "imagenet-r", "imagenet-o", "objectnet"), _TEST_ONLY
    ),
}


@dataclass(frozen=True)
class Split:
    """The split of a data set to train on."""

    name: str
    """The split's name for clip_benchmark."""
    transductive: bool
    """Whether the split holds the images that are evaluated later."""


def without_training_split(dataset: str, root: str = "") -> str | None:
    """Return why ``dataset`` has no training split of its own; None if it has one (or is not known here). The shards of
    ``wds/NAME`` are looked for in the folder ``root``."""
    if dataset.startswith("wds/"):
        train, test = (os.path.isfile(os.path.join(root, split, "nshards.txt")) for split in ("train", "test"))
        return _TEST_ONLY if test and not train else None
    return _TEST_ONLY if dataset.startswith("sugar_crepe/") else _WITHOUT.get(dataset)


def training_split(dataset: str, requested: str | None, transductive: bool, root: str = "") -> Split:
    """Return the split to train on.

    Args:
        dataset: a clip_benchmark data-set name.
        requested: the user's choice; None for the data set's usual one.
        transductive: whether the user allows training on the images that are evaluated.
        root: the folder of the data set.

    Raises:
        DataError: only the evaluated images could be trained on, and ``transductive`` is not set.
    """
    reason = without_training_split(dataset, root)
    if reason is None and requested == "test":
        reason = "the split 'test' is the one that is evaluated"
    if reason is None:
        return Split(requested or TRAIN_NAMES.get(dataset, "train"), transductive=False)
    if not transductive:
        raise DataError(
            f"{dataset} has no training split to use: {reason}; to train on the images that are evaluated, "
            "without their "
            "labels, add --transductive (the checkpoint and every result will say so)"
        )
    return Split(requested or "test", transductive=True)


def split_at_hand(dataset: DataSet) -> str:
    """Return the split from which to read what all splits share, such as names of classes: ``test``, but ``train`` for
    a folder or shards that have only that one."""
    local = (dataset.is_folder or dataset.is_shards) and os.path.isdir(dataset.root)
    names = {name.lower() for name in os.listdir(dataset.root)} if local else set()
    return "train" if "train" in names and names.isdisjoint(SPLITS["test"]) else "test"
