"""``vs2 reproduce``: the tables of the paper, trained, evaluated and set beside the published numbers."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vs2_plugin.reproduce.cells import Cell, Table

__all__ = ["add_reproduce"]

_DESCRIPTION = """\
Measure the tables and figures of arXiv 2506.01247, or your own: train the SAEs that are missing, evaluate with the
stock clip_benchmark, and print published, measured and difference of every cell. One YAML file is one table; those
of the paper are in benchmark_configs/paper, whose README.md says how they are written.

Every command that is run is printed, and can be typed. What exists is not done again: checkpoints are found by their
settings, results by the digest of their checkpoint. After an interruption the same command goes on. What cannot be
fetched is told, a line per reason, and everything else is measured; the exit code is then 1.

With --stand_in digits all of it runs offline in minutes, on the tiny CLIP and the handwritten digits that come with the
package. That shows that the file works, and nothing about the paper."""

_EXAMPLES = """\
examples:
  vs2 reproduce benchmark_configs/paper --list
  vs2 reproduce benchmark_configs/paper/main_accuracy.yaml --dataset_root "root/{dataset}" --dry_run
  vs2 reproduce benchmark_configs/paper/main_accuracy.yaml --dataset_root "root/{dataset}"
  vs2 reproduce benchmark_configs/paper --stand_in digits
  vs2 report vs2-reproduce/results

The store of checkpoints is $VS2_STORE, else in the platform's cache folder; that of the stand-in is in --out.
"""


def add_reproduce(commands: argparse._SubParsersAction) -> None:
    """Add the sub-command."""
    made = commands.add_parser(
        "reproduce",
        help="the paper's tables: train what is missing, evaluate, compare with the published numbers",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("files", nargs="+", type=Path, metavar="FILE", help="tables, or folders of them")
    add("--out", type=Path, default=Path("vs2-reproduce"), help="folder of results and tables (default: %(default)s)")
    add(
        "--dataset_root",
        default="root/{dataset}",
        help="where data sets are and are fetched to; {dataset} is filled in (default: %(default)s)",
    )
    add("--stand_in", choices=["digits"], help="run offline, on what comes with the package in place of the paper's")
    what = made.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="list the cells; run nothing")
    what.add_argument("--dry_run", action="store_true", help="print the commands that are still to be run; run nothing")
    add("--quiet", action="store_true", help="print the tables only")
    made.set_defaults(run=_reproduce)


def _reproduce(args: argparse.Namespace) -> int:
    from vs2_plugin.reproduce.reading import read_all

    tables = read_all(args.files)
    if args.stand_in:
        from vs2_plugin.reproduce.stand_in import stand_in

        tables = [stand_in(table) for table in tables]
    if args.list:
        _list(tables)
        return 0
    if not args.stand_in:
        return _work(args, tables, args.out, args.dataset_root, {})
    from vs2_plugin.reproduce.stand_in import prepare

    out = args.out.absolute()
    if not args.dry_run:
        prepare(out)
    elif not out.is_dir():
        out = Path.cwd()
    with _inside(out):
        return _work(args, tables, Path(), "digits", {"VS2_STORE": "store"})


def _work(
    args: argparse.Namespace,
    tables: Sequence[Table],
    out: Path,
    dataset_root: str,
    environment: Mapping[str, str],
) -> int:
    from vs2_plugin.harness.patches import PER_IMAGE
    from vs2_plugin.reproduce.fetch import root_of
    from vs2_plugin.reproduce.run import Reproduction

    root_of("cifar100", dataset_root)
    environment = {**environment, PER_IMAGE: "1"}
    with _variables(environment):
        work = Reproduction(tables, out, dataset_root, _train(args.quiet), args.quiet)
        if not args.quiet:
            if args.stand_in:
                print(f"cd {args.out}   # the tiny CLIP and the digits are written there")
            print("export " + " ".join(f"{name}={value}" for name, value in environment.items()))
        if args.dry_run:
            for line in work.commands():
                print(line)
            return 0
        try:
            work.run()
        except KeyboardInterrupt:
            print(
                f"\nvs2: interrupted; what was done is kept in {args.out} and in the store: run the same command to "
                "go on",
                file=sys.stderr,
            )
            return 130
        missing = work.finish()
    total = sum(len(table.cells) for table in tables)
    if missing:
        kept = (
            "the others are kept, and the same command goes on from there" if missing < total else "no number was found"
        )
        print(f"vs2: {missing} of {total} cells could not be measured, the reasons are above; {kept}", file=sys.stderr)
    if not args.quiet:
        any_results = any(out.glob("results/*/*.json"))
        page = f"; a page with all results: vs2 report {args.out / 'results'}" if any_results else ""
        print(f"\nThe tables are in {args.out}, as .md and .json{page}")
    return 1 if missing else 0


def _train(quiet: bool):
    """What does a command of vs2-train-sae in this process, so that its bars are seen and its errors are known."""

    def train(words: Sequence[str]) -> None:
        from vs2_plugin.cli import train_sae
        from vs2_plugin.distributed import joined
        from vs2_plugin.training import run
        from vs2_plugin.training.request import TrainRequest

        args = train_sae.parser().parse_args([*words[1:], *(["--quiet"] if quiet else [])])
        with joined() as processes:
            run.train(TrainRequest(**vars(args)), processes, (lambda line: None) if quiet else print)

    return train


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Work in a folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def _variables(environment: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def _list(tables: Sequence[Table]) -> None:
    for table in tables:
        print(f"{table.path}: {table.title}, {len(table.cells)} cells")
        settings = [_settings(cell) for cell in table.cells]
        # A setting that does not differ is that of the table: said once.
        values: dict[str, set[str]] = {}
        for one in settings:
            for name, value in one.items():
                values.setdefault(name, set()).add(value)
        steered = sum(cell.sae is not None for cell in table.cells)
        common = {
            name
            for name, found in values.items()
            if len(found) == 1 and (name == "prompts" or sum(name in one for one in settings) == steered)
        }
        shared = [text for name in values if name in common for text in values[name]]
        if shared:
            print(f"  everywhere: {'; '.join(shared)}")
        for cell, mine in zip(table.cells, settings, strict=True):
            own = [text for name, text in mine.items() if name not in common]
            print(f"  {cell.row} / {cell.column}: {'; '.join([_what(cell), *own, *_published(cell)])}")


def _what(cell: Cell) -> str:
    """What a cell is a number of."""
    if cell.best_of:
        return f"the best {cell.metric} of the rows {', '.join(map(repr, cell.best_of))}"
    if cell.model is None:
        return "not run"
    which = {"fvu": "FVU of the SAE of", "gain": f"gain in class {cell.of_class!r} by"}
    if cell.metric == "gain" and cell.of_class is None:
        which["gain"] = "largest gain in any class by"
    model = f"{cell.model} ({cell.weights or 'own weights'})"
    return f"{which.get(cell.metric, f'{cell.metric} of')} {model} on {cell.dataset}"


def _published(cell: Cell) -> list[str]:
    if cell.published is None:
        return []
    ends = cell.published if isinstance(cell.published, tuple) else (cell.published,)
    return [f"published {' to '.join(map(str, ends))}"]


def _settings(cell: Cell) -> dict[str, str]:
    """What a cell is run with beside its model: setting -> in words."""
    if cell.model is None:
        return {}
    prompts = ", ".join(map(repr, cell.prompts)) or "those of clip_benchmark"
    made = {} if cell.metric == "fvu" else {"prompts": f"prompts: {prompts}"}
    if cell.sae is not None:
        made |= {name: f"SAE {name} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
                 for name, value in cell.sae.flags}  # fmt: skip
        if cell.sae.datasets != (cell.dataset,):
            made["trained on"] = f"SAE trained on {' '.join(cell.sae.datasets)}"
        made["seeds"] = f"seeds of the SAE {' '.join(map(str, cell.seeds))}"
    return made
