"""``vs2 report``: makes a page, a Markdown table and figures from results files."""

from __future__ import annotations

import argparse
from pathlib import Path

from vs2_plugin.cli.common import AGAIN, Commands
from vs2_plugin.messages import complain, say

__all__ = ["add_report"]

_DESCRIPTION = """\
Turn clip_benchmark's result files (of steered and of plain models) into one page that opens from disk
(index.html), a Markdown table (report.md) and figures (PNG). Changes are over the plain model of the same
backbone, weights and data set: give its results too, unless the steered ones were evaluated with VS2_PER_IMAGE=1
and contain them. With such per-image results there are confidence intervals, images mended and broken, classes,
calibration, accuracy by FVU, time and memory."""

_EXAMPLES = """\
examples:
  VS2_PER_IMAGE=1 clip_benchmark eval --model ViT-B-32 vs2:ViT-B-32 vs2:ViT-B-32@gate=0.99 \\
      --pretrained laion2b_s34b_b79k --dataset cifar100 --output 'results/{model}.json'
  vs2 report results
  vs2 report results/*.json elsewhere/cub.json --out cifar-and-cub
"""


def add_report(commands: Commands) -> None:
    """Add ``vs2 report``."""
    report = commands.add_parser(
        "report",
        help="a page, a Markdown table and figures from clip_benchmark's result files",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
    )
    report.add_argument(
        "results", nargs="+", type=Path, metavar="RESULTS", help="result files, or folders that are searched for *.json"
    )
    report.add_argument("--out", type=Path, default=Path("report"), help="folder to write (default: %(default)s)")
    report.add_argument("--quiet", action="store_true", help="print nothing but errors")
    report.set_defaults(run=_report, interrupted=AGAIN)


def _report(args: argparse.Namespace) -> None:
    from vs2_plugin.report.page import notes, write
    from vs2_plugin.results.runs import read

    runs, passed_over = read(args.results)
    written = write(runs, args.out)
    if args.quiet:
        return
    for reason in passed_over:
        complain(f"vs2: skipped {reason}")
    for note in notes(runs):
        complain(f"vs2: warning: {note}")
    say(f"{len(runs)} result(s), {sum(run.images is not None for run in runs)} with per-image results")
    figures = [path for path in written if path.suffix == ".png"]
    others = [str(path) for path in written if path not in figures]
    say(f"wrote {', '.join(others)} and {len(figures)} figure(s) beside them")
