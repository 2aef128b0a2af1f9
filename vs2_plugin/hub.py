"""Repositories on a model hub, by the hub's own client.

That a hub cannot be reached is told soon: its client would try for a minute, and say so in twenty lines.
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, constants, get_session, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from vs2_plugin.errors import HubError
from vs2_plugin.text import one_line, reason_of

__all__ = ["chain", "download", "require_hub", "upload"]

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


def download(
    repository: str,
    revision: str | None,
    patterns: Sequence[str],
    is_whole: Callable[[Path], bool] | None = None,
    again: bool = False,
    cache_dir: str | None = None,
) -> Path:
    """Return the folder, in the hub's cache, of a repository.

    Args:
        repository: ``owner/name``.
        revision: a branch, tag or commit; None for the main branch.
        patterns: the files that are wanted; no others are fetched.
        is_whole: if it is given, the hub is not asked where the cache holds a folder of which this is true. (An
            interrupted download may have left a part.)
        again: fetch files that are there, too.
        cache_dir: where the client keeps what it has fetched, if not in its own place.

    Raises:
        HubError: there is no such repository, it cannot be had, or there is no way to the hub.
    """
    fetch = partial(
        snapshot_download, repository, revision=revision, cache_dir=cache_dir, allow_patterns=list(patterns)
    )
    with _told(repository, revision):
        if is_whole is not None:
            with suppress(LocalEntryNotFoundError):
                folder = Path(fetch(local_files_only=True))
                if is_whole(folder):
                    return folder
        require_hub(repository, cache_dir)
        return Path(fetch(force_download=again))


def upload(folder: Path, repository: str, patterns: Sequence[str], message: str, private: bool | None) -> str:
    """Put the files of a folder into a repository, which is made if there is none. Return where the commit is seen.

    Args:
        folder: what to put there.
        repository: ``owner/name``.
        patterns: files that are removed there, if the folder has none of that name.
        message: of the commit.
        private: whether only its owner sees it, if it is made; None: as the hub has it.

    Raises:
        HubError: the hub refused, or there is no way to it.
    """
    with _told(repository, None):
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=message, delete_patterns=list(patterns)
        )
    return str(commit.commit_url)


@contextmanager
def _told(repository: str, revision: str | None) -> Iterator[None]:
    """Tell what the hub, its client or the network raise as one sentence."""
    what = repository if revision is None else f"{repository} at {revision}"
    try:
        yield
    except HFValidationError as error:
        raise HubError(f"{repository!r} is not the name of a repository ({one_line(str(error))})") from error
    except (LocalEntryNotFoundError, ConnectionError) as error:
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else one_line(str(error))
        why = offline.removesuffix(f", and {repository} is not in the hub's cache")
        raise HubError(f"{what} is not in the hub's cache, and cannot be fetched: {why}") from error
    except HfHubHTTPError as error:
        mend = "check the name; for a private repository, or to write, log in with `hf auth login` or set HF_TOKEN"
        raise HubError(f"{constants.ENDPOINT} refuses {what} ({one_line(str(error), 160)}); {mend}") from error
    except Exception as error:  # of whichever client the hub uses
        if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
            raise  # of this machine's disk
        raise HubError(f"{what} cannot be reached on {constants.ENDPOINT} ({reason_of(error)})") from error


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
