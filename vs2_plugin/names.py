"""Model names as text: open_clip's own, and those of steered models, ``method:backbone[@checkpoint][@key=value]…``.

What the parts mean is for :mod:`vs2_plugin.modelstring`. This module imports nothing of the package: all may use it.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

__all__ = [
    "HUB", "LOCAL", "Parts", "Repository", "file_stem", "is_steered", "repository", "split", "with_method",
    "with_weights",
]  # fmt: skip

#: The two schemes that open_clip itself reads before a colon.
HUB, LOCAL = "hf-hub:", "local-dir:"
#: What stands before the repository of a checkpoint on a hub.
_SHARED = "hf:"


class Parts(NamedTuple):
    """The parts of a steered model's name. None of them has been checked."""

    method: str | None
    """What stands before the backbone's colon: a method, or ``outer:method``; None if there is no method."""
    backbone: str
    """The open_clip model."""
    words: tuple[str, ...] = ()
    """What follows, an ``@`` before each: a checkpoint, and ``key=value``."""

    @property
    def checkpoint(self) -> str | None:
        """The name or folder of the SAE checkpoint, if it is given."""
        return self.words[0] if self.words and "=" not in self.words[0] else None

    @property
    def given(self) -> dict[str, str]:
        """The options that are given."""
        return {key: value for key, equals, value in (word.partition("=") for word in self.words) if equals}

    def __str__(self) -> str:
        name = self.backbone if self.method is None else f"{self.method}:{self.backbone}"
        return "@".join([name, *self.words])


class Repository(NamedTuple):
    """A repository on a hub."""

    name: str
    """``owner/name``."""
    revision: str | None = None
    """A branch, tag or commit; None for the main branch."""

    def __str__(self) -> str:
        return _SHARED + self.name + ("" if self.revision is None else f"#{self.revision}")


def repository(text: str, prefixed: bool = True) -> Repository | None:
    """Return the repository of a checkpoint that ``hf:owner/name[#revision]`` names; None if it is no such text.

    >>> repository("hf:me/sae#v1.0"), repository("my-sae"), str(repository("me/sae", prefixed=False))
    (Repository(name='me/sae', revision='v1.0'), None, 'hf:me/sae')
    """
    if not text.startswith(_SHARED):
        return repository(_SHARED + text) if not prefixed else None
    found = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:#([\w./-]+))?", text, re.ASCII)
    return None if found is None else Repository(*found.groups())


def split(text: str) -> Parts:
    """Take a steered model's name apart, however wrong it is.

    >>> split("vs2:hf-hub:org/model@my-sae@gate=0.9")
    Parts(method='vs2', backbone='hf-hub:org/model', words=('my-sae', 'gate=0.9'))
    >>> split("tda:vs2:ViT-B-32").method, split("ViT-B-32@gamma=2").method
    ('tda:vs2', None)
    """
    backbone, *words = text.split("@")
    methods = []
    while ":" in backbone and not backbone.startswith((HUB, LOCAL)):
        method, _, backbone = backbone.partition(":")
        methods.append(method)
    return Parts(":".join(methods) if methods else None, backbone, tuple(words))


def is_steered(name: str) -> bool:
    """Return whether a model name is for this package rather than for open_clip.

    >>> [is_steered(name) for name in ("ViT-B-32", "hf-hub:org/model", "vs2:ViT-B-32", "ViT-B-32@gamma=2")]
    [False, False, True, True]
    """
    # open_clip's own names hold neither ':' nor '@', except for its two schemes; a path of local-dir: may.
    return (":" in name or "@" in name) and not name.startswith((HUB, LOCAL))


def with_method(method: str, name: str) -> str:
    """Return the model string of ``--model_type METHOD --model NAME``.

    >>> with_method("vs2", "ViT-B-32"), with_method("vs2", "vs2:ViT-B-32")
    ('vs2:ViT-B-32', 'vs2:ViT-B-32')
    """
    return name if name.startswith(f"{method}:") else f"{method}:{name}"


def with_weights(backbone: str, pretrained: str) -> str:
    """Return a model and its weights in words.

    >>> with_weights("ViT-B-32", "openai"), with_weights("ViT-B-32", ""), with_weights("local-dir:a/clip", "")
    ('ViT-B-32, openai', 'ViT-B-32, random weights', 'local-dir:a/clip')
    """
    if backbone.startswith(LOCAL):
        return LOCAL + os.path.normpath(backbone.removeprefix(LOCAL))
    return backbone if backbone.startswith(HUB) else f"{backbone}, {pretrained or 'random weights'}"


def file_stem(name: str) -> str:
    """Return what names the results file of a model: its name, but for what cannot stand in a file's.

    >>> file_stem("vs2:hf-hub:org/model").replace(":", "-")
    'vs2-hf-hub-org-model'
    """
    return name.replace("/", "-").replace(":", "-" if os.name == "nt" else ":")
