"""Model strings: ``method:backbone[@checkpoint][@key=value]…``.

    vs2:ViT-B-32
    vs2:ViT-B-32@gamma=2@lam=1.5
    vs2:ViT-L-14@my-checkpoint@alpha=0.8
    vs2:ViT-B-32@hf:owner/name
    vs2:hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K
    vs2:hf:openai/clip-vit-base-patch32
    tda:ViT-B-32
    tda:vs2:ViT-B-32@alpha=0.8

The last one is a method on logits that reads the embeddings of images that another method has steered. Model strings
are interpreted in this module only, after :mod:`vs2_plugin.names` has split them. No heavy imports.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from vs2_plugin.errors import ModelStringError
from vs2_plugin.files import file_digest
from vs2_plugin.method import AUTOMATIC, LABELS_USED, Method, Option, Scalar, widest
from vs2_plugin.names import Parts, is_steered, repository, split
from vs2_plugin.plugins import Registry, registry

__all__ = ["GRAMMAR", "ModelString", "Reading", "is_steered", "parse", "split"]

GRAMMAR = "method:backbone[@checkpoint][@key=value]..."
_BACKBONE = re.compile(r"(hf-hub:[\w.\-]+/[\w.\-]+|(?:local-dir|hf):[^@]+|[A-Za-z0-9][\w.\-/]*)\Z", re.ASCII)
_CHECKPOINT = re.compile(r"[\w.\-+/~ ]+\Z", re.ASCII)


@dataclass(frozen=True)
class Reading:
    """A method on logits in a model string, and the options that the string gives it."""

    method: Method
    given: dict[str, Scalar] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Scalar | None]:
        """Every option of the method, defaults filled in."""
        return self.method.fill(self.given)

    @property
    def protocol(self) -> str:
        """The method's protocol with these options."""
        return self.method.protocol_of(self.options)


@dataclass(frozen=True)
class ModelString:
    """The parts of a model string, read and checked."""

    method: Method
    """The method that steers, or the method on logits if none steers."""
    backbone: str
    """An open_clip model name (a built-in architecture, ``hf-hub:org/repo`` or ``local-dir:path``), or a model of
    transformers (``hf:org/repo[#revision]`` or ``hf:path``)."""
    checkpoint: str | None = None
    """Name or folder of an SAE checkpoint, or ``hf:owner/name[#revision]``; None means: that of the data set under
    evaluation."""
    given: dict[str, Scalar] = field(default_factory=dict)
    """The options that the string gives :attr:`method`."""
    outer: Reading | None = None
    """The method on logits that stands before a method that steers."""

    @property
    def options(self) -> dict[str, Scalar | None]:
        """Every option of the method, defaults filled in."""
        return self.method.fill(self.given)

    @property
    def reading(self) -> Reading | None:
        """The method on logits, alone or before another; None if there is none."""
        return Reading(self.method, self.given) if self.method.site == "logits" else self.outer

    @property
    def name(self) -> str:
        """The method's name, after that of an outer method on logits: ``tda:vs2``."""
        return self.method.name if self.outer is None else f"{self.outer.method.name}:{self.method.name}"

    @property
    def all_options(self) -> dict[str, Scalar | None]:
        """The options of both methods; an outer one whose name both have is prefixed with its method: ``tda_NAME``."""
        outer = {} if self.outer is None else self.outer.options
        mine = self.options
        return mine | {f"{self.name.partition(':')[0]}_{key}" if key in mine else key: outer[key] for key in outer}

    @property
    def needs_checkpoint(self) -> bool:
        """Whether one of the methods needs a checkpoint."""
        return any(method.asks_checkpoint(options) for method, options in self.methods)

    @property
    def needs_classes(self) -> bool:
        """Whether one of the methods needs the class embeddings."""
        return any(method.needs_classes(options) for method, options in self.methods)

    @property
    def labels_used(self) -> str:
        """The labels that the methods use: ``none``, ``train`` or ``oracle``."""
        return max((method.labels_used(options) for method, options in self.methods), key=LABELS_USED.index)

    @property
    def protocol(self) -> str:
        """The protocol of the method that sees most beside the image at hand."""
        return widest(method.protocol_of(options) for method, options in self.methods)

    @property
    def methods(self) -> list[tuple[Method, dict[str, Scalar | None]]]:
        """The methods with their options: :attr:`method`, then :attr:`outer` if there is one."""
        outer = [] if self.outer is None else [(self.outer.method, self.outer.options)]
        return [(self.method, self.options), *outer]

    @property
    def option_files(self) -> str | None:
        """The options that name files, each with the first 16 digits of its file's SHA-256, joined by ``+``; None
        without such options. A file that cannot be read is left out: whoever needs its content raises the error."""
        digests = []
        for method, options in self.methods:
            paths = {option.name: options[option.name] for option in method.all_options if option.file}
            for name, path in paths.items():
                if path is not None:
                    with suppress(OSError):
                        digests.append(f"{name}:{file_digest(Path(os.path.expanduser(str(path))))[:16]}")
        return "+".join(digests) or None

    def __str__(self) -> str:
        values = self.given | ({} if self.outer is None else self.outer.given)
        options = (f"{key}={_write(value)}" for key, value in values.items())
        checkpoint = () if self.checkpoint is None else (self.checkpoint,)
        return str(Parts(self.name, self.backbone, (*checkpoint, *options)))


def _write(value: Scalar) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def parse(text: str, known: Registry | None = None) -> ModelString:
    """Read a model string.

    Raises:
        ModelStringError: a part is wrong; the message names it and says what is accepted there.
        PluginError: two plugins claim the method.

    >>> parse("vs2:ViT-B-32@gamma=2").options["gamma"]
    2.0
    >>> parse("vs2:ViT-B-32@lam=-1")
    Traceback (most recent call last):
    vs2_plugin.errors.ModelStringError: model 'vs2:ViT-B-32@lam=-1': option lam='-1': expected a number from 0 to 1000
    """
    if not isinstance(text, str):
        raise ModelStringError(f"model {text!r:.80}: expected a text, {GRAMMAR}, for example vs2:ViT-B-32")
    parts = split(text)
    try:
        if parts.method is None:
            example = text if _BACKBONE.match(parts.backbone) and text.isprintable() else "ViT-B-32"
            raise ModelStringError(f"no steering method before a ':'; expected {GRAMMAR}, for example vs2:{example}")
        outer, method = _methods(parts.method, known or registry())
        _check_backbone(parts)
        of_method, of_outer = _options(method, outer, parts)
        _check_combination(method, of_method)
        if outer is not None:
            _check_combination(outer, of_outer)
    except ModelStringError as error:
        raise ModelStringError(f"model {text!r:.500}: {error}") from None
    reading = None if outer is None else Reading(outer, of_outer)
    return ModelString(method, parts.backbone, parts.checkpoint, of_method, reading)


def _methods(names: str, known: Registry) -> tuple[Method | None, Method]:
    """Return the methods of ``outer:method``; the outer one, on logits, is None if only one method is named."""
    first, *others = (_method(name, known) for name in names.split(":"))
    if not others:
        return None, first
    if len(others) > 1 or first.site != "logits" or others[0].site == "logits":
        on_logits = ", ".join(sorted(name for name, method in known.methods.items() if method.site == "logits"))
        raise ModelStringError(
            f"{names!r} before the backbone; expected one method, or one on logits ({on_logits or 'none is installed'})"
            " before one that steers"
        )
    return first, others[0]


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
            f"no backbone after '{parts.method}:'; expected the name of a model, for example "
            f"{parts.method}:ViT-B-32"
        )
    if not _BACKBONE.match(parts.backbone):
        raise ModelStringError(
            f"backbone {parts.backbone!r} is not the name of a model; expected letters, digits, '-' and '_' "
            "(ViT-B-32), hf-hub:org/repo or local-dir:path of open_clip, or hf:org/repo or hf:path of transformers"
        )


def _options(method: Method, outer: Method | None, parts: Parts) -> tuple[dict[str, Scalar], dict[str, Scalar]]:
    """Return the options of both methods, read from the words after the backbone; a checkpoint is only checked."""
    of_method: dict[str, Scalar] = {}
    of_outer: dict[str, Scalar] = {}
    for number, word in enumerate(parts.words, 1):
        key, equals, value = word.partition("=")
        if not word:
            raise ModelStringError(f"nothing after the '@' number {number}; expected a checkpoint name or key=value")
        if equals and key in of_method | of_outer:
            raise ModelStringError(f"option {key!r} is given twice")
        if equals:
            owner = _owner(method, outer, key)
            (of_method if owner is method else of_outer)[key] = _value(owner, key, value)
        elif number > 1:
            raise ModelStringError(
                f"{word!r} is not key=value, and a checkpoint name comes first, right after the backbone"
            )
        elif repository(word) is None and (not _CHECKPOINT.match(word) or word != word.strip()):
            raise ModelStringError(
                f"checkpoint {word!r}: expected letters, digits and any of . _ - + /, or hf:owner/name[#revision]"
            )
    return of_method, of_outer


def _owner(method: Method, outer: Method | None, key: str) -> Method:
    """Return the method that an option belongs to: the outer one if it has the option, else the inner one."""
    if outer is None or outer.option(key) is None:
        return method
    if method.option(key) is not None:
        raise ModelStringError(f"option {key!r}: both {outer.name} and {method.name} have one; leave it at its default")
    return outer


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
    """Refuse ``auto`` without what it needs, and options that serve ``auto`` where no option is ``auto``."""
    filled = method.fill(given)
    automatic = method.automatic(filled)
    for option in automatic:
        _check_beside(option, method, filled)
    for option in AUTOMATIC:
        is_common = method.option(option.name) is option  # not a plugin's option of the same name
        if is_common and option.name in given and not automatic:
            names = " or ".join(f"@{other.name}=auto" for other in method.options if other.auto)
            raise ModelStringError(f"option {option.name} is for auto; expected {names} beside it")


def _check_beside(automatic: Option, method: Method, filled: Mapping[str, Scalar | None]) -> None:
    """Refuse an option that is ``auto`` without the one that it needs, or beside a number with which the method would
    steer in any case."""
    if automatic.auto_needs is None:
        return
    needed, reason = automatic.auto_needs
    name, _, word = needed.partition("=")
    other, value = method.option(name), filled[name]
    assert other is not None  # checked when the method was declared
    if not word and value is None:
        raise ModelStringError(
            f"option {automatic.name}=auto: expected @{name}= beside it ({other.accepted()}), since {reason}"
        )
    if word and value not in (word, *(other.auto or ())[:1]):  # the first leaves images as they are
        number = f"{value:g}" if isinstance(value, float) else value
        raise ModelStringError(
            f"with {name}={number}, method {method.name!r} steers whatever {automatic.name} is, and {reason}; expected "
            f"{word} for {name} too, or numbers for all"
        )


def _did_you_mean(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word.lower(), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
