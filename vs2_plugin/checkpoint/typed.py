"""Reads dataclasses from JSON values, with every type checked."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

__all__ = ["typed"]

#: The deepest nesting of lists and objects in a value of type Any; json and repr fail on a very deep one.
_DEEPEST = 30


def typed(kind: Any, value: Any, place: str = "") -> Any:
    """Convert a JSON value to type ``kind``: a dataclass, a list, tuple or dict of one type, a union, or a plain type.

    Keys without a field in a dataclass are ignored; a field with a default may be missing.

    Args:
        kind: the type, as an annotation names it. A float may be given as an int, and stays one.
        value: what ``json`` read.
        place: the path to the value, for the error.

    Raises:
        ValueError: a value is missing or of another type; the message names its place.

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
    """Convert a JSON value to the first type of a union that fits."""
    options = get_args(kind)
    if isinstance(value, dict):  # so that the error says what is wrong inside of the object
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
    """Return whether a value is of the plain type ``kind``, or ``kind`` is Any; a bool is no number."""
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
    present = [f.name for f in fields(kind) if f.name in values]
    return kind(**{name: typed(hints[name], values[name], prefix + name) for name in present})


def _words(kind: Any) -> str:
    """Return the name of a type, for the error."""
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(_words, get_args(kind)))
    if is_dataclass(kind):
        return "an object"
    if kind is type(None):
        return "None"
    if kind is Any:
        return "less within each other"
    return str(kind) if get_args(kind) else kind.__name__
