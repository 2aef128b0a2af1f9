"""The grid of a sweep: model strings in which options have several values. No heavy imports.

vs2:ViT-B-32@gamma=1:3:0.1@lam=0:10:0.5      START:STOP:STEP, the stop included
vs2pp:ViT-B-32@n=10,25,50,100@rule=majority,query
vs2:ViT-B-32@sae-k32,sae-k64                 several checkpoints
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from itertools import product
from math import prod
from typing import Any

from vs2_plugin.errors import ModelStringError
from vs2_plugin.method import AUTO
from vs2_plugin.modelstring import ModelString, parse
from vs2_plugin.names import is_steered, split
from vs2_plugin.steering.builtin import STRENGTH, STRENGTHS, strength

__all__ = ["CHECKPOINT", "Grid", "Point", "as_number", "outcome_key", "read_grids"]

#: Name of the axis of a list of checkpoints.
CHECKPOINT = "checkpoint"
#: Largest number of points in a grid; more are taken for a typing error.
_LIMIT = 10_000


@dataclass(frozen=True)
class Point:
    """One model of a grid."""

    model: str
    """The model string."""
    spec: ModelString
    """The model string, parsed."""
    place: tuple[str, ...]
    """Value of the point on each axis of the grid."""


@dataclass(frozen=True)
class Grid:
    """All points that one model string of a sweep stands for."""

    text: str
    """The model string."""
    axes: dict[str, tuple[str, ...]]
    """Option, or :data:`CHECKPOINT`, with more than one value -> its values."""
    points: tuple[Point, ...]
    """The points for all combinations of values; the last axis varies fastest."""

    @property
    def backbone(self) -> str:
        """Name of the model that is steered."""
        return self.points[0].spec.backbone


def read_grids(texts: Sequence[str]) -> list[Grid]:
    """Read the model strings of a sweep.

    A point that an earlier string contains too, in whatever spelling, is replaced by the earlier point.

    Raises:
        ModelStringError: with the part that is wrong, and what is accepted there.

    >>> [grid] = read_grids(["vs2:ViT-B-32@lam=0:1:0.5@gate=0.9,0.99"])
    >>> len(grid.points), grid.points[1].model, grid.axes["lam"]
    (6, 'vs2:ViT-B-32@lam=0@gate=0.99', ('0', '0.5', '1'))
    """
    points: dict[Hashable, Point] = {}
    return [_read(text, points) for text in texts if is_steered(text)]


def _read(text: str, known: dict[Hashable, Point]) -> Grid:
    parts = split(text)
    choices = [_choices(text, word) for word in parts.words]
    count = prod(map(len, choices))
    if count > _LIMIT:
        raise ModelStringError(f"model {text!r}: {count} points; expected at most {_LIMIT}; take a larger step")
    axes = {
        word.partition("=")[0] if "=" in word else CHECKPOINT: tuple(values)
        for word, values in zip(parts.words, choices, strict=True)
        if len(values) > 1
    }
    points = []
    for values in product(*choices):
        model = str(parts._replace(words=tuple(map(_joined, parts.words, values))))
        spec = parse(model)
        place = tuple(value for value, many in zip(values, choices, strict=True) if len(many) > 1)
        identity = (spec.name, spec.backbone, spec.checkpoint, *_given(spec))
        same = known.setdefault(identity, Point(model, spec, place))
        points.append(Point(same.model, same.spec, place))
    return Grid(text, axes, tuple(points))


def _given(spec: ModelString) -> list[Hashable]:
    """Return the options that the model string gives, for each of its methods."""
    return [frozenset(method_spec.given.items()) for method_spec in (spec, spec.outer) if method_spec is not None]


def _joined(word: str, value: str) -> str:
    key, equals, _ = word.partition("=")
    return f"{key}={value}" if equals else value


def _choices(text: str, word: str) -> list[str]:
    """Return the values that a word after an ``@`` stands for."""
    key, equals, value = word.partition("=")
    name, value = (f"option {key}={value!r}", value) if equals else (f"checkpoint {word!r}", word)
    if equals and ":" in value:
        return _range(f"model {text!r}: {name}", value)
    values = value.split(",")
    if len(values) > 1 and not all(values):
        raise ModelStringError(f"model {text!r}: {name}: nothing beside a comma; expected a list such as a,b,c")
    if len(set(values)) < len(values):
        raise ModelStringError(f"model {text!r}: {name}: a value is given twice in the list")
    return values


def _range(where: str, text: str) -> list[str]:
    """Return the values of ``START:STOP:STEP`` as texts, in decimal arithmetic: 1:3:0.1 holds 1.1 and ends with 3."""
    try:
        start, stop, step = map(_decimal, text.split(":"))
    except (ValueError, InvalidOperation):
        raise ModelStringError(f"{where}: expected three numbers START:STOP:STEP, or a list such as a,b,c") from None
    if step <= 0 or stop < start:
        raise ModelStringError(f"{where}: expected START:STOP:STEP with a STOP of at least START and a STEP above 0")
    count = (stop - start) / step + 1
    if count > _LIMIT:
        many = f"{count:.0f}" if count < 1e12 else "too many"
        raise ModelStringError(f"{where}: {many} values; expected at most {_LIMIT}; take a larger step")
    return [_written(start + index * step) for index in range(int(count))]


def _decimal(text: str) -> Decimal:
    if not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d{1,3})?", text, re.ASCII):
        raise ValueError(text)
    return Decimal(text)


def _written(value: Decimal) -> str:
    return format(value.normalize(), "f") if value else "0"


def outcome_key(spec: ModelString) -> tuple[Any, ...]:
    """Return a key that is equal for model strings that give the same features.

    Of the options of :data:`STRENGTH` only α matters, rounded to float32, in which all steering is computed: the 441
    points of the paper's grid have 153 different keys.
    """
    from numpy import float32

    options: dict[str, Any] = dict(spec.options)
    if any(set(names) <= set(spec.method.options) for names in STRENGTHS):
        alpha: Any = strength(*(options.pop(option.name) for option in STRENGTH))
        options["alpha"] = alpha if alpha == AUTO else float(float32(alpha))
    outer = None if spec.outer is None else frozenset(spec.outer.options.items())
    return spec.name, spec.backbone, spec.checkpoint, frozenset(options.items()), outer


def as_number(text: str) -> float | None:
    """Return the number that a value of an axis stands for, or None.

    >>> as_number("0.5"), as_number("10+11")
    (0.5, None)
    """
    try:
        return float(text)
    except ValueError:
        return None
