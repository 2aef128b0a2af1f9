"""Loads the tower of an SAE, and classes for zero-shot figures."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from vs2_plugin.checkpoint.records import GIVEN
from vs2_plugin.clip.sites import embedding_from
from vs2_plugin.data.naming import DataSet
from vs2_plugin.inspection.subject import open_subject
from vs2_plugin.quality.measure import ZeroShot
from vs2_plugin.quality.subject import Images, Subject

__all__ = ["NO_CLASSES", "open_zero_shot"]

_LOG = logging.getLogger(__name__)
NO_CLASSES = "it needs classes: name a data set that has them with --dataset, or --classes FILE"


def open_zero_shot(
    subjects: Sequence[Subject],
    dataset: str | None,
    dataset_root: str,
    classes: list[str] | None,
    model_cache_dir: str | None = None,
    wds_cache_dir: str | None = None,
) -> list[ZeroShot | str]:
    """Load the tower and embed the classes, for each SAE; return the reasons as text where that is not possible.

    Args:
        subjects: SAEs of one tower and site.
        dataset: the data set whose classes and prompts are used.
        dataset_root: the folder that holds the data set.
        classes: names of classes in place of the data set's.
        model_cache_dir: where downloaded models are kept.
        wds_cache_dir: where downloaded shards are kept.

    Raises:
        Vs2Error: the tower or the data set cannot be loaded.
    """
    checkpoint, first = subjects[0].checkpoint, subjects[0].site
    if dataset is None and classes is None:
        return [NO_CLASSES] * len(subjects)
    if checkpoint.tower is None:
        return ["it needs the tower, but the SAE was trained on activations of an unnamed one"] * len(subjects)
    method = "vs2" if first.variant == "plain" else "pass"
    opened = open_subject(
        f"{method}:{checkpoint.backbone}", checkpoint.pretrained, dataset or GIVEN, dataset_root,
        checkpoint=checkpoint, classes=classes, model_cache_dir=model_cache_dir, wds_cache_dir=wds_cache_dir,
    )  # fmt: skip
    model = opened.model
    site = model.sites.find(first.hookpoint)
    embed = partial(embedding_from, model.model, site) if model.sites.at_end(site) else None
    named = DataSet.of(dataset or "", dataset_root).name if classes is None else None
    about = f"{len(opened.classes):,} classes {'given' if named is None else f'of {named}'}"
    zero_shot = ZeroShot(embed, opened.class_texts.T, False, about)
    labelled = [_is_labelled(subject.images, len(opened.classes), named) for subject in subjects]
    if named is None and any(labelled):
        _LOG.warning(
            "labels are taken as line numbers of --classes, so they have to be of these classes in this order: 0 is "
            "%r, 1 is %r", *opened.classes[:2],
        )  # fmt: skip
    return [replace(zero_shot, labelled=own) for own in labelled]


def _is_labelled(images: Images | None, classes: int, dataset: str | None) -> bool:
    """Return whether all images have labels that are numbers of the classes.

    ``dataset`` names the data set of the classes; None: they are given, and a gallery of one data set may number them.
    """
    if images is None or images.labels is None:
        return False
    if len(images.datasets) > 1 or (dataset is not None and images.datasets not in ((), (dataset,))):
        return False
    return bool(np.isin(images.labels, range(classes)).all())
