"""Reads dataclasses from JSON values, with every type checked."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

__all__ = ["typed"]

#: Lists and objects within each other, in a value that may be anything: more than json and repr can take is damage.
_DEEPEST = 30


def typed(kind: Any, value: Any, place: str = "") -> Any:
    """Return a JSON value as a ``kind``: a dataclass of such kinds, a list, tuple or dict of one kind, a plain type.

    A key that a dataclass does not have is left out; a field with a default may be missing.

    Args:
        kind: the type, as an annotation names it. A float may be given as an int, and stays one.
        value: what ``json`` read.
        place: where it stands, for the error.

    Raises:
        ValueError: a value of another type, or a missing one, with its place.

    >>> typed(dict[str, float], {"a": 1, "b": 0.5}), typed(tuple[str, ...], ["x"])
    ({'a': 1, 'b': 0.5}, ('x',))
    >>> typed(list[int | None], [1, None, True], "counts")
    Traceback (most recent call last):
    ValueError: counts[2] is True; expected int or None
    """
    if is_dataclass(kind) and isinstance(value, dict):
        return _dataclass(kind, value, place)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _one_of(kind, value, place)
    if origin in (list, tuple) and isinstance(value, list):
        return origin(typed(arguments[0], item, f"{place}[{index}]") for index, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: typed(arguments[1], item, f"{place}[{reprlib.repr(key)}]") for key, item in value.items()}
    if origin is None and _is_plain(kind, value):
        return value
    raise _other(kind, value, place)


def _one_of(kind: Any, value: Any, place: str) -> Any:
    """Return a JSON value as one of several kinds, the first that it is."""
    options = get_args(kind)
    if isinstance(value, dict):  # the error of an object says what is wrong in there
        options = tuple(filter(is_dataclass, options)) or options
    if len(options) == 1:
        return typed(options[0], value, place)
    for option in options:
        with suppress(ValueError):
            return typed(option, value, place)
    raise _other(kind, value, place)


def _other(kind: Any, value: Any, place: str) -> ValueError:
    return ValueError(f"{place or 'the value'} is {reprlib.repr(value)}; expected {_words(kind)}")


def _is_plain(kind: Any, value: object) -> bool:
    """Tell whether a value is of a plain type, or may be anything. A bool is no number."""
    if kind is Any:
        return _is_shallow(value, _DEEPEST)
    accepted = (int, float) if kind is float else kind
    return not is_dataclass(kind) and isinstance(value, accepted) and isinstance(value, bool) is (kind is bool)


def _is_shallow(value: object, depth: int) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth > 0 and all(_is_shallow(item, depth - 1) for item in items)


def _dataclass(kind: Any, values: Mapping[str, Any], place: str) -> Any:
    hints, prefix = get_type_hints(kind), f"{place}." if place else ""
    lacking = [f.name for f in fields(kind) if f.name not in values and f.default is f.default_factory is MISSING]
    if lacking:
        raise ValueError(f"{prefix}{lacking[0]} is missing")
    given = [f.name for f in fields(kind) if f.name in values]
    return kind(**{name: typed(hints[name], values[name], prefix + name) for name in given})


def _words(kind: Any) -> str:
    """Return a type as the error names it."""
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(_words, get_args(kind)))
    if is_dataclass(kind):
        return "an object"
    if kind is type(None):
        return "None"
    if kind is Any:
        return "less within each other"
    return str(kind) if get_args(kind) else kind.__name__
