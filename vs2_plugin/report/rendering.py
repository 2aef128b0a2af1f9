"""Renders and saves pages: templates, their filters, and writing that never replaces files of other programs."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from vs2_plugin import __version__
from vs2_plugin.errors import DataError
from vs2_plugin.files import atomic_file
from vs2_plugin.report.drawing import COLOURS
from vs2_plugin.text import counted, printable

__all__ = ["fixed", "render", "require_place", "save"]


def render(template: str, mark: str, context: Mapping[str, Any]) -> bytes:
    """Return the file that ``template`` (a name without ``.jinja``) renders from ``context``.

    Near its beginning stands ``mark``, the command that writes the file, where :func:`save` looks for it.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: name is not None and name.endswith(".html.jinja"),
        undefined=StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value,  # no Markup
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"fixed": fixed, "svg": Markup, "cell": _cell, "code": _code, "counted": counted}
    environment.globals |= {"mark": mark, "version": __version__, "colours": COLOURS}
    return environment.get_template(f"{template}.jinja").render(context).encode("utf-8", "replace")


def fixed(value: float | None, digits: int = 2, sign: bool = False, scale: float = 100) -> str:
    """Return ``scale * value`` with ``digits`` decimals, by default a share in percent; empty for None and NaN.

    >>> fixed(0.58863), fixed(-0.0011, sign=True), fixed(-1e-9, sign=True), fixed(None)
    ('58.86', '-0.11', '+0.00', '')
    """
    if value is None or math.isnan(value):
        return ""
    rounded = round(scale * value, digits) + 0.0  # no -0.00
    return f"{rounded:{'+' if sign else ''}.{digits}f}"


def _cell(text: object) -> str:
    """Return text escaped for Markdown, since a name may hold any characters."""
    flat = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", flat)


def _code(text: object) -> str:
    """Return text as a code span for a Markdown table."""
    return "`" + " ".join(str(text).replace("`", "'").split()).replace("|", "\\|") + "`"


def require_place(
    folder: Path, names: Collection[str], mark: str, *others: str, remedy: str = "another folder with --out"
) -> None:
    """Refuse a folder as :func:`save` would for files of these ``names``, but before there is anything to write.

    Raises:
        DataError: a file exists that does not bear ``mark``, or the folder cannot be written to.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.exists(place))  # may be to be made
    try:
        if not (os.path.isdir(there) and os.access(there, os.W_OK)):
            raise PermissionError(None, f"{there} is no folder that can be written")
        for path in (folder / name for name in names):
            if path.exists() and not any(own.encode() in path.read_bytes()[:2000] for own in (mark, *others)):
                raise DataError(f"{path} already exists, and {mark} did not write it; name {remedy}")
    except OSError as error:
        raise DataError(f"cannot write into {folder}: {error.strerror}; name {remedy}") from error


def save(
    folder: Path, files: Mapping[str, bytes], mark: str, *others: str, remedy: str = "another folder with --out"
) -> list[Path]:
    """Write ``files``, name -> content, and return their paths; write none if one exists that does not bear ``mark``.

    ``others`` are marks of files that cannot hold a command's name, such as the header of a CSV; ``remedy`` is the
    advice in the error message.

    Raises:
        DataError: such a file exists, or the folder cannot be written to.
    """
    require_place(folder, files.keys(), mark, *others, remedy=remedy)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            with atomic_file(folder / name) as scratch:
                scratch.write_bytes(content)
    except OSError as error:
        raise DataError(f"cannot write into {folder}: {error.strerror}; name {remedy}") from error
    return [folder / name for name in files]
