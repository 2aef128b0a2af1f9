"""Facts that a method reports of itself in the results, as ``vs2_NAME``; those that do not fit there are rejected."""

from __future__ import annotations

import re
import reprlib

from vs2_plugin.method import TOLD_OF_ALL, Scalar
from vs2_plugin.text import reason_of

__all__ = ["facts_of"]

_LONGEST = 10_000


def facts_of(steering: object) -> tuple[dict[str, Scalar], list[str]]:
    """Return the facts of a steering that fit into results, and a description of the problem for each other one.

    ``steering.facts`` may be a property, computed at each access, so a problem may appear only after the evaluation.
    """
    try:
        facts = dict(getattr(steering, "facts", {}))
    except Exception as error:
        return {}, [f"facts that cannot be read ({reason_of(error)}); expected a mapping of names to values"]
    problems = {name: problem for name, value in facts.items() if (problem := _problem(name, value))}
    return {name: value for name, value in facts.items() if name not in problems}, list(problems.values())


def _problem(name: object, value: object) -> str | None:
    """Return why a fact does not fit into results, in words; None if it fits."""
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]{0,99}", name):
        return f"a fact named {reprlib.repr(name)}; expected lower-case letters, digits and '_'"
    if name in TOLD_OF_ALL:
        return f"a fact named {name!r}, a name that is used for every method; expected another name"
    number = isinstance(value, (int, float)) and abs(value) < 2**63  # not NaN
    if not number and not (isinstance(value, str) and len(value) <= _LONGEST and value.isprintable()):
        return f"the fact {name!r} = {reprlib.repr(value)}; expected a finite number, a line of text, True or False"
    return None
