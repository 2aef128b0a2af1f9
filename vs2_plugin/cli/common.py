"""What the commands share: how errors and interruptions end."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable

from vs2_plugin import messages
from vs2_plugin.errors import Vs2Error

__all__ = ["AGAIN", "end_well", "is_interruption", "load_torch"]

#: How to go on after an interruption of a command that writes all of its files at its end.
AGAIN = "; nothing is kept of it: run the same command again"


def end_well(program: str, action: Callable[[], int | None], interrupted: str = "") -> int:
    """Run ``action``, and show its messages. An error of this package becomes one line on stderr and exit code 2, Ctrl-C 130."""
    messages.show()
    try:
        return action() or 0
    except Vs2Error as error:
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, RuntimeError) as error:
        # Ctrl-C ends a data loader's workers too, of which the loader complains while the interruption is handled.
        if not is_interruption(error):
            raise
        print(f"\n{program}: interrupted{interrupted}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `vs2 methods | head`
        sys.stderr.close()
        return 0


def is_interruption(error: BaseException | None) -> bool:
    """Whether it is Ctrl-C, or was raised while that was handled."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def load_torch() -> None:
    """Import torch, which takes a second. Ctrl-C meanwhile is raised afterwards.

    Raised within the C++ that this import runs, it would abort the process.
    """
    pending = []
    # Where Ctrl-C is ignored (nohup) or somebody else's, it stays so; only the main thread may set a handler.
    mine = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    mine = mine and threading.current_thread() is threading.main_thread()
    if mine:
        signal.signal(signal.SIGINT, lambda *which: pending.append(which))
    try:
        import torch  # noqa: F401
    finally:
        if mine:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    if pending:
        raise KeyboardInterrupt
