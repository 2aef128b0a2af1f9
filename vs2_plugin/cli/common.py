"""What the commands share: how errors and interruptions end, and how numbers are written."""

from __future__ import annotations

import sys
from collections.abc import Callable

from vs2_plugin.errors import Vs2Error

__all__ = ["end_well", "gigabytes"]


def end_well(program: str, action: Callable[[], int | None], interrupted: str = "") -> int:
    """Run ``action``. An error of this package becomes one line on stderr and exit code 2, Ctrl-C 130."""
    try:
        return action() or 0
    except Vs2Error as error:
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted{interrupted}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `vs2 methods | head`
        sys.stderr.close()
        return 0


def gigabytes(size: float) -> str:
    """Bytes in words.

    >>> gigabytes(2_500_000), gigabytes(76_800_000_000)
    ('2.5 MB', '76.8 GB')
    """
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
