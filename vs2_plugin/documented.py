"""Adds the texts below a dataclass's fields to what ``help()`` shows. Imports nothing of the package."""

from __future__ import annotations

from typing import Any, TypeVar

__all__ = ["documented"]

C = TypeVar("C", bound=type)


def documented(owner: C) -> C:
    """Add the texts of a dataclass's fields to its docstring.

    The texts are read from the class's source only when the docstring is read.
    """
    owner.__doc__ = _Doc(owner.__doc__ or "")  # type: ignore[assignment]  # a descriptor, whose __get__ type() calls
    return owner


class _Doc:
    """The docstring of a class with its fields, put together when it is read."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __get__(self, instance: object, owner: type[Any]) -> str:
        import inspect

        lines = _fields(owner)
        return inspect.cleandoc(self._text) + ("\n\nFields:\n" + "\n".join(lines) if lines else "")


def _fields(owner: type[Any]) -> list[str]:
    """Return name, type and text of each field, as lines; without the source, types and texts are missing."""
    import ast
    import inspect
    from dataclasses import fields
    from textwrap import dedent, indent, wrap

    texts: dict[str, tuple[str, str]] = {}
    for base in reversed(owner.__mro__[:-1]):
        try:
            [tree] = ast.parse(dedent(inspect.getsource(base))).body
        except (OSError, TypeError, SyntaxError, ValueError):
            continue
        body = getattr(tree, "body", [])
        for node, following in zip(body, [*body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                below = following.value if isinstance(following, ast.Expr) else None
                text = below.value if isinstance(below, ast.Constant) and isinstance(below.value, str) else ""
                texts[node.target.id] = ast.unparse(node.annotation), inspect.cleandoc(text)
    lines = []
    for field in fields(owner):
        kind, text = texts.get(field.name, ("", ""))
        if field.init:
            words = f"{field.metadata.get('setting', {}).get('help', '')} {text}"
            lines += [f"    {field.name}: {kind}", *(indent(line, "        ") for line in wrap(words.strip(), 100))]
    return lines
