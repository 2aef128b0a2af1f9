"""Shows, where ``help()`` is asked, what stands below each field of a dataclass. Imports nothing of the package."""

from __future__ import annotations

from typing import Any, TypeVar

__all__ = ["documented"]

C = TypeVar("C", bound=type)


def documented(owner: C) -> C:
    """Give a dataclass the texts of its fields as a part of its docstring.

    They are read from its source when somebody asks, and not before.
    """
    owner.__doc__ = _Doc(owner.__doc__ or "")  # type: ignore[assignment]  # type() asks it, as any descriptor
    return owner


class _Doc:
    """The docstring of a class, with its fields."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __get__(self, instance: object, owner: type[Any]) -> str:
        import inspect

        told = _fields(owner)
        return inspect.cleandoc(self._text) + ("\n\nFields:\n" + "\n".join(told) if told else "")


def _fields(owner: type[Any]) -> list[str]:
    """Return a line for each field and those of its text, the inherited ones first; none without the source."""
    import ast
    import inspect
    from dataclasses import fields
    from textwrap import dedent, indent, wrap

    texts: dict[str, tuple[str, str]] = {}
    for one in reversed(owner.__mro__[:-1]):
        try:
            [tree] = ast.parse(dedent(inspect.getsource(one))).body
        except (OSError, TypeError, SyntaxError, ValueError):
            continue
        body = getattr(tree, "body", [])
        for node, following in zip(body, [*body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                said = following.value if isinstance(following, ast.Expr) else None
                text = said.value if isinstance(said, ast.Constant) and isinstance(said.value, str) else ""
                texts[node.target.id] = ast.unparse(node.annotation), inspect.cleandoc(text)
    lines = []
    for field in fields(owner):
        kind, text = texts.get(field.name, ("", ""))
        if field.init:
            words = f"{field.metadata.get('setting', {}).get('help', '')} {text}"
            lines += [f"    {field.name}: {kind}", *(indent(line, "        ") for line in wrap(words.strip(), 100))]
    return lines
