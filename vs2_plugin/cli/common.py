"""Parts that the commands share: flags, and the handling of errors and interruptions."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import signal
import sys
import threading
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from vs2_plugin import messages
from vs2_plugin.checkpoint.store import ENVIRONMENT_VARIABLE
from vs2_plugin.errors import SettingError, Vs2Error, is_interruption
from vs2_plugin.paths import listed_once
from vs2_plugin.settings import flags_of, settings_of
from vs2_plugin.text import sentence_of

__all__ = [
    "AGAIN", "Command", "Commands", "add_flags", "add_store_option", "end_well", "load_torch", "make_folder",
    "refuse_silence", "request_of",
]  # fmt: skip

T = TypeVar("T")

#: The sub-commands of a parser, to which ``add_*`` functions add one.
Commands: TypeAlias = "argparse._SubParsersAction[Command]"
#: Message after an interruption of a command that writes all of its files at its end.
AGAIN = "; nothing was kept: run the same command again"


class Command(argparse.ArgumentParser):
    """An argument parser that refuses unknown arguments and suggests a similar flag, of the sub-command at fault. A
    description or examples of several lines are shown as they are written."""

    def __init__(self, **words: Any) -> None:
        if "\n" in f"{words.get('description')}{words.get('epilog')}":
            words["formatter_class"] = argparse.RawDescriptionHelpFormatter
        super().__init__(**words)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse known arguments. Raises SettingError for unknown ones, naming the unknown flags if there are any."""
        parsed, words = super().parse_known_args(args, namespace)
        if words:
            flags = [word.partition("=")[0] for word in words if word.startswith("-") and word.strip("-")]
            flag_names = [flag.strip("-") for flag in self._option_string_actions]
            near = difflib.get_close_matches(flags[0].strip("-"), flag_names, 1) if flags else []
            meant = f"; did you mean --{near[0]}?" if near else ""
            raise SettingError(f"unrecognized arguments: {' '.join(flags or words)}{meant}; see: {self.prog} --help")
        return parsed, words


def make_folder(path: Path) -> None:
    """Make the folder of ``--out``. Raises SettingError if it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingError(f"--out {str(path)!r} cannot be made: {error.strerror}; name another folder") from error


def refuse_silence(args: argparse.Namespace) -> None:
    """Raise SettingError for ``--quiet`` without ``--out``."""
    if args.quiet and args.out is None:
        raise SettingError("--quiet prints nothing, and without --out nothing is written: give --out FOLDER, or "
                           "omit --quiet")  # fmt: skip


def add_store_option(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add the flag ``--store``."""
    text = f"folder of the store (default: ${ENVIRONMENT_VARIABLE}, else the platform's cache folder)"
    parser.add_argument("--store", default=default, help=text)


def request_of(owner: type[T], args: argparse.Namespace, **more: Any) -> T:
    """Build a request from the settings on the command line; ``more`` holds further fields."""
    return owner(**{name: value for name, value in vars(args).items() if name in settings_of(owner)}, **more)


def end_well(program: str, action: Callable[[], int | None], interrupted: Callable[[], str] = str) -> int:
    """Run ``action``, show its log messages, and return the exit code. ``interrupted`` gives the message for Ctrl-C.

    An error of this package, or of the system (a full disk), becomes one line on stderr and exit code 2. Ctrl-C gives
    exit code 130, and a closed output pipe 141, as for any program.
    """
    messages.show()
    try:
        with listed_once():
            return action() or 0
    except BrokenPipeError:  # `vs2 methods | head`
        if sys.stderr is not None:
            sys.stderr.close()
        return 128 + 13  # SIGPIPE
    except (Vs2Error, OSError) as error:
        messages.complain(f"{program}: error: {sentence_of(error)}")
        return 2
    except (KeyboardInterrupt, RuntimeError) as error:
        # Ctrl-C ends a data loader's workers too, and the loader raises RuntimeError while the interruption is handled.
        if not is_interruption(error):
            raise
        print(f"\n{program}: interrupted{interrupted()}", file=sys.stderr)
        return 130


def load_torch() -> None:
    """Import torch, which takes a second. A Ctrl-C during the import is raised afterwards.

    Raised within the C++ code that the import runs, it would abort the process.
    """
    pending: list[object] = []
    # A foreign handler, or one that ignores Ctrl-C (nohup), is left in place; only the main thread may set one.
    mine = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    mine = mine and threading.current_thread() is threading.main_thread()
    if mine:
        signal.signal(signal.SIGINT, lambda *which: pending.append(which))
    try:
        import torch  # noqa: F401
    finally:
        if mine:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    if pending:
        raise KeyboardInterrupt


def add_flags(
    parser: argparse.ArgumentParser,
    owner: type[Any],
    groups: Mapping[str, tuple[str, str | None]] | None = None,
    leave_out: Collection[str] = (),
) -> None:
    """Add flags for the settings that a dataclass declares, except for those in ``leave_out``.

    With ``argument_default=SUPPRESS``, the parser's result holds only flags that were given; the dataclass checks
    ranges. ``groups`` maps the first setting of each group of flags to the group's title and description.
    """
    required = {field.name for field in dataclasses.fields(owner) if field.default is dataclasses.MISSING}
    group: argparse.ArgumentParser | argparse._ArgumentGroup = parser
    for name, (setting, value) in flags_of(owner).items():
        if setting.name in leave_out:
            continue
        if groups and setting.name in groups:
            group = parser.add_argument_group(*groups[setting.name])
        if value is not None:
            both = setting.default is None and value is False
            text = f"the opposite of --{setting.name}" if both else setting.help
            group.add_argument(f"--{name}", action="store_const", const=value, dest=setting.name, help=text)
            continue
        default = setting.default
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        shown = f"{default:g}" if isinstance(default, float) else shown
        group.add_argument(
            f"--{name}",
            required=name in required,
            type=setting.type,
            choices=setting.choices,
            nargs="+" if setting.several else None,
            help=setting.help + ("" if shown in (None, "") else f" (default: {shown})"),
        )
