"""Files and folders that appear whole or not at all, whatever interrupts their writing.

A folder ``NAME`` is written as ``.NAME.part``, is called ``.NAME.new`` once it is whole, and then takes its place; what
lay there goes by way of ``.NAME.old``. Whoever looks for ``NAME`` first finishes what a writer that died began
(:func:`settle`): there is always the old folder or the new one. No heavy imports.
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
    "make_shared", "part_of", "settle", "sync",
]  # fmt: skip

#: The folder, beside what is written, in which processes keep each other from writing it.
LOCKS = ".locks"
#: Letters that a name may have, with room for what is put around it: file systems take 255.
LONGEST = 200
_SECONDS = 10  # loader processes may live, and hold their dead parent's lock, for so long


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a scratch file beside ``path``, which takes its place when the block ends well, and goes when it does not.

    Raises:
        OSError: the folder of ``path`` is not there, or cannot be written.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    scratch = Path(name)
    try:
        yield scratch
        _share(scratch)
        sync(scratch)
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(path: Path, keep: Callable[[Path], bool] = lambda scratch: False) -> Iterator[Path]:
    """Give a scratch folder beside ``path``, which takes its place when the block ends well.

    A folder that lies at ``path`` stays until then, and stays for good when the block fails.

    Args:
        path: the folder.
        keep: tells of the scratch folder, when the block fails, whether the next call shall find it as it is. Without
            it, and if the process dies, the next one finds it empty.

    Raises:
        DataError: another process is writing it.
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
    """Keep other processes from writing ``path``. The operating system ends this with the process, if it dies.

    Within a process it may be nested. On a file system without locks, nobody is kept out.

    Args:
        path: a file or folder; the one around it is made.
        seconds: how long to wait for another process; -1: until it has finished.
        waiting: called before waiting.

    Yields:
        Whether another process wrote it until now.

    Raises:
        DataError: another process is writing it.
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
    """Make a folder where there is none, with the permissions of the one around it."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
        _share(folder)


def _permissions(folder: Path) -> int:
    """Return what a folder lets whom do, for what is written in it: colleagues may share it. Where everybody may write
    and nobody remove another's (a sticky folder, such as /tmp), others may read."""
    mode = folder.stat().st_mode
    return 0o755 if mode & stat.S_ISVTX else mode & 0o2777


def _share(path: Path) -> None:
    """Give a file, or a folder with all in it, the permissions of the folder around it, whatever the umask is.

    What is linked elsewhere too has its permissions from there, and is not touched: it was compared with its digest.
    """
    mode = _permissions(path.parent)
    for one in [*(path.rglob("*") if path.is_dir() else []), path]:
        with suppress(PermissionError):  # somebody else's
            if one.is_dir() or one.stat().st_nlink == 1:
                one.chmod(mode if one.is_dir() else mode & 0o666)


def hidden(error: OSError, path: Path) -> str | None:
    """Return in words that this user may not read a file of somebody else's, if that is what an error says."""
    if not isinstance(error, PermissionError):
        return None
    return f"{path} exists, but this user may not read it; its owner can change that: chmod -R a+rX {path.parent}"


def _has_no_locks(error: NotImplementedError | OSError) -> bool:
    """Tell what a file system without locks says from what a full or broken one does."""
    return not isinstance(error, OSError) or error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def json_digest(value: Any) -> str:
    """Return the SHA-256 of plain JSON values, whatever the order of their keys, as hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def part_of(path: Path) -> Path:
    """Return the scratch folder of ``path``."""
    return path.with_name(f".{path.name}.part")


def settle(path: Path) -> None:
    """Finish what a writer that died began, or wait while a living one puts its folder in place.

    Where the folder around ``path`` cannot be written, nothing is done.
    """
    if (path.exists() or not _old(path).exists()) and not _new(path).exists():
        return
    with suppress(DataError, OSError), alone(path):
        pass


def _new(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _finish(path: Path) -> None:
    """Bring a folder that is whole to its place, or one that was moved aside back, and remove what is left."""
    new, old = _new(path), _old(path)
    if new.exists():
        _swap(new, path)
    elif old.exists() and not path.exists():
        os.replace(old, path)
    if old.exists():
        shutil.rmtree(old, ignore_errors=True)


def _put(scratch: Path, path: Path) -> None:
    """Move a folder to where another one may lie, which comes back if that fails."""
    new = _new(path)
    os.replace(scratch, new)  # from here on, whoever comes finishes it
    try:
        _swap(new, path)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)  # the caller hears of it, and it is not to appear later
        raise
    shutil.rmtree(_old(path), ignore_errors=True)


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
    """Have the disk write a file, or a folder and all files in it, which survives a power failure then."""
    if os.name == "nt":  # folders cannot be opened there
        return
    for one in [*(path.rglob("*") if inside and path.is_dir() else []), path]:
        handle = os.open(one, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
