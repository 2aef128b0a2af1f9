"""Loads models of open_clip and of transformers as the harness does."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import open_clip
import torch

from vs2_plugin.clip.hf import check_folder, load_library
from vs2_plugin.clip.sites import ClipModel, Sites
from vs2_plugin.errors import TowerError, Vs2Error
from vs2_plugin.hub import chain, require_hub
from vs2_plugin.names import HUB, LOCAL, SCHEMES, TRANSFORMERS, Repository, library_place
from vs2_plugin.text import one_line, reason_of

__all__ = [
    "Load",
    "Loaded",
    "check_backbone",
    "ignores_pretrained",
    "load_backbone",
    "loader_of",
    "quickgelu_mismatch",
    "require_weights",
    "warn_about_quickgelu",
    "weights_repository",
]

_LOG = logging.getLogger(__name__)


#: Gives what its first argument, the stock loader with the others (name, weights, cache, device), would load.
Load = Callable[..., tuple[Any, Any, Any]]


@dataclass
class Loaded:
    """A model as the harness loads it."""

    model: ClipModel
    """The model, in evaluation mode, on its device."""
    transform: Any
    tokenizer: Any

    @cached_property
    def sites(self) -> Sites:
        """Where activations can be read and edited."""
        return Sites.of(self.model)


def ignores_pretrained(backbone: str) -> bool:
    """Tell whether the weights come with the backbone's name, so that ``--pretrained`` says nothing."""
    return backbone.startswith(SCHEMES)


def check_backbone(backbone: str, pretrained: str) -> None:
    """Refuse, without loading anything, a backbone or weights tag that is not known, as far as no hub has to be asked.

    Raises:
        TowerError: saying what was wrong and what comes close.
    """
    if ignores_pretrained(backbone):
        _check_own_weights(backbone)
        return
    known = open_clip.list_models()
    name = backbone.replace("/", "-")
    if name not in known:
        close = [one for one in known if one.lower() == name.lower()] or difflib.get_close_matches(
            name, known, n=3, cutoff=0.5
        )
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise TowerError(
            f"open_clip has no model {backbone!r}; {hint}All names: python -c 'import open_clip; "
            "print(open_clip.list_models())'"
        )
    if not pretrained or os.path.isfile(pretrained):
        return
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained.lower().replace("-", "_") not in tags and pretrained not in tags:
        offered = ", ".join(tags) or "none: use --pretrained '' for random weights, or a file"
        file = ", and there is no such file" if os.path.basename(pretrained) != pretrained else ""
        raise TowerError(f"{backbone} has no weights {pretrained!r}{file}; known tags: {offered}")


def _check_own_weights(backbone: str) -> None:
    """Check a name that the weights come with. Raises TowerError."""
    place = library_place(backbone)
    if isinstance(place, str):
        check_folder(backbone, Path(place))
    if place is not None:
        return
    if backbone.startswith(HUB):
        if "/" not in backbone:
            raise TowerError(f"{backbone!r} does not name a repository on the hub; expected {HUB}ORGANISATION/NAME")
        return
    config = Path(backbone.removeprefix(LOCAL)) / "open_clip_config.json"
    if not config.is_file():
        raise TowerError(f"{backbone!r}: no file {config}; expected a folder that open_clip wrote")


_warned: set[str] = set()


def quickgelu_mismatch(backbone: str, pretrained: str) -> str | None:
    """In words, that these weights were trained with QuickGELU and this architecture is without; None if that is not
    so."""
    if ignores_pretrained(backbone):
        return None
    backbone = _architecture(backbone)
    # As an attribute of the package it is missing in some versions.
    weights = open_clip.pretrained.get_pretrained_cfg(backbone, pretrained) or {}
    architecture = open_clip.get_model_config(backbone) or {}
    if not weights.get("quick_gelu", False) or architecture.get("quick_gelu", False):
        return None
    better = f"{backbone}-quickgelu"
    better = f"; {better} is the right name for them" if better in open_clip.list_models() else ""
    return (
        f"the weights {pretrained!r} were trained with QuickGELU and {backbone} has GELU, which costs accuracy{better}"
    )


def warn_about_quickgelu(backbone: str, pretrained: str) -> None:
    """Log :func:`quickgelu_mismatch` once."""
    mismatch = quickgelu_mismatch(backbone, pretrained)
    if mismatch and mismatch not in _warned:
        _warned.add(mismatch)
        _LOG.warning(mismatch)


def _offline(backbone: str) -> str:
    if backbone.startswith(TRANSFORMERS):
        return f"without a network, give a folder that save_pretrained wrote, as {TRANSFORMERS}PATH"
    return f"without a network, give the path of a weights file as --pretrained, or a folder as {LOCAL}PATH"


def _not_loaded(backbone: str, pretrained: str) -> str:
    weights = "" if ignores_pretrained(backbone) else f" with weights {pretrained!r}"
    return f"could not load {backbone}{weights}"


def require_weights(backbone: str, pretrained: str, cache_dir: str | None = None) -> None:
    """Refuse, within seconds, weights that would have to be fetched from a hub that cannot be reached.

    Raises:
        TowerError: saying what the network said, and what to do without one.
    """
    try:
        for repository, folder in _repositories(backbone, pretrained, cache_dir):
            require_hub(repository, folder)
    except ConnectionError as error:
        raise TowerError(f"{_not_loaded(backbone, pretrained)}: {error}; {_offline(backbone)}") from error


def weights_repository(backbone: str, pretrained: str) -> str | None:
    """The hub's name of a model's weights, ``owner/name``; None where they are a file's, or none is known."""
    place = library_place(backbone)
    if isinstance(place, Repository):
        return place.name
    if backbone.startswith(HUB):
        return backbone.removeprefix(HUB)
    if place is not None or backbone.startswith(LOCAL) or os.path.isfile(pretrained):
        return None
    weights = open_clip.pretrained.get_pretrained_cfg(_architecture(backbone), pretrained) or {}
    return os.path.split(weights.get("hf_hub") or "")[0] or None


def _architecture(backbone: str) -> str:
    return backbone.replace("/", "-")  # as open_clip reads it


def _repositories(backbone: str, pretrained: str, cache_dir: str | None) -> Iterator[tuple[str, str | None]]:
    """Yield the repositories of the hub that a model is fetched from, and where their files are kept."""
    repository = weights_repository(backbone, pretrained)
    if repository is not None:
        yield repository, cache_dir
    if not backbone.startswith(SCHEMES):
        text = (open_clip.get_model_config(_architecture(backbone)) or {}).get("text_cfg", {})
        if text.get("hf_tokenizer_name"):
            yield text["hf_tokenizer_name"], None


def load_backbone(
    backbone: str, pretrained: str, cache_dir: str | None = None, device: str = "cpu", load: Load | None = None
) -> Loaded:
    """Load a model as clip_benchmark does, so that training and evaluation see the same one.

    ``load``, if given, decides whether the loader is called, or a model of the same weights is at hand.

    Raises:
        TowerError: it is not known, or could not be fetched or read.
    """
    check_backbone(backbone, pretrained)
    try:
        torch.empty(0, device=device)
    except Exception as error:  # no such device, or a torch without support for it
        raise TowerError(f"device {device!r} cannot be used: {reason_of(error)}; expected 'cpu', or a GPU's") from error
    warn_about_quickgelu(backbone, pretrained)
    require_weights(backbone, pretrained, cache_dir)
    try:
        given = {"model_name": backbone, "pretrained": pretrained, "cache_dir": cache_dir, "device": device}
        stock = partial(loader_of(backbone), **given)
        model, transform, tokenizer = stock() if load is None else load(stock, *given.values())
    except Vs2Error:
        raise
    except Exception as error:  # whatever open_clip, the hub client or the network raised
        first = [*chain(error)][-1]  # what a network or a disk said, which open_clip and the hub wrap in words
        told = f"{reason_of(first)}; " if first is not error and isinstance(first, OSError) else ""
        what = _not_loaded(backbone, pretrained)
        if os.path.isfile(pretrained) and not ignores_pretrained(backbone):
            raise TowerError(f"{what}: {_of_file(backbone, error)}") from error
        raise TowerError(f"{what} ({_offline(backbone)}): {told}{reason_of(error)}") from error
    _require_numbers(model, _not_loaded(backbone, pretrained))
    return Loaded(model.eval(), transform, tokenizer)


def _of_file(backbone: str, error: Exception) -> str:
    """Say what is wrong with a file of weights that open_clip could not load."""
    other = "loading state_dict" in str(error)  # torch's words
    found = "its weights do not fit this architecture" if other else "it is not a file of weights"
    return (
        f"{found} ({one_line(reason_of(error), 160)}); expected what open_clip wrote for {backbone}, a state_dict or a "
        "checkpoint of a training, as .pt or .safetensors"
    )


def loader_of(backbone: str) -> Callable[..., tuple[Any, Any, Any]]:
    """Return what loads a model, by the arguments of clip_benchmark's loader of open_clip."""
    if backbone.startswith(TRANSFORMERS):
        return load_library
    from clip_benchmark.models.open_clip import load_open_clip  # patched once it is imported, which needs this module

    loader: Callable[..., tuple[Any, Any, Any]] = load_open_clip
    return loader


def _require_numbers(model: Any, what: str) -> None:
    """Refuse a vision tower whose activations would be no numbers, whatever the image."""
    for name, weights in model.visual.named_parameters():
        if not weights.isfinite().all():
            raise TowerError(
                f"{what}: visual.{name} holds NaN or infinity; expected finite weights: give another file or "
                f"tag as --pretrained, or another folder as {LOCAL}PATH or {TRANSFORMERS}PATH"
            )
