"""Model strings: ``method:backbone[@checkpoint][@key=value]…``.

    vs2:ViT-B-32
    vs2:ViT-B-32@gamma=2@lam=1.5
    vs2:ViT-L-14@my-checkpoint@alpha=0.8
    vs2:ViT-B-32@hf:owner/name
    vs2:hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K

Such a string is read here, after :mod:`vs2_plugin.names` has split it, and nowhere else. No heavy imports.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field

from vs2_plugin.errors import ModelStringError
from vs2_plugin.method import AUTOMATIC, Method, Scalar
from vs2_plugin.names import Parts, is_steered, repository, split
from vs2_plugin.plugins import Registry, registry

__all__ = ["GRAMMAR", "ModelString", "is_steered", "parse", "split"]

GRAMMAR = "method:backbone[@checkpoint][@key=value]..."
_BACKBONE = re.compile(r"(hf-hub:[\w.\-]+/[\w.\-]+|local-dir:[^@]+|[A-Za-z0-9][\w.\-/]*)\Z", re.ASCII)
_CHECKPOINT = re.compile(r"[\w.\-+/~ ]+\Z", re.ASCII)


@dataclass(frozen=True)
class ModelString:
    """A model string, read."""

    method: Method
    backbone: str
    """An open_clip model name: a built-in architecture, ``hf-hub:org/repo`` or ``local-dir:path``."""
    checkpoint: str | None = None
    """Name or folder of an SAE checkpoint, or ``hf:owner/name[#revision]``; None means: the one of the data set under
    evaluation."""
    given: dict[str, Scalar] = field(default_factory=dict)
    """The options that the string gives."""

    @property
    def options(self) -> dict[str, Scalar | None]:
        """Every option of the method, defaults filled in."""
        return self.method.fill(self.given)

    def __str__(self) -> str:
        options = (f"{key}={_write(value)}" for key, value in self.given.items())
        checkpoint = () if self.checkpoint is None else (self.checkpoint,)
        return str(Parts(self.method.name, self.backbone, (*checkpoint, *options)))


def _write(value: Scalar) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


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
    parts = split(text)
    try:
        if parts.method is None:
            raise ModelStringError(
                f"no steering method before a ':'; expected {GRAMMAR}, for example vs2:{text or 'ViT-B-32'}"
            )
        method = _method(parts.method, known or registry())
        _check_backbone(parts)
        given = _options(method, parts)
        _check_combination(method, given)
    except ModelStringError as error:
        raise ModelStringError(f"model {text!r:.500}: {error}") from None
    return ModelString(method, parts.backbone, parts.checkpoint, given)


def _method(name: str, known: Registry) -> Method:
    if not name:
        names = ", ".join(sorted(known.names))
        raise ModelStringError(f"nothing before the ':'; expected {GRAMMAR} with a method of: {names}")
    try:
        return known.method(name)
    except ModelStringError as error:
        raise ModelStringError(f"{error}{_did_you_mean(name, known.names)}") from None


def _check_backbone(parts: Parts) -> None:
    if not parts.backbone:
        raise ModelStringError(
            f"no backbone after '{parts.method}:'; expected an open_clip model name, for example "
            f"{parts.method}:ViT-B-32"
        )
    if not _BACKBONE.match(parts.backbone):
        raise ModelStringError(
            f"backbone {parts.backbone!r} is not an open_clip model name; expected letters, digits, '-' and '_' "
            "(ViT-B-32), hf-hub:org/repo or local-dir:path"
        )


def _options(method: Method, parts: Parts) -> dict[str, Scalar]:
    """Read the words after the backbone: the options, and the checkpoint, which is checked only."""
    given: dict[str, Scalar] = {}
    for number, word in enumerate(parts.words, 1):
        key, equals, value = word.partition("=")
        if not word:
            raise ModelStringError(f"nothing after the '@' number {number}; expected a checkpoint name or key=value")
        if equals and key in given:
            raise ModelStringError(f"option {key!r} is given twice")
        if equals:
            given[key] = _value(method, key, value)
        elif number > 1:
            raise ModelStringError(
                f"{word!r} is no key=value, and a checkpoint name stands first, right after the backbone"
            )
        elif repository(word) is None and (not _CHECKPOINT.match(word) or word != word.strip()):
            raise ModelStringError(
                f"checkpoint {word!r}: expected letters, digits and any of . _ - + /, or hf:owner/name[#revision]"
            )
    return given


def _value(method: Method, key: str, value: str) -> Scalar:
    option = method.option(key)
    if option is None:
        names = [option.name for option in method.all_options]
        options = f"Options: {', '.join(names)}" if names else f"{method.name} has no options"
        raise ModelStringError(
            f"unknown option {key!r} of {method.name}{_did_you_mean(key, names) or '.'} {options}"
        )
    try:
        return option.parse(value)
    except ValueError as error:
        raise ModelStringError(f"option {key}={value!r:.80}: expected {error}") from None


def _check_combination(method: Method, given: dict[str, Scalar]) -> None:
    """Refuse options that do not go together."""
    for option in method.all_options:
        for other in option.excludes:
            if option.name in given and other in given:
                raise ModelStringError(f"options {option.name!r} and {other!r} exclude each other; give one of them")
    _check_automatic(method, given)


def _check_automatic(method: Method, given: dict[str, Scalar]) -> None:
    """Refuse automatic options without what they need, and what is for them without one."""
    filled = method.fill(given)
    automatic = method.automatic(filled)
    for option in automatic:
        needed, reason = option.auto_needs or (None, "")
        if needed is not None and filled[needed] is None:
            accepted = next(other.accepted() for other in method.all_options if other.name == needed)
            raise ModelStringError(
                f"option {option.name}=auto: expected @{needed}= beside it ({accepted}), since {reason}"
            )
    for option in AUTOMATIC:
        is_common = method.option(option.name) is option  # not one of that name that a plugin declares
        if is_common and option.name in given and not automatic:
            names = " or ".join(f"@{other.name}=auto" for other in method.options if other.auto)
            raise ModelStringError(f"option {option.name} is for auto; expected {names} beside it")


def _did_you_mean(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word.lower(), known, n=1)
    return f", did you mean {close[0]!r}?" if close else ""
