"""``vs2 new-plugin``: writes a starter package for a method of one's own."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from vs2_plugin.cli.common import Commands
from vs2_plugin.messages import say

__all__ = ["add_new_plugin"]


def add_new_plugin(commands: Commands) -> None:
    """Add ``vs2 new-plugin``."""
    command = commands.add_parser(
        "new-plugin", help="write a starter package for a method of your own",
        epilog="example: vs2 new-plugin mine && cd vs2-mine && pip install -e '.[test]' && pytest",
    )  # fmt: skip
    command.add_argument("name", metavar="NAME", help="name of the method: lower-case letters, digits and '_'")
    command.add_argument("folder", metavar="DIR", nargs="?", type=Path, help="folder, new or empty (default: vs2-NAME)")
    command.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from vs2_plugin.new_plugin import new_plugin

    paths = new_plugin(args.name, args.folder)
    for path in paths:
        say(f"wrote {path}")
    say(f"next: cd {shlex.quote(str(paths[0].parent))} && pip install -e '.[test]' && pytest")
