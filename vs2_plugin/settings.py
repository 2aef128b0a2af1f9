"""A setting, declared once: its type, range, choices and help text.

The options of a model string are settings (:class:`vs2_plugin.method.Option`), and so are the fields of a dataclass
that are made by :func:`setting`. From the declaration come the checks, the flags of a command and their help, the
values of a YAML file, and the command line that gives an object. No heavy imports.
"""

from __future__ import annotations

import math
import operator
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from types import NoneType
from typing import Any, NamedTuple, TypeVar, cast, get_args, get_type_hints

from vs2_plugin.errors import PluginError, SettingError

__all__ = [
    "Flag",
    "Scalar",
    "Setting",
    "flags_of",
    "is_count",
    "like",
    "read",
    "setting",
    "settings_of",
    "validate",
    "whole",
    "words_of",
]

Scalar = float | int | str | bool
_NAME = re.compile(r"[a-z][a-z0-9_]*\Z")
_TYPES: dict[type, str] = {float: "number", int: "whole number", str: "word", bool: "true or false"}
F = TypeVar("F", bound=Callable[..., Any])
_KEY = "setting"  # key in the metadata of a field
#: Whole numbers must lie below this, since torch and files hold them in 64 bits.
_TOO_LARGE = 2**63


@dataclass(frozen=True)
class Setting:
    """One value that can be set.

    >>> Setting("lr", float, 3e-3, minimum=0).parse("2")
    2.0
    >>> Setting("rule", str, "majority", choices=("majority", "query")).describe()
    'majority or query (default majority)'
    """

    name: str
    """Lower-case letters, digits and ``_``."""
    type: type = float
    """``float``, ``int``, ``str`` or ``bool``."""
    default: Any = None
    """The value when it is not given; None means: not set."""
    minimum: float | None = None
    """Smallest accepted number."""
    maximum: float | None = None
    """Largest accepted number."""
    choices: tuple[Scalar, ...] | None = None
    """The accepted values, where they can be listed."""
    pattern: tuple[str, str] | None = None
    """For a word: a regular expression that it must match, and its description in words."""
    help: str = ""
    """One line for people."""
    several: bool = False
    """Whether it takes several values, as a tuple. All of the above but the default then applies to each value."""

    def __post_init__(self) -> None:
        what = type(self).__name__.lower()
        if not _NAME.match(self.name):
            raise PluginError(f"{what} name {self.name!r} is not lower-case letters, digits and '_'")
        if self.type not in list(_TYPES):
            raise PluginError(f"{what} {self.name!r} has type {self.type!r}; expected float, int, str or bool")
        if self.minimum is not None and self.maximum is not None and self.minimum > self.maximum:
            raise PluginError(f"{what} {self.name!r}: its minimum {self.minimum} is above its maximum {self.maximum}")
        if self.default not in (None, ()) and self.check(self.default) is not None:
            raise PluginError(f"{what} {self.name!r}: its default {self.default!r} is not {self.check(self.default)}")

    def parse(self, text: str) -> Scalar:
        """Return the value that ``text`` stands for. Raises ValueError with what was expected."""
        value: Scalar
        try:
            if self.type is bool:
                value = {"true": True, "1": True, "false": False, "0": False}[text.lower()]
            else:
                value = self.type(text)
        except (ValueError, KeyError):
            raise ValueError(self.accepted()) from None
        expected = self.check(value)
        if expected is not None or (self.type is not str and "_" in text) or text != text.strip():
            raise ValueError(expected or self.accepted())
        return value

    def read(self, value: Any) -> Any:
        """Return the setting's value for ``value``, which comes from a YAML file or from Python.

        For a setting of several values, a single one or a list becomes a tuple. A whole number or a path is accepted
        for a word. Raises ValueError with what was expected.
        """
        if self.several:
            value = tuple(map(self.plain, value if isinstance(value, (list, tuple)) else [value]))
        else:
            value = self.plain(value)
        expected = self.check(value)
        if expected is not None:
            raise ValueError(expected)
        return value

    def plain(self, value: Any) -> Any:
        """Return ``value``, of NumPy's types as Python's; if the setting is a word, a whole number or a path becomes
        text."""
        value = _of_python(value)
        if self.type is str and isinstance(value, (int, os.PathLike)) and not isinstance(value, bool):
            return str(value)
        return value

    def check(self, value: Any) -> str | None:
        """Return what was expected, if ``value`` is not acceptable; else None."""
        values = value if self.several and isinstance(value, tuple) else (value,)
        if any(isinstance(item, int) and abs(item) >= _TOO_LARGE for item in values):
            return self.accepted() + (" (and below 2**63)" if self.maximum is None else "")
        return None if values and all(map(self._accepts, values)) else self.accepted()

    def _accepts(self, value: Any) -> bool:
        kinds = (int, float) if self.type is float else self.type
        if not isinstance(value, kinds) or isinstance(value, bool) is not (self.type is bool):
            return False
        if self.choices is not None and value not in self.choices:
            return False
        if self.pattern is not None and re.fullmatch(self.pattern[0], str(value)) is None:
            return False
        if not isinstance(value, (float, int)) or self.type is bool:
            return True
        at_least = self.minimum is None or value >= self.minimum
        at_most = self.maximum is None or value <= self.maximum
        return at_least and at_most and (isinstance(value, int) or math.isfinite(value))

    def accepted(self) -> str:
        """Return the accepted values in words."""
        if self.choices is not None:
            return " or ".join(str(choice) for choice in self.choices)
        if self.pattern is not None:
            return self.pattern[1]
        words = f"a {_TYPES[self.type]}" if self.type is not bool else _TYPES[bool]
        if self.minimum is not None and self.maximum is not None:
            return f"{words} from {_in_digits(self.minimum)} to {_in_digits(self.maximum)}"
        if self.minimum is not None:
            return f"{words}, at least {_in_digits(self.minimum)}"
        if self.maximum is not None:
            return f"{words}, at most {_in_digits(self.maximum)}"
        return words

    def describe(self) -> str:
        """Return the accepted values and the default in words."""
        default = "not set" if self.default is None else f"default {self.default}"
        return f"{self.accepted()} ({default})"


def _in_digits(value: float) -> str:
    """Return a number, a large one without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 1_000_000 else f"{value:g}"


def whole(text: object) -> int | None:
    """Return the number that up to nine decimal digits stand for; None for any other text.

    >>> whole("11"), whole("-1"), whole("1" * 5000)
    (11, None, None)
    """
    return int(str(text)) if re.fullmatch("[0-9]{1,9}", str(text)) else None


def is_count(value: Any) -> bool:
    """Tell whether a value is a whole number, at least 1, of any library.

    >>> [is_count(value) for value in (1, 0, 1.5, "2", None)]
    [True, False, False, False, False]
    """
    try:
        return operator.index(value) >= 1
    except TypeError:
        return False


class Flag(NamedTuple):
    """A flag of a command, which sets one setting."""

    setting: Setting
    value: bool | None = None
    """The value that the flag sets; None: the words that follow the flag."""


def setting(default: Any = MISSING, /, **declaration: Any) -> Any:
    """Declare a field of a dataclass as a setting.

    The name and the type are those of the field, which may be ``T``, ``T | None`` or ``tuple[T, ...]`` (several
    values). ``declaration`` holds the other attributes of :class:`Setting`; a ``default`` among them is shown in
    place of the field's.
    """
    return field(default=default, metadata={_KEY: declaration})


def like(owner: type[Any], name: str, **changes: Any) -> Any:
    """Declare a field as ``owner`` declares its field ``name``; its default, None, means the value there."""
    other = next(member for member in fields(owner) if member.name == name)
    return setting(None, **{"default": other.default, **other.metadata[_KEY], **changes})


def _kept(function: F) -> F:
    """Cache a function of a class; mypy does not accept a class as hashable, as :func:`cache` requires."""
    cached: Any = cache(function)
    return cast(F, cached)


@_kept
def settings_of(owner: type[Any]) -> Mapping[str, Setting]:
    """Return the settings that a dataclass declares, by the names of their fields."""
    hints = get_type_hints(owner)
    settings = {}
    for member in fields(owner):
        if _KEY in member.metadata:
            kinds = [kind for kind in get_args(hints[member.name]) or [hints[member.name]] if kind is not NoneType]
            several = [kind for kind in kinds if get_args(kind)]  # tuple[T, ...] | None
            kinds = list(get_args(several[0])) if several else kinds
            default = None if member.default is MISSING else member.default
            declaration = {"default": default, "several": Ellipsis in kinds, **member.metadata[_KEY]}
            settings[member.name] = Setting(member.name, kinds[0], **declaration)
    return settings


def validate(owner: Any) -> None:
    """Pass each setting of a frozen dataclass's object that differs from its default through :meth:`Setting.read`.
    Numbers of NumPy become Python's.

    Raises:
        SettingError: a value that is not accepted.
    """
    for name, declared in settings_of(type(owner)).items():
        value, default = _of_python(getattr(owner, name)), _defaults(type(owner))[name]
        object.__setattr__(owner, name, default if value == default else _read(name, declared, value))


@_kept
def flags_of(owner: type[Any]) -> Mapping[str, Flag]:
    """Return the flags that set a dataclass's settings, by their names without dashes.

    A setting that is true or false has a flag that changes its default, ``NAME`` or ``no_NAME``, or both if the
    default is None.
    """
    flags = {}
    for name, declared in settings_of(owner).items():
        if declared.type is not bool:
            flags[name] = Flag(declared)
            continue
        for value, flag in ((True, name), (False, f"no_{name}")):
            if _defaults(owner)[name] is not value:
                flags[flag] = Flag(declared, value)
    return flags


def read(owner: type[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of ``owner`` for flags as given by a YAML file: ``{"k": 32, "no_amp": True}``.

    Flags that are null or false are ignored.

    Raises:
        SettingError: an unknown flag, or a value that is not accepted.
    """
    flags, values = flags_of(owner), {}
    for name, value in given.items():
        if name not in flags:
            raise SettingError(f"unknown key {name!r}; expected {', '.join(flags)}")
        declared, sets = flags[name]
        if sets is not None and not isinstance(value, bool | None):
            raise SettingError(f"{name} is {value!r}; expected true or false")
        if value is not None and (sets is None or value):
            values[declared.name] = _read(name, declared, value) if sets is None else sets
    return values


def words_of(owner: Any) -> list[str]:
    """Return the flags and values, as typed in a command, of the settings that differ from their defaults."""
    words = []
    for name, (declared, sets) in flags_of(type(owner)).items():
        value = getattr(owner, declared.name)
        if value == _defaults(type(owner))[declared.name]:
            continue
        if sets is None:
            words += [f"--{name}", *map(str, value if declared.several else [value])]
        elif value is sets:
            words.append(f"--{name}")
    return words


def _read(name: str, declared: Setting, value: Any) -> Any:
    try:
        return declared.read(value)
    except ValueError as error:
        values = value if declared.several and isinstance(value, (list, tuple)) else [value]
        wrong = next((item for item in values if declared.check(declared.plain(item)) is not None), value)
        raise SettingError(f"{name} is {wrong!r:.80}; expected {error}") from None


def _of_python(value: Any) -> Any:
    """Return a number or an array of NumPy or torch as Python's number or list; any other value as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _defaults(owner: type[Any]) -> dict[str, Any]:
    """Return the defaults of a dataclass's fields; MISSING where a field has to be given."""
    return {member.name: member.default for member in fields(owner)}
