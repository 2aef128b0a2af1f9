"""Repositories on a model hub, through the hub's own client.

A hub that cannot be reached is reported within seconds; its client would try for a minute and print twenty lines.
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

from vs2_plugin.errors import HubError, Vs2Error
from vs2_plugin.text import one_line, reason_of

__all__ = ["chain", "download", "require_hub", "upload"]

#: Seconds to wait before each attempt. A name server that does not answer adds its own timeout.
_PAUSES = (0, 1, 2)
_ENOUGH = 5  # seconds after which there is no further attempt
#: Errors by which the system says at once that a machine cannot be reached.
_NO_WAY = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN, errno.ECONNREFUSED}


def require_hub(repository: str, cache_dir: str | None = None) -> None:
    """Check that the hub can be reached if a repository has to be fetched.

    Nothing is checked if part of the repository is in the cache, or the client is set to stay offline. The request goes
    the client's own way, to ``HF_ENDPOINT`` and through proxies. Slow answers and server errors are left to the client,
    which waits and tries again.

    Args:
        repository: ``organisation/name``.
        cache_dir: the client's cache, if not its default one.

    Raises:
        ConnectionError: the system found no way to the hub in up to three attempts within seconds.
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
    """Return the folder of a repository in the hub's cache, into which missing files are fetched.

    Args:
        repository: ``owner/name``.
        revision: a branch, tag or commit; None for the main branch.
        patterns: patterns of the files to fetch; no others are fetched.
        is_whole: if given, and true of the folder in the cache, the hub is not asked. (An interrupted download may
            have left a part.)
        again: fetch files again that are in the cache.
        cache_dir: the client's cache, if not its default one.

    Raises:
        HubError: the repository does not exist or cannot be fetched, or the hub cannot be reached.
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
    """Upload a folder's files to a repository, which is created if it is missing, and return the URL of the commit.

    Args:
        folder: the folder to upload.
        repository: ``owner/name``.
        patterns: patterns of the files that are deleted in the repository if the folder lacks them.
        message: the commit's message.
        private: whether a new repository is visible to its owner only; None: the hub's default.

    Raises:
        HubError: the hub refused, or cannot be reached.
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
    """Turn errors of the hub, its client or the network into a :class:`HubError` of one sentence."""
    what = repository if revision is None else f"{repository} at {revision}"
    try:
        yield
    except Vs2Error:  # it says what is wrong with a file in the cache
        raise
    except HFValidationError as error:
        raise HubError(f"{repository!r} is not the name of a repository ({one_line(str(error))})") from error
    except (LocalEntryNotFoundError, ConnectionError) as error:
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else one_line(str(error))
        why = offline.removesuffix(f", and {repository} is not in the hub's cache")
        raise HubError(f"{what} is not in the hub's cache, and cannot be fetched: {why}") from error
    except HfHubHTTPError as error:
        mend = "check the name; for a private repository, or to write, log in with `hf auth login` or set HF_TOKEN"
        raise HubError(f"{constants.ENDPOINT} refuses {what} ({one_line(str(error), 160)}); {mend}") from error
    except Exception as error:  # of whichever HTTP library the client uses
        if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
            raise  # an error of this machine's disk
        raise HubError(f"{what} cannot be reached on {constants.ENDPOINT} ({reason_of(error)})") from error


def _no_way() -> OSError | None:
    """Return the system's error if there is no way to the hub; None if there is one, or if that cannot be told."""
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:  # of whichever HTTP library the client uses
        for cause in chain(error):
            if isinstance(cause, socket.gaierror) or (isinstance(cause, OSError) and cause.errno in _NO_WAY):
                return cause
    return None


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception, then its cause or context, and so on."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__
