"""``vs2 reproduce``: trains and evaluates the paper's tables, and compares them with the published numbers."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vs2_plugin.checkpoint.store import ENVIRONMENT_VARIABLE
from vs2_plugin.cli.common import Commands, load_torch, make_folder
from vs2_plugin.messages import complain, say

if TYPE_CHECKING:
    from vs2_plugin.reproduce.cells import Table
    from vs2_plugin.reproduce.run import Reproduction

__all__ = ["add_reproduce"]

_DESCRIPTION = """\
Measure the tables and figures of arXiv 2506.01247, or your own: train the SAEs that are missing, evaluate with the
stock clip_benchmark, and print the published value, the measured one and the difference for every cell. One YAML file
is one table; those of the paper come with the package and are called by name; the README.md beside them says how to
write one.

Every command that is run is printed, and can be typed by hand. Nothing is done twice: checkpoints are found by their
settings, results by the digest of their checkpoint. After an interruption, run the same command to continue. What
cannot be downloaded is reported once, with how to get it, and everything else is measured; the exit code is then 1.

With --stand_in digits all of it runs offline in minutes, on the tiny CLIP and the handwritten digits that come with the
package. That shows that the file works; it says nothing about the paper."""

_EXAMPLES = """\
examples:
  vs2 reproduce paper --list
  vs2 reproduce main_accuracy --dataset_root "root/{dataset}" --dry_run
  vs2 reproduce main_accuracy --dataset_root "root/{dataset}"
  vs2 reproduce paper --stand_in digits
  vs2 reproduce mine.yaml
  vs2 report vs2-reproduce/results

The store of checkpoints is $VS2_STORE, else in the platform's cache folder; for the stand-in, it is in --out.
"""


def add_reproduce(commands: Commands) -> None:
    """Add ``vs2 reproduce``."""
    parser = commands.add_parser(
        "reproduce",
        help="the paper's tables: train what is missing, evaluate, compare with the published numbers",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
    )
    add = parser.add_argument
    add(
        "files",
        nargs="+",
        type=Path,
        metavar="TABLE",
        help="tables of the paper by name (main_accuracy; paper: all of them), files, or folders of them",
    )
    add("--out", type=Path, default=Path("vs2-reproduce"), help="folder of results and tables (default: %(default)s)")
    add(
        "--dataset_root",
        default="root/{dataset}",
        help="where data sets are, or are downloaded to; {dataset} is filled in (default: %(default)s)",
    )
    add("--stand_in", choices=["digits"], help="run offline, on what comes with the package in place of the paper's")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="list the cells; run nothing")
    what.add_argument("--dry_run", action="store_true", help="print the commands that are still to be run; run nothing")
    add("--quiet", action="store_true", help="print the tables only")
    parser.set_defaults(run=_reproduce)


def _reproduce(args: argparse.Namespace) -> int:
    from vs2_plugin.reproduce.listing import listing
    from vs2_plugin.reproduce.reading import read_all
    from vs2_plugin.reproduce.stand_in import ROOT, stand_in, workplace

    tables = read_all(args.files)
    if args.stand_in:
        tables = [stand_in(table) for table in tables]
    if args.list:
        for line in listing(tables):
            say(line)
        return 0
    if not args.dry_run:
        make_folder(args.out)
    load_torch()
    from vs2_plugin.harness.patches import PER_IMAGE
    from vs2_plugin.reproduce.command import surroundings

    if not args.stand_in:
        with surroundings(Path(), variables := {PER_IMAGE: "1"}):
            return _work(args, tables, args.out, args.dataset_root, variables)
    folder = workplace(args.out, write=not args.dry_run)
    with surroundings(folder, variables := {ENVIRONMENT_VARIABLE: "store", PER_IMAGE: "1"}):
        return _work(args, tables, Path(), ROOT, variables)


def _work(
    args: argparse.Namespace,
    tables: Sequence[Table],
    out: Path,
    dataset_root: str,
    variables: Mapping[str, str],
) -> int:
    from vs2_plugin.data.naming import DataSet
    from vs2_plugin.reproduce.run import Reproduction

    def report(line: str) -> None:
        if not args.quiet:
            for part in line.split("\n"):
                say(part)

    DataSet.of("cifar100", dataset_root)  # a wrong root is refused before the first training
    work = Reproduction(tables, out, dataset_root, args.quiet, report)
    if args.stand_in:
        report(f"cd {args.out}   # the tiny CLIP and the digits are written there")
    report("export " + " ".join(f"{name}={value}" for name, value in variables.items()))
    if args.dry_run:
        for line in work.commands():
            say(line)
        return 0
    args.interrupted = f"; finished work is kept in {args.out} and in the store: run the same command to continue"
    work.run()
    return _tell(args, work, report)


def _tell(args: argparse.Namespace, work: Reproduction, report: Callable[[str], None]) -> int:
    """Print the tables and the reasons for missing cells, and return the exit code."""
    texts, missing = work.finish()
    for text in texts:
        for line in ("", *text.splitlines()):
            say(line)
    total = sum(cell.is_wanted for table in work.tables for cell in table.cells)
    if missing:
        advice = (
            "the others are kept; run the same command to continue" if missing < total else "no number was found"
        )
        complain(f"vs2: {missing} of {total} cells could not be measured (the reasons are above); {advice}")
        for remedy, reasons in work.missing().items():
            for reason in reasons:
                complain(f"- {reason}")
            complain(f"=> {remedy}")
    has_results = any(work.out.glob("results/*/*.json"))
    behind = f"; a page with all results: vs2 report {args.out / 'results'}" if has_results else ""
    report(f"\nThe tables are in {args.out}, as .md and .json and on one page, index.html{behind}")
    return 1 if missing else 0
