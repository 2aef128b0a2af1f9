"""Fetches weights and data sets before the first run that needs them, so that what is missing is told once, and how
to get it."""

from __future__ import annotations

import logging
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from vs2_plugin.errors import SettingError, TowerError

__all__ = ["missing_data", "missing_weights", "root_of"]


def root_of(dataset: str, dataset_root: str) -> str:
    """The folder of a data set, as clip_benchmark fills it in.

    >>> root_of("wds/cub200", "root/{dataset}")
    'root/cub200'
    """
    name = dataset.removeprefix("wds/")
    try:
        return dataset_root.format(dataset=name, dataset_cleaned=name.replace("/", "-"))
    except (KeyError, IndexError, ValueError) as error:
        raise SettingError(
            f"--dataset_root {dataset_root!r}: only {{dataset}} and {{dataset_cleaned}} can be filled in ({error})"
        ) from None


def missing_weights(backbone: str, weights: str) -> str | None:
    """Why a model cannot be loaded, and how to get it; None if it can."""
    from vs2_plugin.clip.backbone import load_backbone

    logging.disable(logging.ERROR)  # the hub's client complains of every attempt
    try:
        load_backbone(backbone, weights)
    except TowerError as error:
        return (
            f"{error}; open_clip fetches the weights where there is a network; without one, write "
            f"{backbone + ',PATH'!r} for the backbone, with the PATH of a weights file"
        )
    finally:
        logging.disable(logging.NOTSET)
    return None


def missing_data(dataset: str, dataset_root: str, split: str) -> str | None:
    """Why a data set cannot be built, and how to get it; None if it can.

    Args:
        dataset: clip_benchmark's name of it.
        dataset_root: its folder, in which ``{dataset}`` is filled in.
        split: the split that is needed.
    """
    root = root_of(dataset, dataset_root)
    if dataset.startswith("wds/"):
        if "://" in root or (Path(root) / split / "nshards.txt").is_file():
            return None
        return (
            f"no file {Path(root, split, 'nshards.txt')}: clip_benchmark does not fetch {dataset}; make webdataset "
            f"shards in {root} (clip_benchmark_export_wds does): train/ and test/, each with 0.tar to 3.tar or "
            "more (KEY.jpg or KEY.png and KEY.cls of each image) and nshards.txt with their number; classnames.txt "
            "and zeroshot_classification_templates.txt, a line each"
        )
    from clip_benchmark.datasets.builder import build_dataset

    said = StringIO()
    try:
        with redirect_stdout(said):
            build_dataset(dataset, root=root, split="test", download=True)
    except (Exception, SystemExit) as error:  # a download, a missing package or tool: anything
        reason = " ".join(f"{type(error).__name__}: {error} {said.getvalue()}".split())[:300]
        return (
            f"clip_benchmark could not fetch {dataset} into {root} ({reason}); run the same command where there is a "
            f"network, or copy {root} from there, or make shards of your own and write wds/NAME in the file"
        )
    return None
