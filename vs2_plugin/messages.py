"""Lines that this package's commands and the patched ``clip_benchmark`` print, made safe for terminals."""

from __future__ import annotations

import logging
import sys

from vs2_plugin.text import printable

__all__ = ["complain", "say", "show"]


def say(line: str) -> None:
    """Print one line on stdout; characters that the terminal cannot show or must not interpret are replaced."""
    if sys.stdout is None:  # it was closed before the command began
        return
    encoding = sys.stdout.encoding or "ascii"
    print(printable(line).encode(encoding, "replace").decode(encoding), flush=True)


def complain(line: str) -> None:
    """Print one line on stderr, with runs of white space reduced to single spaces."""
    if sys.stderr is not None:
        print(printable(" ".join(line.split())), file=sys.stderr)


class _Handler(logging.Handler):
    """Writes ``vs2: message``, or ``vs2: warning: message``, to the current ``sys.stderr``."""

    def emit(self, record: logging.LogRecord) -> None:
        mark = "warning: " if record.levelno >= logging.WARNING else ""
        complain(f"vs2: {mark}{record.getMessage()}")


_HANDLER = _Handler()


def show() -> None:
    """Show log messages on stderr from now on; without this call, they go where the caller's ``logging`` sends them."""
    logger = logging.getLogger("vs2_plugin")
    if _HANDLER not in logger.handlers:
        logger.addHandler(_HANDLER)
        logger.setLevel(logging.INFO)
    if not logging.root.handlers:  # open_clip's first message would add a handler that repeats ours
        logging.basicConfig()
        logging.root.handlers[0].addFilter(lambda record: not record.name.startswith("vs2_plugin"))
