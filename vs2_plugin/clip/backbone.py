"""Loads open_clip models as the harness does."""

from __future__ import annotations

import difflib
import logging
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import open_clip

from vs2_plugin.clip.sites import ClipModel, Sites
from vs2_plugin.errors import TowerError
from vs2_plugin.names import HUB, LOCAL
from vs2_plugin.text import reason_of

__all__ = [
    "Loaded",
    "check_backbone",
    "ignores_pretrained",
    "load_backbone",
    "quickgelu_mismatch",
    "warn_about_quickgelu",
]

_LOG = logging.getLogger(__name__)


@dataclass
class Loaded:
    """A model as the harness loads it."""

    model: ClipModel
    """The open_clip model, in evaluation mode, on its device."""
    transform: Any
    tokenizer: Any

    @cached_property
    def sites(self) -> Sites:
        """Where activations can be read and edited."""
        return Sites.of(self.model)


def ignores_pretrained(backbone: str) -> bool:
    """Tell whether the weights come with the backbone's name, so that ``--pretrained`` says nothing."""
    return backbone.startswith((HUB, LOCAL))


def check_backbone(backbone: str, pretrained: str) -> None:
    """Refuse, without loading anything, a backbone or weights tag that open_clip does not know.

    Raises:
        TowerError: saying what was wrong and what comes close.
    """
    if backbone.startswith(LOCAL):
        if not hasattr(open_clip.factory, "LOCAL_DIR_PREFIX"):
            raise TowerError(f"{backbone!r}: {LOCAL} names need open_clip 3; pip install 'open_clip_torch>=3'")
        folder = Path(backbone[len(LOCAL) :])
        if not (folder / "open_clip_config.json").is_file():
            raise TowerError(
                f"{backbone!r}: no file {folder / 'open_clip_config.json'}; expected a folder that open_clip wrote"
            )
        return
    if backbone.startswith(HUB):
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
        raise TowerError(f"{backbone} has no weights {pretrained!r}; known tags: {offered}")


_warned: set[str] = set()


def quickgelu_mismatch(backbone: str, pretrained: str) -> str | None:
    """In words, that these weights were trained with QuickGELU and this architecture is without; None if that is not
    so."""
    if ignores_pretrained(backbone):
        return None
    backbone = backbone.replace("/", "-")  # as open_clip reads it
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


def load_backbone(backbone: str, pretrained: str, cache_dir: str | None = None, device: str = "cpu") -> Loaded:
    """Load a model by clip_benchmark's own function, so that training and evaluation see the same one.

    Raises:
        TowerError: open_clip does not know it, or could not fetch or read it.
    """
    from clip_benchmark.models.open_clip import load_open_clip  # patched once it is imported, which needs this module

    check_backbone(backbone, pretrained)
    warn_about_quickgelu(backbone, pretrained)
    try:
        model, transform, tokenizer = load_open_clip(
            model_name=backbone, pretrained=pretrained, cache_dir=cache_dir, device=device
        )
    except Exception as error:  # whatever open_clip, the hub client or the network raised
        weights = "" if ignores_pretrained(backbone) else f" with weights {pretrained!r}"
        hint = "without a network, give the path of a weights file as --pretrained, or a folder as local-dir:PATH"
        raise TowerError(f"could not load {backbone}{weights} ({hint}): {reason_of(error)}") from error
    return Loaded(model.eval(), transform, tokenizer)
