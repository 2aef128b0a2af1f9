"""Runs commands of clip_benchmark, in a given folder and environment, and says in a line why one failed."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import cast

from vs2_plugin.text import one_line

__all__ = ["run_command", "surroundings"]


def run_command(words: Sequence[str], log: Path, quiet: bool, look: Callable[[], None]) -> str | None:
    """Run a command and return the reason if it failed, else None.

    Args:
        words: the command.
        log: file to which the command's stderr is appended.
        quiet: whether to hide the command's output.
        look: called before the command starts, and whenever it writes to stderr.
    """
    # The script installed beside this Python is preferred, even if another environment is active.
    script = shutil.which(words[0], path=os.path.dirname(sys.executable)) or shutil.which(words[0])
    if script is None:
        return f"the command {words[0]} is not installed beside {sys.executable}"
    shown = not quiet and sys.stderr.isatty()
    tail = b""
    look()
    with open(log, "ab") as file:
        file.write(f"\n$ {shlex.join(words)}\n".encode())
        hidden = subprocess.DEVNULL if quiet else None
        with subprocess.Popen([script, *words[1:]], stdout=hidden, stderr=subprocess.PIPE) as process:
            stream = cast(BufferedReader, process.stderr)
            try:
                while chunk := stream.read1(65536):
                    look()
                    tail = (tail + chunk)[-65536:]
                    file.write(chunk)
                    if shown:
                        sys.stderr.buffer.write(chunk)
                        sys.stderr.buffer.flush()
            except BaseException:
                process.terminate()
                raise
    return None if process.returncode == 0 else _reason(tail.decode(errors="replace"), process.returncode)


@contextmanager
def surroundings(folder: Path, variables: Mapping[str, str]) -> Iterator[None]:
    """Change the working folder and environment variables, for this process and commands, within a ``with`` block."""
    place, environment = Path.cwd(), dict(os.environ)
    os.chdir(folder)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.chdir(place)
        os.environ.clear()
        os.environ.update(environment)


def _reason(said: str, code: int) -> str:
    """Return why a command failed, from the end of its stderr."""
    lines = [line for line in said.replace("\r", "\n").splitlines() if line.strip()]
    ours = [line.partition("error: ")[2] for line in lines if line.startswith("vs2: error: ")]
    if ours:
        return ours[-1]
    return f"clip_benchmark ended with exit code {code}: {one_line(lines[-1]) if lines else 'it printed nothing'}"
