"""The flags that ``vs2 inspect`` and ``vs2 latents`` have in common, and how they print."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from vs2_plugin.errors import DataError

if TYPE_CHECKING:
    from vs2_plugin.inspection.subject import Subject

__all__ = ["add_subject", "positive", "say", "say_problems", "subject_of"]


def positive(text: str) -> int:
    """Return a whole number of at least 1, for argparse. Raises ValueError."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def add_subject(command: argparse.ArgumentParser) -> None:
    """Add flags by clip_benchmark's names and with its defaults."""
    add = command.add_argument
    add("--model", required=True, metavar="MODEL", help="model string: method:backbone[@checkpoint][@key=value]...")
    add("--pretrained", default="laion400m_e32", help="open_clip's weights tag or file (default: %(default)s)")
    add("--dataset", required=True, help="the data set whose classes and checkpoint are meant; wds/NAME for shards")
    add("--dataset_root", default="root", help="its folder; {dataset} is filled in (default: %(default)s)")
    add("--classes", type=Path, metavar="FILE", help="class names, one per line, in place of the data set's")
    add("--concepts", type=Path, metavar="FILE", help="words to compare latents with, one per line (default: classes)")
    add("--model_cache_dir", help="where downloaded models are kept")
    add("--wds_cache_dir", help="where downloaded shards are kept")


def subject_of(args: argparse.Namespace) -> Subject:
    """Load what the command line names. Raises Vs2Error: what is wrong, and what mends it."""
    from vs2_plugin.inspection.subject import open_subject

    return open_subject(
        args.model, args.pretrained, args.dataset, args.dataset_root,
        concepts=args.concepts and _read_words(args.concepts, "--concepts"),
        classes=args.classes and _read_words(args.classes, "--classes"),
        model_cache_dir=args.model_cache_dir, wds_cache_dir=args.wds_cache_dir, progress=not args.quiet,
    )  # fmt: skip


def _read_words(path: Path, flag: str) -> list[str]:
    try:
        words = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise DataError(f"cannot read {flag} {str(path)!r}: {error.strerror}; expected one word per line") from None
    except UnicodeDecodeError:
        raise DataError(f"{flag} {str(path)!r} is no text in UTF-8; expected one word per line") from None
    if len(set(words)) < 2:
        raise DataError(f"{flag} {str(path)!r} holds {len(set(words))} word(s); expected at least two, one per line")
    return words


def say(text: str) -> None:
    """Print, also where a class has a name that the terminal cannot write."""
    encoding = sys.stdout.encoding or "ascii"
    print(text.encode(encoding, "replace").decode(encoding))


def say_problems(problems: Iterable[str]) -> None:
    """Print on stderr what could not be shown."""
    for problem in problems:
        print(f"vs2: {problem}", file=sys.stderr)
