"""Files and folders that appear whole or not at all, whatever interrupts their writing.

A folder ``NAME`` is written as ``.NAME.part``, renamed to ``.NAME.new`` once it is complete, and then moved into place;
a folder that was there is moved to ``.NAME.old`` first, and deleted. Code that looks for ``NAME`` first completes what
a dead writer began (:func:`settle`), so that there is always the old folder or the new one. No heavy imports.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vs2_plugin.errors import DataError

__all__ = [
    "LOCKS", "LONGEST", "alone", "atomic_file", "atomic_folder", "file_digest", "hidden", "json_digest",
    "make_shared", "naming", "part_of", "settle", "sync", "without_part",
]  # fmt: skip

#: The folder, beside the files that are written, of the lock files by which processes exclude each other.
LOCKS = ".locks"
#: Characters that a name may have; file systems allow 255, and prefixes and suffixes are added to a name.
LONGEST = 200
_SECONDS = 10  # loader processes may outlive their parent, and hold its lock, for so long


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a scratch file beside ``path`` that replaces ``path`` when the block succeeds, and is deleted if it fails.

    Raises:
        OSError: the folder of ``path`` does not exist or cannot be written.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    scratch = Path(name)
    try:
        with naming(path):
            yield scratch
            _share(scratch)
            sync(scratch)
            os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name ``path`` in an OSError of the block that names no file, as that of a write to a full disk does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


@contextmanager
def without_part(path: Path) -> Iterator[None]:
    """Remove ``path`` if the block fails after it began to write it, for writers that use no scratch file. An OSError
    that names no file then names ``path``."""
    before = _last_written(path)
    try:
        yield
    except BaseException:
        if not path.is_file() or _last_written(path) == before:
            raise
        with suppress(OSError):
            path.resolve().unlink()
        with naming(path):
            raise


def _last_written(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


@contextmanager
def atomic_folder(path: Path, keep: Callable[[Path], bool] = lambda scratch: False) -> Iterator[Path]:
    """Yield a scratch folder beside ``path`` that replaces ``path`` when the block succeeds.

    A folder that exists at ``path`` stays until then, and is kept if the block fails.

    Args:
        path: the folder.
        keep: decides, when the block fails and when the next call begins, whether the scratch folder is left as it is
            for the next call. By default, the next call starts with an empty one.

    Raises:
        DataError: another process is writing ``path``.
        OSError: the folder around ``path`` cannot be made or written.
    """
    with alone(path):
        scratch = part_of(path)
        if scratch.exists() and not keep(scratch):
            shutil.rmtree(scratch)
        scratch.mkdir(exist_ok=True)
        try:
            yield scratch
            _share(scratch)
            sync(scratch)
            _put(scratch, path)
        finally:
            if scratch.exists() and not keep(scratch):
                shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def alone(path: Path, seconds: float = _SECONDS, waiting: Callable[[], None] | None = None) -> Iterator[bool]:
    """Lock ``path`` against other writers within the block; if the process dies, the system releases the lock.

    Within a process, blocks may be nested. On a file system without locks, no process is kept out.

    Args:
        path: a file or folder; its parent folder is made if it is missing.
        seconds: how long to wait for another process; -1: until it has finished.
        waiting: called before the wait begins, if there is one.

    Yields:
        Whether this process had to wait for another one to finish writing.

    Raises:
        DataError: another process is still writing ``path``.
        OSError: the folder around ``path`` cannot be made or written.
    """
    from filelock import FileLock, Timeout

    folder = path.parent / LOCKS
    make_shared(folder)
    mode = _permissions(path.parent) & 0o666
    lock, waited = FileLock(folder / path.name, mode=mode, is_singleton=True), False
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            waited = True
            if waiting is not None:
                waiting()
            lock.acquire(timeout=seconds)
    except Timeout:
        raise DataError(
            f"another process is writing {path}; wait until it has finished, or write under another name"
        ) from None
    except (NotImplementedError, OSError) as error:
        if not _has_no_locks(error):
            raise
    try:
        _finish(path)
        yield waited
    finally:
        lock.release()


def make_shared(folder: Path) -> None:
    """Make ``folder`` if it is missing, with the permissions of its parent folder."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
        _share(folder)


def _permissions(folder: Path) -> int:
    """Return the permissions for what is written in ``folder``: those of the folder, so that colleagues may share it.
    In a sticky folder, such as /tmp, where everybody may write, others may only read."""
    mode = folder.stat().st_mode
    return 0o755 if mode & stat.S_ISVTX else mode & 0o2777


def _share(path: Path) -> None:
    """Give a file, or a folder and its contents, the permissions of the parent folder, whatever the umask is.

    Files with other hard links keep theirs: a change would make ``verified.json`` take them for changed files.
    """
    mode = _permissions(path.parent)
    for entry in [*(path.rglob("*") if path.is_dir() else []), path]:
        with suppress(PermissionError):  # the file belongs to another user
            if entry.is_dir() or entry.stat().st_nlink == 1:
                entry.chmod(mode if entry.is_dir() else mode & 0o666)


def hidden(error: OSError, path: Path) -> str | None:
    """Return a message that this user may not read ``path``, if ``error`` is a PermissionError; else None."""
    if not isinstance(error, PermissionError):
        return None
    return f"{path} exists, but this user may not read it; its owner can change that: chmod -R a+rX {path.parent}"


def _has_no_locks(error: NotImplementedError | OSError) -> bool:
    """Return whether an error comes from a file system without locks, and not from a full or broken one."""
    return not isinstance(error, OSError) or error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def json_digest(value: Any) -> str:
    """Return the SHA-256 of plain JSON values, whatever the order of keys, as hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def part_of(path: Path) -> Path:
    """Return the scratch folder in which :func:`atomic_folder` writes ``path``."""
    return path.with_name(f".{path.name}.part")


def settle(path: Path) -> None:
    """Complete the replacement of ``path`` that a dead writer began, or wait while a living one completes it.

    Nothing is done if the folder around ``path`` cannot be written.
    """
    path = path if path.name not in ("", "..") else path.resolve()
    if not path.name:  # "/"
        return
    if (path.exists() or not _old(path).exists()) and not _new(path).exists():
        return
    with suppress(DataError, OSError), alone(path):
        pass


def _new(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _finish(path: Path) -> None:
    """Move a complete ``.NAME.new`` to ``path``, else ``.NAME.old`` back to it, and delete any old folder left."""
    new, old = _new(path), _old(path)
    if new.exists():
        _swap(new, path)
    elif old.exists() and not path.exists():
        os.replace(old, path)
    if old.exists():
        shutil.rmtree(old, ignore_errors=True)


def _put(scratch: Path, path: Path) -> None:
    """Move ``scratch`` to ``path``; an existing folder there is moved back if that fails."""
    new = _new(path)
    os.replace(scratch, new)  # from here on, any process that locks ``path`` completes the move
    try:
        _finish(path)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)  # the caller gets the error, so no later process may complete the move
        raise


def _swap(new: Path, path: Path) -> None:
    old = _old(path)
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
    try:
        os.replace(new, path)
        sync(path.parent, inside=False)
    except BaseException:
        if old.exists() and not path.exists():
            os.replace(old, path)
        raise


def sync(path: Path, inside: bool = True) -> None:
    """Flush a file, or a folder and all files in it, to the disk, so that it survives a power failure."""
    if os.name == "nt":  # Windows cannot open folders
        return
    for entry in [*(path.rglob("*") if inside and path.is_dir() else []), path]:
        handle = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
