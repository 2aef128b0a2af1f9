"""Lines for people: what this package's commands and the patched ``clip_benchmark`` print, whatever names hold."""

from __future__ import annotations

import logging
import sys

from vs2_plugin.text import printable

__all__ = ["complain", "say", "show"]


def say(line: str) -> None:
    """Print one line on stdout, also where it holds what the terminal cannot write or must not be told."""
    if sys.stdout is None:  # it was closed before the command began
        return
    encoding = sys.stdout.encoding or "ascii"
    print(printable(line).encode(encoding, "replace").decode(encoding), flush=True)


def complain(line: str) -> None:
    """Print one line on stderr: spaces and line breaks become single spaces."""
    if sys.stderr is not None:
        print(printable(" ".join(line.split())), file=sys.stderr)


class _Handler(logging.Handler):
    """Writes ``vs2: message`` to what is stderr at that moment; warnings say that they are."""

    def emit(self, record: logging.LogRecord) -> None:
        mark = "warning: " if record.levelno >= logging.WARNING else ""
        complain(f"vs2: {mark}{record.getMessage()}")


_HANDLER = _Handler()


def show() -> None:
    """Show messages from now on. In Python, without this call, they go wherever the caller's ``logging`` sends them."""
    logger = logging.getLogger("vs2_plugin")
    if _HANDLER not in logger.handlers:
        logger.addHandler(_HANDLER)
        logger.setLevel(logging.INFO)
    if not logging.root.handlers:  # open_clip's first message would make one, which told ours once more
        logging.basicConfig()
        logging.root.handlers[0].addFilter(lambda record: not record.name.startswith("vs2_plugin"))
