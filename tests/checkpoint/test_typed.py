"""Every type that a manifest is made of, with values of all kinds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vs2_plugin.checkpoint.typed import typed


@dataclass(frozen=True)
class Inner:
    name: str
    width: int = 3


@dataclass(frozen=True)
class Outer:
    inners: tuple[Inner, ...]
    any: dict[str, Any] = field(default_factory=dict)


GOOD = [
    (int, 3), (float, 3), (float, 0.5), (str, ""), (bool, False), (int | None, None), (str | int, "x"),
    (list[int], []), (list[float], [1, 0.5]), (dict[str, int], {"a": 1}), (dict[str, list[bool]], {"a": [True]}),
    (dict[str, Any], {"a": [{}]}), (Any, object),
]  # fmt: skip
BAD = [
    (int, True, "x is True; expected int"), (int, 3.0, "x is 3.0; expected int"), (float, True, "expected float"),
    (bool, 1, "x is 1; expected bool"), (str, None, "x is None; expected str"), (str, b"", "expected str"),
    (int | None, "3", "x is '3'; expected int or None"), (list[int], (1,), "expected list"),
    (list[int], [1, "a"], r"x\[1\] is 'a'; expected int"), (dict[str, int], {"a": None}, r"x\['a'\] is None"),
    (dict[str, int], [], r"x is \[\]; expected dict"), (Inner, [], r"x is \[\]; expected an object"),
    (Inner, {}, "x.name is missing"), (Inner, {"name": "a", "width": "b"}, "x.width is 'b'; expected int"),
    (Outer, {"inners": [{"name": "a"}, {"name": 2}]}, r"x.inners\[1\].name is 2; expected str"),
    (str, list(range(100)), r"x is \[0, 1, 2, 3, 4, 5, \.\.\.\]; expected str"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "value"), GOOD, ids=str)
def test_a_value_of_the_type_is_taken(kind, value):
    found = typed(kind, value)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(("kind", "value", "message"), BAD, ids=str)
def test_another_value_is_refused_with_its_place(kind, value, message):
    with pytest.raises(ValueError, match=message):
        typed(kind, value, "x")


def test_a_dataclass_is_made_with_its_defaults_and_without_strangers():
    assert typed(Outer, {"inners": [{"name": "a"}], "stranger": 1}) == Outer((Inner("a"),))
    assert typed(Inner, {"name": "a", "width": 5}) == Inner("a", 5)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))  # fmt: skip
def test_whatever_is_read_is_of_the_type_or_a_value_error(value):
    for kind in (Outer, Inner, list[int], dict[str, float], int | None):
        try:
            typed(kind, value)
        except ValueError as error:
            assert "\n" not in str(error)
