"""Faults of the system while something is written, and what every writer must keep to then.

A :class:`Writer` writes version 1 and then version 2, and tells which of them lies there. :func:`troubles` writes
version 2 over and over, each time with a fault at the next call that changes the disk, until one time the fault comes
too late to be met. For a process that dies, it looks at what lies there before each such call.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from vs2_plugin.errors import Vs2Error

__all__ = ["FAULTS", "LEFT", "Writer", "troubles"]

#: How a trouble is told that is only litter.
LEFT = "a later writing left"

_ERRORS = [errno.ENOSPC, errno.EROFS, errno.EIO]
_PATIENCE = 60  # seconds that a writing may take in a process of its own
#: Python's own events of calls that change what lies on the disk (fsync has none; see below).
_CHANGES = {"os.rename", "os.link", "os.symlink", "os.mkdir", "os.chmod", "os.truncate"}
_REMOVALS = {"os.remove", "os.rmdir"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class Writer:
    """Something that is written whole or not at all, in a folder of its own."""

    name: str
    write: Callable[[Path, int], object]
    """Write version 1 or 2 into a folder, over what lies there."""
    read: Callable[[Path], int | None]
    """Which version lies there; None: none. Raises if it is neither."""
    kept: bool = True
    """Whether a writing that ends well has written. (What only saves time may fail in silence.)"""
    over: tuple[int | None, ...] = (None, 1)
    """The versions that it is written over; None: nothing."""


class _Counter:
    """Counts the calls that change what lies below a folder, and does something before each."""

    def __init__(self, folder: Path, before: Callable[[int], None], removals: bool) -> None:
        """``before`` is told the number of the call. Without ``removals``, those are not counted."""
        self.folder, self.before, self.removals, self.calls = str(folder), before, removals, 0

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        removal = event in _REMOVALS
        if event == "open":
            path, mode, flags = arguments
            changes = set(mode or "") & set("wax+") or (flags or 0) & _WRITES
            if not changes:
                return
        elif not removal and event not in _CHANGES:
            return
        # A tree is removed name by name, each within its open folder.
        if self.removals if removal else self._is_mine(arguments):
            self.call()

    def _is_mine(self, arguments: tuple[Any, ...]) -> bool:
        return any(isinstance(one, (str, Path)) and str(one).startswith(self.folder) for one in arguments)

    def call(self) -> None:
        self.calls += 1
        self.before(self.calls)


_counting: _Counter | None = None
_hooked = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _counting is not None:
        _counting.hear(event, arguments)


@contextmanager
def _at_calls(folder: Path, before: Callable[[int], None], removals: bool = False) -> Iterator[_Counter]:
    """Have ``before`` done before each call that changes what lies below ``folder``."""
    global _counting, _hooked
    if not _hooked:  # it stays for good
        sys.addaudithook(_hook)
        _hooked = True
    counter, fsync = _Counter(folder, before, removals), os.fsync

    def counted(file: Any) -> None:
        counter.call()
        fsync(file)

    _counting, os.fsync = counter, counted
    try:
        yield counter
    finally:
        _counting, os.fsync = None, fsync


@contextmanager
def _at_byte(limit: int, action: Any) -> Iterator[None]:
    """Let no file grow beyond so many bytes, whoever writes it, C code too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, action)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def _in_a_child(run: Callable[[], object]) -> int:
    """Run in a fork of this process, alone and with one thread. Returns its exit code, negative for a signal."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        ends = time.monotonic() + _PATIENCE
        while not (status := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > ends:  # a lock that a thread held when the process was forked
                os.kill(child, signal.SIGKILL)
            time.sleep(0.001)
        return os.waitstatus_to_exitcode(status[1])
    try:
        run()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


@dataclass
class _Place:
    """A folder in which one writing meets one fault."""

    writer: Writer
    folder: Path
    before: int | None
    """The version that lies there before."""
    problem: str | None = None

    def prepare(self) -> None:
        """Write what lies there before, or copy it from where it was written once."""
        start = self.folder.with_name(f"{self.before}-start")
        if not start.exists():
            start.mkdir()
            for version in range(1, (self.before or 0) + 1):
                self.writer.write(start, version)
        shutil.copytree(start, self.folder)

    def attempt(self) -> bool:
        """Write version 2. Returns whether it says that it has."""
        try:
            self.writer.write(self.folder, 2)
            return True
        except (OSError, Vs2Error):
            return False
        except BaseException as error:
            self.problem = f"{type(error).__name__}: {error}"
            return False

    def look(self, ended_well: bool) -> None:
        """Note what is wrong after the fault, and after a later writing without one."""
        found = self._read()
        allowed = [2] if ended_well and self.writer.kept else [self.before, 2]
        if self.problem is None and found not in allowed:
            self.problem = f"version {found} lies there after it, expected one of {allowed}"
        if self.problem is not None:
            return
        try:
            self.writer.write(self.folder, 2)
        except Exception as error:
            self.problem = f"a later writing failed: {type(error).__name__}: {error}"
            return
        found, names = self._read(), listing(self.folder)
        clean = self.folder.with_name(f"{self.before}-clean")
        if not clean.exists():
            _Place(self.writer, clean, self.before).prepare()
            self.writer.write(clean, 2)
        if self.problem is None and found != 2:
            self.problem = f"version {found} lies there after a later writing"
        elif self.problem is None and names != listing(clean):
            self.problem = f"{LEFT} {sorted(set(names) ^ set(listing(clean)))}"

    def _read(self) -> int | None:
        try:
            return self.writer.read(self.folder)
        except Exception as error:
            self.problem = self.problem or f"it cannot be read: {type(error).__name__}: {error}"
            return None


def listing(folder: Path) -> list[str]:
    """All paths below a folder, hidden ones too."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def _calls(writer: Writer, root: Path, before: int | None, kind: str) -> Iterator[tuple[str, str]]:
    for number in count(1):
        place = _Place(writer, root / f"{before}-{number}", before)
        place.prepare()

        def fail(call: int, number: int = number) -> None:
            if call >= number if kind == "fails from then on" else call == number:
                code = _ERRORS[number % len(_ERRORS)]
                raise OSError(code, os.strerror(code))

        with _at_calls(place.folder, fail) as counter:
            well = place.attempt()
        place.look(well)
        if place.problem is not None:
            yield f"call {number}", place.problem
        if counter.calls < number:
            return


def _deaths(writer: Writer, root: Path, before: int | None, kind: str) -> Iterator[tuple[str, str]]:
    """A process that dies leaves the disk as it is at that moment, and its locks free, as a copy's are. So version 2 is
    written once, and what lies there before each call is copied. (The inodes and times by which files count as verified
    are not those of a copy, so there they are verified anew.)"""
    place = _Place(writer, root / f"{before}-alive", before)
    place.prepare()
    moments: list[Path] = []

    def copy(call: int) -> None:
        global _counting
        counting, _counting = _counting, None
        moments.append(root / f"{before}-{call}")
        try:
            shutil.copytree(place.folder, moments[-1], symlinks=True, copy_function=_copied)
        except OSError as error:
            raise AssertionError(f"what lies there cannot be copied: {error}") from error
        finally:
            _counting = counting

    with _at_calls(place.folder, copy, removals=True):
        well = place.attempt()
    if not well and place.problem is None:
        place.problem = "a writing without a fault failed"
    place.look(well)
    for number, moment in enumerate(moments, 1):
        left = _Place(writer, moment, before)
        left.look(False)
        if left.problem is not None:
            yield f"call {number}", left.problem
    if not moments or place.problem is not None:
        yield "without a fault", place.problem or "no call was heard of"


def _copied(source: str, target: str) -> object:
    """Copy a file, or link one that is a link to what lies elsewhere."""
    return os.link(source, target) if os.stat(source).st_nlink > 1 else shutil.copy2(source, target)


def _bytes(writer: Writer, root: Path, before: int | None, kind: str) -> Iterator[tuple[str, str]]:
    whole = _Place(writer, root / f"{before}-whole", 2)
    whole.prepare()
    sizes = {path.stat().st_size for path in whole.folder.rglob("*") if path.is_file()}
    for limit in sorted({0} | {max(0, size - 1) for size in sizes} | {size // 2 for size in sizes}):
        place = _Place(writer, root / f"{before}-{limit}", before)
        place.prepare()
        if kind == "dies while it writes":

            def run(place: _Place = place, limit: int = limit) -> None:
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                with _at_byte(limit, signal.SIG_DFL):
                    place.attempt()

            code = _in_a_child(run)
            well = code == 0
            if code == -signal.SIGKILL:
                place.problem = "the process hung"
        else:
            with _at_byte(limit, signal.SIG_IGN):
                well = place.attempt()
        place.look(well)
        if place.problem is not None:
            yield f"byte {limit}", place.problem


#: Kind of fault -> where it is met.
FAULTS: dict[str, Callable[[Writer, Path, int | None, str], Iterator[tuple[str, str]]]] = {
    "fails": _calls,
    "fails from then on": _calls,
    "dies": _deaths,
    "full": _bytes,
    "dies while it writes": _bytes,
}


def troubles(writer: Writer, fault: str, root: Path, before: int | None) -> list[str]:
    """What goes wrong where version 2 is written after version ``before`` (None: over nothing) and meets the fault."""
    return [f"{where}: {problem}" for where, problem in FAULTS[fault](writer, root, before, fault)]
