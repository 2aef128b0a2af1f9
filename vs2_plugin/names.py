"""Model names as text: open_clip's, transformers', and steered ones: ``method:backbone[@checkpoint][@key=value]…``.

:mod:`vs2_plugin.modelstring` interprets the parts. This module imports nothing of the package: every module may use it.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

__all__ = [
    "HUB", "LOCAL", "SCHEMES", "TRANSFORMERS", "Parts", "Repository", "file_stem", "is_steered", "library_place",
    "repository", "split", "weights_tag", "with_method", "with_weights",
]  # fmt: skip

#: The two schemes that open_clip itself reads before a colon.
HUB, LOCAL = "hf-hub:", "local-dir:"
#: Prefix of a model of the package transformers.
TRANSFORMERS = "hf:"
#: Prefixes of models whose name includes the weights.
SCHEMES = (HUB, LOCAL, TRANSFORMERS)
#: Prefix of a checkpoint's repository on a hub.
_SHARED = "hf:"


class Parts(NamedTuple):
    """The parts of a steered model's name. None of them has been checked."""

    method: str | None
    """The text before the backbone's colon: a method, or ``outer:method``; None if there is no method."""
    backbone: str
    """The model that is steered."""
    words: tuple[str, ...] = ()
    """The words after the backbone, each after an ``@``: a checkpoint, and ``key=value``."""

    @property
    def checkpoint(self) -> str | None:
        """The name or folder of the SAE checkpoint, or None."""
        return self.words[0] if self.words and "=" not in self.words[0] else None

    @property
    def given(self) -> dict[str, str]:
        """The given options: key -> value, as text."""
        return {key: value for key, equals, value in (word.partition("=") for word in self.words) if equals}

    @property
    def label(self) -> str:
        """The name without the backbone.

        >>> split("dn:vs2:ViT-B-32@my-sae@alpha=1").label, split("ViT-B-32").label
        ('dn:vs2 @my-sae @alpha=1', 'zero-shot')
        """
        return "zero-shot" if self.method is None else " @".join([self.method, *self.words])

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
    """Return the repository that ``hf:owner/name[#revision]`` names (``hf:`` optional unless ``prefixed``), or None.

    >>> repository("hf:me/sae#v1.0"), repository("my-sae"), str(repository("me/sae", prefixed=False))
    (Repository(name='me/sae', revision='v1.0'), None, 'hf:me/sae')
    """
    if not text.startswith(_SHARED):
        return repository(_SHARED + text) if not prefixed else None
    match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:#([\w./-]+))?", text, re.ASCII)
    return None if match is None else Repository(*match.groups())


def library_place(backbone: str) -> Repository | str | None:
    """Return the hub repository or the folder of a model of transformers; None for a model of open_clip.

    >>> library_place("hf:openai/clip#main"), library_place("hf:./clip"), library_place("ViT-B-32")
    (Repository(name='openai/clip', revision='main'), './clip', None)
    """
    if not backbone.startswith(TRANSFORMERS):
        return None
    folder = backbone.removeprefix(TRANSFORMERS)
    place = None if folder.startswith((".", "/", "~")) or os.path.isdir(folder) else repository(_SHARED + folder)
    return place or os.path.expanduser(folder)


def split(text: str) -> Parts:
    """Split a steered model's name into its parts, without checking them.

    >>> split("vs2:hf-hub:org/model@my-sae@gate=0.9")
    Parts(method='vs2', backbone='hf-hub:org/model', words=('my-sae', 'gate=0.9'))
    >>> split("tda:vs2:ViT-B-32").method, split("ViT-B-32@gamma=2").method
    ('tda:vs2', None)
    """
    backbone, *words = text.split("@")
    methods = []
    while ":" in backbone and not backbone.startswith(SCHEMES):
        method, _, backbone = backbone.partition(":")
        methods.append(method)
    return Parts(":".join(methods) if methods else None, backbone, tuple(words))


def is_steered(name: str) -> bool:
    """Return whether a model name is that of a steered model.

    >>> [is_steered(name) for name in ("ViT-B-32", "hf-hub:org/model", "vs2:hf:org/model", "ViT-B-32@gamma=2")]
    [False, False, True, True]
    """
    # Names of other models contain neither ':' nor '@', unless they start with a scheme.
    return (":" in name or "@" in name) and not name.startswith(SCHEMES)


def with_method(method: str, name: str) -> str:
    """Return the model string of ``--model_type METHOD --model NAME``.

    >>> with_method("vs2", "ViT-B-32"), with_method("vs2", "vs2:ViT-B-32")
    ('vs2:ViT-B-32', 'vs2:ViT-B-32')
    """
    return name if name.startswith(f"{method}:") else f"{method}:{name}"


def weights_tag(model: str, pretrained: str) -> str:
    """Return the ``--pretrained`` that results record for a model, steered or not: empty for one of transformers.

    >>> weights_tag("ViT-B-32", "openai"), weights_tag("vs2:hf:openai/clip", "laion400m_e32")
    ('openai', '')
    """
    return "" if split(model).backbone.startswith(TRANSFORMERS) else pretrained


def with_weights(backbone: str, pretrained: str) -> str:
    """Return a model and its weights in words.

    >>> with_weights("ViT-B-32", "openai"), with_weights("ViT-B-32", ""), with_weights("local-dir:a/clip", "")
    ('ViT-B-32, openai', 'ViT-B-32, random weights', 'local-dir:a/clip')
    >>> with_weights("", "")
    'no CLIP'
    """
    if not backbone:
        return "no CLIP"
    if backbone.startswith(LOCAL):
        return LOCAL + os.path.normpath(backbone.removeprefix(LOCAL))
    return backbone if backbone.startswith(SCHEMES) else f"{backbone}, {pretrained or 'random weights'}"


def file_stem(name: str) -> str:
    """Return a model's name for use in a file name, with characters replaced that a file name cannot hold.

    >>> file_stem("vs2:hf-hub:org/model").replace(":", "-")
    'vs2-hf-hub-org-model'
    """
    return name.replace("/", "-").replace(":", "-" if os.name == "nt" else ":")
