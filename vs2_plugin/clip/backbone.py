"""Loading of models of open_clip and transformers, as the harness loads them."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, partial
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
    "require_weights",
    "warn_about_quickgelu",
    "weights_repository",
]

_LOG = logging.getLogger(__name__)


#: Function of the stock loader, with its arguments bound, and these arguments (name, weights, cache, device), which
#: returns what the loader would return: model, transform, tokenizer.
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
        """Sites of the model at which activations can be read and edited."""
        return Sites.of(self.model)


def ignores_pretrained(backbone: str) -> bool:
    """Tell whether the backbone's name determines the weights, so that ``--pretrained`` is ignored."""
    return backbone.startswith(SCHEMES)


def check_backbone(backbone: str, pretrained: str) -> None:
    """Raise TowerError for an unknown backbone or weights tag, without loading anything or asking a hub.

    Raises:
        TowerError: the backbone or tag is unknown; the message names similar ones.
    """
    if ignores_pretrained(backbone):
        _check_own_weights(backbone)
        return
    models = open_clip.list_models()
    name = _architecture(backbone)
    if name not in models:
        close = [model for model in models if model.lower() == name.lower()] or difflib.get_close_matches(
            name, models, n=3, cutoff=0.5
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
    """Check a backbone whose name determines the weights. Raises TowerError."""
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


@cache
def warn_about_quickgelu(backbone: str, pretrained: str) -> None:
    """Log a warning, once, if the weights were trained with QuickGELU and the architecture lacks QuickGELU."""
    if ignores_pretrained(backbone):
        return
    backbone = _architecture(backbone)
    # Taken from its module, since some versions of the package do not export it.
    weights = open_clip.pretrained.get_pretrained_cfg(backbone, pretrained) or {}
    architecture = open_clip.get_model_config(backbone) or {}
    if not weights.get("quick_gelu", False) or architecture.get("quick_gelu", False):
        return
    better = f"{backbone}-quickgelu"
    better = f"; {better} is the right name for them" if better in open_clip.list_models() else ""
    _LOG.warning(
        "the weights %r were trained with QuickGELU and %s has GELU, which costs accuracy%s",
        pretrained, backbone, better,
    )  # fmt: skip


def _offline(backbone: str) -> str:
    if backbone.startswith(TRANSFORMERS):
        return f"without a network, give a folder that save_pretrained wrote, as {TRANSFORMERS}PATH"
    return f"without a network, give the path of a weights file as --pretrained, or a folder as {LOCAL}PATH"


def _not_loaded(backbone: str, pretrained: str) -> str:
    weights = "" if ignores_pretrained(backbone) else f" with weights {pretrained!r}"
    return f"could not load {backbone}{weights}"


def require_weights(backbone: str, pretrained: str, cache_dir: str | None = None) -> None:
    """Raise TowerError, within seconds, if weights have to be fetched from a hub that cannot be reached.

    Raises:
        TowerError: with the network's error, and what to do without a network.
    """
    try:
        for repository, folder in _repositories(backbone, pretrained, cache_dir):
            require_hub(repository, folder)
    except ConnectionError as error:
        raise TowerError(f"{_not_loaded(backbone, pretrained)}: {error}; {_offline(backbone)}") from error


def weights_repository(backbone: str, pretrained: str) -> str | None:
    """Return the hub's repository of a model's weights, ``owner/name``; None if unknown, or if they are in a file."""
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
    return backbone.replace("/", "-")  # open_clip does so too


def _repositories(backbone: str, pretrained: str, cache_dir: str | None) -> Iterator[tuple[str, str | None]]:
    """Yield each repository of the hub that a model is fetched from, with its cache folder (None: the hub's own)."""
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
    """Load a model as clip_benchmark does, so that training and evaluation use the same model.

    ``load``, if given, decides whether to call the loader, or to return a loaded model with the same weights.

    Raises:
        TowerError: the model is unknown, or could not be fetched or read; or the device cannot be used.
    """
    check_backbone(backbone, pretrained)
    try:
        torch.empty(0, device=device, dtype=torch.double)  # in which figures are added up
    except Exception as error:  # no such device, or a torch without support for it
        raise TowerError(f"device {device!r} cannot be used: {reason_of(error)}; expected 'cpu', or a GPU's") from error
    warn_about_quickgelu(backbone, pretrained)
    require_weights(backbone, pretrained, cache_dir)
    try:
        arguments = {"model_name": backbone, "pretrained": pretrained, "cache_dir": cache_dir, "device": device}
        stock = partial(loader_of(backbone), **arguments)
        model, transform, tokenizer = stock() if load is None else load(stock, *arguments.values())
    except Vs2Error:
        raise
    except Exception as error:  # whatever open_clip, the hub client or the network raised
        first = [*chain(error)][-1]  # the network's or disk's own error, which open_clip and the hub wrap
        cause = f"{reason_of(first)}; " if first is not error and isinstance(first, OSError) else ""
        what = _not_loaded(backbone, pretrained)
        if os.path.isfile(pretrained) and not ignores_pretrained(backbone):
            raise TowerError(f"{what}: {_of_file(backbone, pretrained, error)}") from error
        raise TowerError(f"{what} ({_offline(backbone)}): {cause}{reason_of(error)}") from error
    _require_numbers(model, _not_loaded(backbone, pretrained))
    return Loaded(model.eval(), transform, tokenizer)


def _of_file(backbone: str, file: str, error: Exception) -> str:
    """Return words on why open_clip could not load a file of weights."""
    try:
        open_clip.factory.load_state_dict(file)  # an error may also come from what is done with the weights afterwards
        fault = "its weights do not fit this architecture"
    except Exception:  # reading an arbitrary file can raise anything
        fault = "it is not a file of weights"
    return (
        f"{fault} ({one_line(reason_of(error), 160)}); expected what open_clip wrote for {backbone}, a state_dict or a "
        "checkpoint of a training, as .pt or .safetensors"
    )


def loader_of(backbone: str) -> Callable[..., tuple[Any, Any, Any]]:
    """Return the function that loads a model, with the arguments of clip_benchmark's loader for open_clip."""
    if backbone.startswith(TRANSFORMERS):
        return load_library
    from clip_benchmark.models.open_clip import load_open_clip  # importing it patches it, by means of this module

    loader: Callable[..., tuple[Any, Any, Any]] = load_open_clip
    return loader


def _require_numbers(model: Any, what: str) -> None:
    """Raise TowerError if a parameter of the vision tower is NaN or infinite, which would make activations NaN."""
    for name, weights in model.visual.named_parameters():
        if not weights.isfinite().all():
            raise TowerError(
                f"{what}: visual.{name} holds NaN or infinity; expected finite weights: give another file or "
                f"tag as --pretrained, or another folder as {LOCAL}PATH or {TRANSFORMERS}PATH"
            )
