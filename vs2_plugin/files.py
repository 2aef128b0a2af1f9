"""Files and folders that appear whole or not at all, whatever interrupts their writing."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic_file", "atomic_folder"]


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
        scratch.chmod(0o644)  # mkstemp's 0600 would hide it from colleagues who share the folder
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give an empty scratch folder beside ``path``, which takes its place when the block ends well.

    A folder that lies at ``path`` stays until then, and stays for good when the block fails.

    Raises:
        OSError: the folder around ``path`` cannot be made or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield scratch
        scratch.chmod(0o755)  # mkdtemp's 0700 would hide it from colleagues who share the store
        _replace(scratch, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _replace(scratch: Path, path: Path) -> None:
    """Move a folder to where another one may lie, which comes back if that fails."""
    if not path.exists():
        os.replace(scratch, path)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
    try:
        os.replace(path, aside / path.name)
        try:
            os.replace(scratch, path)
        except BaseException:
            os.replace(aside / path.name, path)
            raise
    finally:
        if path.exists():  # else the old one lies aside, to be saved by hand
            shutil.rmtree(aside, ignore_errors=True)
