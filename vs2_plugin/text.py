"""Text of messages: single lines, reasons of errors, counts and sizes."""

from __future__ import annotations

import errno
import os
import re
import textwrap
import unicodedata
from collections.abc import Iterable, Iterator

__all__ = ["counted", "expanded", "gigabytes", "one_line", "printable", "reason_of", "said_by", "sentence_of"]

#: Characters that join or separate letters and emoji; they neither move a cursor nor change the reading order.
_JOINERS = (0x200C, 0x200D)
#: Advice for errors of the operating system.
_MENDS = {
    errno.ENOSPC: "; make room there, or name another place",
    errno.EDQUOT: "; make room there, or name another place",
    errno.EROFS: "; name a place that can be written",
    errno.EACCES: "; name a place that can be written",
    errno.ENAMETOOLONG: "; give a shorter name",
}


def printable(text: object) -> str:
    r"""Return ``text`` in one line, with control characters, which could rewrite what a terminal shows, and marks that
    change the reading order escaped.

    >>> print(printable("a\x1b[2K\u202eb\nc"))
    a\x1b[2K\u202eb\nc
    """
    text = str(text)
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(letter: str) -> str:
    shows = letter.isprintable() or ord(letter) in _JOINERS or unicodedata.category(letter) == "Zs"  # Zs: other spaces
    return letter if shows else letter.encode("unicode_escape").decode()


def one_line(text: str, length: int = 300) -> str:
    """Return ``text`` as one line of at most ``length`` characters, cut between words.

    >>> one_line("please check  your connection", 20)
    'please check ...'
    """
    line = " ".join(text.split())
    if len(line) <= length:
        return line
    cut = textwrap.shorten(line, length, placeholder=" ...", break_on_hyphens=False)
    return cut if len(cut) > length // 2 else f"{line[: length - 4]} ..."  # one long word, such as a path


def reason_of(error: BaseException) -> str:
    """Return the type and message of another package's exception as one line."""
    return f"{type(error).__name__}: {one_line(str(error))}"


def sentence_of(error: BaseException) -> str:
    """Return the line that a command prints for an error of this package or of the operating system.

    >>> sentence_of(OSError(28, "No space left on device", "store/x"))
    "No space left on device: 'store/x'; make room there, or name another place"
    """
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        where = f": {os.fspath(error.filename)!r}" if error.filename is not None else ""
        return f"{error.strerror}{where}{_MENDS.get(error.errno, '')}"
    return " ".join(said_by(error).split())


def said_by(error: BaseException) -> str:
    """Return the message of an exception; a data loader's worker puts it at the end of a traceback."""
    text = str(error).strip()
    if "Original Traceback" not in text:
        return text
    # After the last call, whose lines are indented, the exception begins with its name; its message may have lines.
    told = re.search(r"^\S+?: (.*)", text[text.rfind('\n  File "') + 1 :], re.MULTILINE | re.DOTALL)
    return told[1] if told else text


def expanded(text: str) -> Iterator[str]:
    """Yield the texts to which ``{first..last}`` and ``{one,other}`` in ``text`` expand, as in a shell.

    >>> list(expanded("x-{08..10}{a,b}"))
    ['x-08a', 'x-08b', 'x-09a', 'x-09b', 'x-10a', 'x-10b']
    """
    braces = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", text)
    if braces is None:
        yield text
        return
    first, last, words = braces.groups()
    if words is None:
        width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
        choices: Iterable[str] = (f"{number:0{width}}" for number in range(int(first), int(last) + 1))
    else:
        choices = words.split(",")
    for choice in choices:
        yield from expanded(text[: braces.start()] + choice + text[braces.end() :])


def counted(count: int, noun: str) -> str:
    """Return a number with its noun.

    >>> counted(1, "image"), counted(1797, "image")
    ('1 image', '1,797 images')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def gigabytes(size: float) -> str:
    """Return a number of bytes in MB or GB.

    >>> gigabytes(2_500_000), gigabytes(76_800_000_000)
    ('2.5 MB', '76.8 GB')
    """
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
