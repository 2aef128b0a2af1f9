"""Show this package's log messages on stderr, as its commands and the patched ``clip_benchmark`` do."""

from __future__ import annotations

import logging
import sys

__all__ = ["show"]


class _Handler(logging.Handler):
    """Writes ``vs2: message`` to what is stderr at that moment; warnings say that they are."""

    def emit(self, record: logging.LogRecord) -> None:
        mark = "warning: " if record.levelno >= logging.WARNING else ""
        print(f"vs2: {mark}{record.getMessage()}", file=sys.stderr)


_HANDLER = _Handler()


def show() -> None:
    """Show messages from now on. In Python, without this call, they go wherever the caller's ``logging`` sends them."""
    logger = logging.getLogger("vs2_plugin")
    if _HANDLER not in logger.handlers:
        logger.addHandler(_HANDLER)
        logger.setLevel(logging.INFO)
