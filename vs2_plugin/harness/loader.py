"""Loads steered models, for the harness and for Python."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from vs2_plugin.checkpoint.checkpoint import Checkpoint
from vs2_plugin.checkpoint.store import Store
from vs2_plugin.clip.backbone import load_backbone
from vs2_plugin.data.images import place_of
from vs2_plugin.data.naming import DataSet
from vs2_plugin.errors import CheckpointNotFound, ModelStringError
from vs2_plugin.harness.advice import missing_checkpoint
from vs2_plugin.harness.shared import Shared
from vs2_plugin.host import Evaluation
from vs2_plugin.model.classifier import Classifier, class_names, prompts_of
from vs2_plugin.model.parts import find_checkpoint
from vs2_plugin.model.steered import SteeredCLIP
from vs2_plugin.modelstring import ModelString, parse
from vs2_plugin.steering.context import Task

__all__ = ["bind_waiting", "is_waiting", "load"]


class _Waiting:
    """Holds the model loaded last, if it does not know its data set yet, which clip_benchmark builds next."""

    model: weakref.ref[SteeredCLIP] | None = None


def _find(
    spec: ModelString, pretrained: str, store: Store, given: Checkpoint | None, task: Task | None
) -> Checkpoint | None:
    """Return the checkpoint of a model for a data set: ``given``, else the one found in the store. (Not a closure, so
    that a model can be pickled.)"""
    if given is not None and spec.needs_checkpoint:
        return given
    if task is None:  # without a data set, only a model that names its checkpoint is bound
        return find_checkpoint(spec, store, pretrained, "")
    try:
        home = "" if task.root is None else DataSet(task.dataset, task.root).home
        return find_checkpoint(spec, store, pretrained, task.dataset, home)
    except CheckpointNotFound:
        run = Evaluation(str(spec), pretrained, task.dataset, DataSet("", task.root or "root").template)
        raise missing_checkpoint([(spec, run)], store) from None


def load(
    model: str,
    pretrained: str | Path = "",
    cache_dir: str | Path | None = None,
    device: str = "cpu",
    *,
    dataset: str | Path | None = None,
    checkpoint: Checkpoint | str | Path | None = None,
    classes: Sequence[str] | None = None,
    prompts: Sequence[str] | str | None = None,
    amp: bool = True,
    store: Store | str | Path | None = None,
    shared: Shared | None = None,
) -> tuple[SteeredCLIP, Any, Any]:
    """Load a steered model. Its ``repr`` says how it steers.

    Args:
        model: a model string, ``method:backbone[@checkpoint][@key=value]…``.
        pretrained: open_clip's weights tag or file; empty for random weights.
        cache_dir: where downloaded weights are kept.
        device: the device of the model.
        dataset: the data set whose checkpoint is used; by default, the next one that clip_benchmark builds.
        checkpoint: the checkpoint, its name or its folder, unless the string names one.
        classes: names of classes, for :meth:`SteeredCLIP.classify`, and for methods that need classes.
        prompts: prompts with ``{c}`` or ``{}`` for the class name; by default CLIP's usual one.
        amp: whether classes are embedded and images classified under autocast; False for clip_benchmark's ``--no_amp``.
        store: the store with the checkpoints, or its folder; by default that of the command line.
        shared: weights and texts that models of a command share; by default, a model shares nothing with others.

    Returns:
        The model, its image preprocessing and its tokenizer, as ``open_clip`` and ``clip_benchmark`` give them.

    Raises:
        ModelStringError, TowerError, CheckpointError, PluginError, SettingError: what is wrong, and how to fix it.

    Example::

        >>> import tempfile
        >>> import vs2_plugin
        >>> from vs2_plugin.demo.digits import CLASSES, MODEL, read_digits
        >>> images, store = read_digits("train")[0], tempfile.mkdtemp()
        >>> vs2_plugin.train(images[:64], model=MODEL, samples=2000, amp=False, quiet=True, store=store).name
        'local-dir-tiny-clip_images'
        >>> model, *_ = vs2_plugin.load(f"vs2:{MODEL}", dataset="images", classes=CLASSES, amp=False, store=store)
        >>> model.classify(images[:3]).probabilities.shape
        torch.Size([3, 10])
    """
    spec = _with_checkpoint(parse(model), checkpoint)
    checkpoints = store if isinstance(store, Store) else Store.default(store)
    names, templates = None if classes is None else class_names(classes), prompts_of(prompts)
    pretrained, cache_dir = str(pretrained), None if cache_dir is None else str(cache_dir)
    loaded = load_backbone(spec.backbone, pretrained, cache_dir, device, None if shared is None else shared.twin)
    ready = checkpoint if isinstance(checkpoint, Checkpoint) else None
    steered = SteeredCLIP(spec, loaded, partial(_find, spec, pretrained, checkpoints, ready), amp)
    _bind(steered, dataset, names, templates)
    if names is not None:
        steered.set_classifier(Classifier.of(steered, loaded.tokenizer, names, templates, amp))
    elif dataset is None:
        _Waiting.model = weakref.ref(steered)
    return steered, loaded.transform, loaded.tokenizer


def _bind(
    model: SteeredCLIP, dataset: str | Path | None, names: Sequence[str] | None, templates: Sequence[str]
) -> None:
    """Bind a model to its data set, or to none if it needs none to find its checkpoint; else leave it unbound."""
    if dataset is not None:
        texts = (None, None) if names is None else (list(names), list(templates))
        data = DataSet.of(dataset)
        model.bind(Task(data.name, data.root if data.home else None, None, *texts))
    elif model.spec.checkpoint or not model.spec.needs_checkpoint:
        model.bind(None)


def _with_checkpoint(spec: ModelString, checkpoint: Checkpoint | str | Path | None) -> ModelString:
    """Return a model string that names ``checkpoint``, if there is one.

    Raises:
        ModelStringError: the model string names a checkpoint already.
    """
    if checkpoint is None:
        return spec
    if spec.checkpoint is not None:
        raise ModelStringError(f"model {str(spec)!r} names a checkpoint; leave it out there, or leave out checkpoint=")
    return replace(spec, checkpoint=checkpoint.name if isinstance(checkpoint, Checkpoint) else str(checkpoint))


def is_waiting() -> bool:
    """Return whether there is a steered model that does not know its data set yet."""
    return _Waiting.model is not None and _Waiting.model() is not None


def bind_waiting(name: str, root: str, split: str, dataset: Any) -> None:
    """Bind the model loaded last to the data set of its evaluation; later data sets (a linear probe's) are ignored."""
    model, _Waiting.model = None if _Waiting.model is None else _Waiting.model(), None
    if model is not None:
        classes, templates = getattr(dataset, "classes", None), getattr(dataset, "templates", None)
        model.bind(Task(name, root, split, classes, templates, place_of(DataSet(name, root), dataset)))
