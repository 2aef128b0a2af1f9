"""Fetches weights and data sets before the first run that needs them, so that each missing one is reported once, with
the way to get it."""

from __future__ import annotations

import logging
import shlex
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from vs2_plugin.data.archives import official_of
from vs2_plugin.data.naming import DataSet
from vs2_plugin.data.shards import LISTING, local_shards
from vs2_plugin.errors import DataError, Vs2Error
from vs2_plugin.host import build, unknown_data_set
from vs2_plugin.text import one_line, reason_of

__all__ = ["Missing", "missing_data", "missing_encoder", "missing_weights"]


@dataclass(frozen=True)
class Missing:
    """Weights or a data set that are missing and could not be fetched."""

    what: str
    """A short text, for each cell that needs the missing part."""
    why: str
    """The reason why the part is missing."""
    remedy: str
    """How to get the part."""

    def __str__(self) -> str:
        return f"{self.why}; {self.remedy}" if self.remedy else self.why


def missing_weights(backbone: str, weights: str) -> Missing | None:
    """Return why a model cannot be loaded, and how to get its weights; None if it can."""
    from vs2_plugin.clip.backbone import load_backbone

    return _try(
        lambda: load_backbone(backbone, weights),
        f"the weights of {backbone},{weights}",
        "open_clip fetches weights where there is a network, into a cache ($HF_HOME) that can be copied here; or write "
        "'MODEL,PATH' for the backbone in the file, with the PATH of a weights file",
    )


def missing_encoder(text: str) -> Missing | None:
    """Return why a retrieval encoder, as ``--retrieval_encoder`` names it, cannot be loaded; None if it can."""
    from vs2_plugin.gallery.contents import split_name
    from vs2_plugin.gallery.encoders import load_encoder

    name, weights = split_name(text)
    return _try(
        lambda: load_encoder(name, weights, {"mean": (0, 0, 0), "std": (1, 1, 1)}, "cpu"),
        f"the retrieval encoder {name}",
        "timm fetches weights where there is a network, into a cache ($HF_HOME) that can be copied here; or write "
        "'MODEL,PATH' for retrieval_encoder in the file, with the PATH of a weights file",
    )


def _try(load: Callable[[], object], what: str, remedy: str) -> Missing | None:
    """Call ``load`` and return why it failed; None if it did not."""
    logging.disable(logging.ERROR)  # the hub's client logs every failed attempt
    try:
        load()
    except Vs2Error as error:
        if error.__cause__ is None:  # an unknown name, which fails without an attempt to load
            return Missing(one_line(str(error), 1000), one_line(str(error), 1000), "")
        return Missing(f"{what} cannot be obtained", f"could not load {what} ({reason_of(error.__cause__)})", remedy)
    finally:
        logging.disable(logging.NOTSET)
    return None


def missing_data(dataset: str, dataset_root: str, split: str) -> Missing | None:
    """Return why a data set cannot be built, and how to get it; None if it can.

    Args:
        dataset: clip_benchmark's name of the data set.
        dataset_root: folder of the data set, in which ``{dataset}`` is filled in.
        split: the split that is needed.
    """
    named = DataSet.of(dataset, dataset_root)
    root = named.root
    if named.is_shards:
        return _missing_shards(named, dataset, split)
    output = StringIO()
    try:
        with redirect_stdout(output), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # clip_benchmark warns that it ignores the split
            build(named, "test")
    except DataError as error:
        unknown = unknown_data_set(dataset)
        if unknown is not None:
            return Missing(unknown, unknown, "")
        reason = one_line(f"{reason_of(error.__cause__ or error)} {output.getvalue()}")
        return Missing(
            f"{dataset} is missing",
            f"clip_benchmark could not fetch {dataset} into {root} ({reason})",
            "run the same command where there is a network, or copy the folder from there, or make shards of your own "
            "and write wds/NAME in the file",
        )
    return None


def _missing_shards(named: DataSet, dataset: str, split: str) -> Missing | None:
    root, file = named.root, Path(named.root, split, LISTING)
    if "://" in root or file.is_file():
        return None
    if named.is_listed:
        try:
            local_shards(root, split)
        except DataError as error:
            return Missing(f"{dataset} is missing", str(error), "")
        return None
    why = f"no file {file}" if Path(root).is_dir() else f"no folder {root} of {dataset}"
    return Missing(f"{dataset} is missing", why, _how_to_make(dataset, root))


def _how_to_make(dataset: str, root: str) -> str:
    """Return how to make shards that cannot be downloaded automatically."""
    entry = official_of(dataset)
    if entry is not None:
        word, official = entry
        command = shlex.join(["vs2", "data", word, official.archive, root])
        return f"get {official.archive} ({official.url}), and: {command}"
    return (
        f"clip_benchmark does not fetch {dataset}; make webdataset shards in {root} (clip_benchmark_export_wds does): "
        "train/ and test/, each with 0.tar to 3.tar or more (KEY.jpg or KEY.png and KEY.cls of each image) and "
        "nshards.txt with their number; classnames.txt and zeroshot_classification_templates.txt, a line each"
    )
