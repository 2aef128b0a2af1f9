"""Model strings: ``method:backbone[@checkpoint][@key=value]…``.

    vs2:ViT-B-32
    vs2:ViT-B-32@gamma=2@lam=1.5
    vs2:ViT-L-14@my-checkpoint@alpha=0.8
    vs2:hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K

Everything is read here and nowhere else, with no heavy imports.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field

from vs2_plugin.errors import ModelStringError
from vs2_plugin.method import AUTOMATIC, Method, Scalar
from vs2_plugin.plugins import Registry, registry

__all__ = ["GRAMMAR", "ModelString", "is_steered", "parse"]

GRAMMAR = "method:backbone[@checkpoint][@key=value]..."
#: What open_clip itself reads before a colon.
_SCHEMAS = ("hf-hub:", "local-dir:")
_BACKBONE = re.compile(r"(hf-hub:[\w.\-]+/[\w.\-]+|local-dir:[^@]+|[A-Za-z0-9][\w.\-/]*)\Z", re.ASCII)
_CHECKPOINT = re.compile(r"[\w.\-+/~ ]+\Z", re.ASCII)


@dataclass(frozen=True)
class ModelString:
    """A model string, read."""

    method: Method
    """The steering method."""
    backbone: str
    """An open_clip model name: a built-in architecture, ``hf-hub:org/repo`` or ``local-dir:path``."""
    checkpoint: str | None = None
    """Name or folder of an SAE checkpoint; None means: the one of the data set under evaluation."""
    given: dict[str, Scalar] = field(default_factory=dict)
    """The options that the string gives."""

    @property
    def options(self) -> dict[str, Scalar | None]:
        """Every option of the method, defaults filled in."""
        return self.method.fill(self.given)

    def __str__(self) -> str:
        checkpoint = f"@{self.checkpoint}" if self.checkpoint else ""
        options = "".join(f"@{key}={_write(value)}" for key, value in self.given.items())
        return f"{self.method.name}:{self.backbone}{checkpoint}{options}"


def _write(value: Scalar) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def is_steered(name: str) -> bool:
    """Whether a model name is for this package rather than open_clip.

    >>> [is_steered(name) for name in ("ViT-B-32", "hf-hub:org/model", "vs2:ViT-B-32", "ViT-B-32@gamma=2")]
    [False, False, True, True]
    """
    # open_clip's own names hold neither ':' nor '@', except for its two schemas; a path of local-dir: may.
    return (":" in name or "@" in name) and not name.startswith(_SCHEMAS)


def parse(text: str, known: Registry | None = None) -> ModelString:
    """Read a model string.

    Raises:
        ModelStringError: naming the part that is wrong and what is accepted there.
        PluginError: two plugins claim the method.

    >>> parse("vs2:ViT-B-32@gamma=2").options["gamma"]
    2.0
    >>> parse("vs2:ViT-B-32@lam=-1")
    Traceback (most recent call last):
    vs2_plugin.errors.ModelStringError: model 'vs2:ViT-B-32@lam=-1': option lam='-1': expected a number from 0 to 1000
    """
    known = known or registry()

    def wrong(message: str) -> ModelStringError:
        return ModelStringError(f"model {text!r}: {message}")

    name, colon, rest = text.partition(":")
    if not colon or "@" in name:
        raise wrong(f"no steering method before a ':'; expected {GRAMMAR}, for example vs2:{text}")
    if not name:
        raise wrong(f"nothing before the ':'; expected {GRAMMAR} with a method of: {', '.join(sorted(known.names))}")
    try:
        method = known.method(name)
    except ModelStringError as error:
        raise wrong(f"{error}{_did_you_mean(name, known.names)}") from None

    backbone, *segments = rest.split("@")
    if not backbone:
        raise wrong(f"no backbone after {name + ':'!r}; expected an open_clip model name, for example {name}:ViT-B-32")
    if not _BACKBONE.match(backbone):
        raise wrong(
            f"backbone {backbone!r} is not an open_clip model name; expected letters, digits, '-' and '_' (ViT-B-32), "
            "hf-hub:org/repo or local-dir:path"
        )

    checkpoint: str | None = None
    given: dict[str, Scalar] = {}
    for position, segment in enumerate(segments):
        key, equals, value = segment.partition("=")
        if not segment:
            raise wrong(f"nothing after the '@' number {position + 1}; expected a checkpoint name or key=value")
        if not equals:
            if position > 0:
                raise wrong(
                    f"{segment!r} is no key=value, and a checkpoint name stands first, right after the backbone"
                )
            if not _CHECKPOINT.match(segment) or segment != segment.strip():
                raise wrong(f"checkpoint {segment!r}: expected letters, digits and any of . _ - + /")
            checkpoint = segment
            continue
        option = method.option(key)
        if option is None:
            names = [o.name for o in method.all_options]
            options = f"Options: {', '.join(names)}" if names else f"{method.name} has no options"
            hint = _did_you_mean(key, names)
            raise wrong(f"unknown option {key!r} of {method.name}{hint or '.'} {options}")
        if key in given:
            raise wrong(f"option {key!r} is given twice")
        try:
            given[key] = option.parse(value)
        except ValueError as error:
            raise wrong(f"option {key}={value!r}: expected {error}") from None
    for key in given:
        for other in method.option(key).excludes:
            if other in given:
                raise wrong(f"options {key!r} and {other!r} exclude each other; give one of them")
    filled = method.fill(given)
    for option in method.automatic(filled):
        if option.auto_needs is not None and filled[option.auto_needs[0]] is None:
            needed, reason = option.auto_needs
            accepted = method.option(needed).accepted()
            raise wrong(f"option {option.name}=auto: expected @{needed}= beside it ({accepted}), since {reason}")
    for option in AUTOMATIC:
        mine = method.option(option.name) is option  # not one of that name that a plugin declares
        if mine and option.name in given and not method.automatic(filled):
            names = " or ".join(f"@{one.name}=auto" for one in method.options if one.auto)
            raise wrong(f"option {option.name} is for auto; expected {names} beside it")
    return ModelString(method, backbone, checkpoint, given)


def _did_you_mean(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word.lower(), known, n=1)
    return f", did you mean {close[0]!r}?" if close else ""
