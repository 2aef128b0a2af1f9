"""Faults of plugins, in words: the exception, and the file and line of the plugin that raised it."""

from __future__ import annotations

import os
import sys
import traceback

import pluggy

from vs2_plugin.text import reason_of

__all__ = ["fault_of"]

_PACKAGE = os.path.dirname(os.path.abspath(__file__))


def fault_of(error: BaseException) -> str:
    """Return the type and message of a plugin's exception, with the place in the plugin's files, if it was raised by
    one of them or by what it called."""
    return reason_of(error) + _where(error)


def _where(error: BaseException) -> str:
    """Return, in words, the file and line of a plugin that raised an exception; empty if no plugin's file did."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" (in {error.filename}, line {error.lineno})"
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    own = [frame for frame in frames if not _is_machinery(frame[0])]
    # The innermost frame in the plugin's own files, which lie beside the first one, not in a library that it calls.
    lines = [f" (in {file}, line {line})" for file, line in own if _beside(file, own[0][0])]
    return lines[-1] if lines else ""


def _is_machinery(file: str) -> bool:
    """Return whether a file belongs to the code that loads and calls plugins."""
    modules = [pluggy, *filter(None, [sys.modules.get("torch")])]  # torch calls the forward pass of a module
    libraries = [os.path.dirname(str(module.__file__)) for module in modules]
    ours = (_PACKAGE, os.path.join(os.path.dirname(os.__file__), "importlib"), *libraries)
    return file.startswith(("<frozen ", *(os.path.join(folder, "") for folder in ours)))


def _beside(file: str, first: str) -> bool:
    """Return whether a file is ``first``, or lies in the package of ``first``."""
    package = os.path.dirname(first)
    return file == first or (os.path.isfile(os.path.join(package, "__init__.py")) and file.startswith(package + os.sep))
