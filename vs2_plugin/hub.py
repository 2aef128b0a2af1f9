"""Tells soon that a model hub cannot be reached: its client would try for a minute, and say so in twenty lines."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants, get_session

__all__ = ["chain", "require_hub"]

#: Seconds before each attempt. A name server that does not answer takes its own time.
_PAUSES = (0, 1, 2)
_ENOUGH = 5
#: What the system says at once where there is no way to a machine.
_NO_WAY = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN, errno.ECONNREFUSED}


def require_hub(repository: str, cache_dir: str | None = None) -> None:
    """Ask whether a repository that has to be fetched can be.

    Nothing is asked where some of it is in the cache, or the client was told to stay offline. The question goes the
    client's own way, to ``HF_ENDPOINT`` and through proxies. A slow answer, or an error of a server, is left to the
    client, which waits and tries again.

    Args:
        repository: ``organisation/name``.
        cache_dir: where the client keeps what it has fetched, if not in its own place.

    Raises:
        ConnectionError: three times within seconds, the system knew no way to the hub.
    """
    folder = Path(cache_dir or constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}" / "snapshots"
    if constants.HF_HUB_OFFLINE or any(folder.glob("*/*")):
        return
    started = time.monotonic()
    reason: OSError | None = None
    for pause in _PAUSES:
        time.sleep(pause)
        reason = _no_way()
        if reason is None:
            return
        if time.monotonic() - started > _ENOUGH:
            break
    raise ConnectionError(
        f"no way to {constants.ENDPOINT} ({reason}), tried for {time.monotonic() - started:.0f} s, and {repository} is "
        "not in the hub's cache"
    ) from reason


def _no_way() -> OSError | None:
    """Return what the system says of a network that is not there; None if it is, or that cannot be told."""
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:  # of whichever client the hub uses
        for one in chain(error):
            if isinstance(one, socket.gaierror) or (isinstance(one, OSError) and one.errno in _NO_WAY):
                return one
    return None


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and those that it came from."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__
