"""``vs2 sweep``: evaluates every point of a grid of model strings, encoding the test split once."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from vs2_plugin.cli.common import Commands, add_flags, load_torch, request_of
from vs2_plugin.messages import complain, say
from vs2_plugin.sweep.request import SweepRequest
from vs2_plugin.text import counted

if TYPE_CHECKING:
    from vs2_plugin.sweep.run import Plan

__all__ = ["add_sweep"]

_TUNING = (
    "Choosing a strength by its accuracy on the test split is tuning on test data: choose on another split "
    "(--split), and report the test figure of that choice."
)

_DESCRIPTION = f"""\
Evaluate every point of a grid of model strings. The images run once through the plain tower, whatever the number
of points, and every number is the one that clip_benchmark eval reports for that model string.

In a model string of --model, an option may have several values:
  @gamma=1:3:0.1            START:STOP:STEP, the stop included
  @rule=majority,query      a list; the same for words, blocks (@blocks=10,11,10+11), N (@n=10,25,50,100) and gates
  @sae-k32,sae-k64          a list of checkpoints, in place of the checkpoint: to sweep k

{_TUNING}

Costs: at the last block (the default) and at the output embedding, a point costs one steering and one
projection per image, and points that differ only in gamma, lam and alpha but have the same alpha = lam*(gamma-1)
are evaluated once. Before the last block the tower runs again from there, once per point: with 12 blocks, block 10
costs about a twelfth of an encoding per point, block 0 a whole one; and the features of every such point (images x
width of the embedding) are in memory at once. Kept in memory: the activations of all images (images x width).

Written to one folder: the results of each point and of the plain model (as clip_benchmark writes them, so that
clip_benchmark build and vs2 report read them), a table (sweep.csv), and a heat map or a curve for each model string
with several values. A sweep keeps no per-image results, whatever VS2_PER_IMAGE says: for those of individual points,
run VS2_PER_IMAGE=1 clip_benchmark eval."""

_EXAMPLES = """\
examples:
  vs2 sweep --model vs2:ViT-B-32-quickgelu@gamma=1:3:0.1@lam=0:10:0.5 --pretrained openai \\
      --dataset cifar100 --dataset_root root
  vs2 sweep --model vs2pp:ViT-B-32-quickgelu@n=10,25,50,100@rule=majority,query vs2:ViT-B-32-quickgelu@gate=0.9,0.99 \\
      --pretrained openai --dataset cifar100 --dataset_root root
  vs2 report sweep

The store of checkpoints is $VS2_STORE, else in the platform's cache folder.
"""


def add_sweep(commands: Commands) -> None:
    """Add ``vs2 sweep``. Settings have clip_benchmark's names and defaults."""
    sweep = commands.add_parser(
        "sweep",
        help="evaluate a grid of strengths, neighbours, gates, blocks or checkpoints, encoding the images once",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        argument_default=argparse.SUPPRESS,
    )
    add_flags(sweep, SweepRequest)
    sweep.add_argument("--test_split", dest="split", help="the same as --split")
    sweep.add_argument("--quiet", action="store_true", default=False, help="print nothing but errors")
    sweep.set_defaults(run=_sweep, interrupted="; nothing was written: run the same command again")


def _sweep(args: argparse.Namespace) -> None:
    load_torch()
    from vs2_plugin.harness.patches import PER_IMAGE
    from vs2_plugin.sweep.figures import and_others
    from vs2_plugin.sweep.run import plan, sweep

    request = request_of(SweepRequest, args)
    planned = plan(request)
    if not args.quiet and os.environ.get(PER_IMAGE, "") not in ("", "0"):
        complain(
            f"vs2: a sweep keeps no per-image results; {PER_IMAGE}=1 clip_benchmark eval does, for the points you name"
        )
    report = (lambda line: None) if args.quiet else say
    existing, plain = len(planned.files) - len(planned.pending), len(planned.backbones)
    report(f"{len(planned.points)} point(s) and {plain} plain model(s); {existing} have results already")
    try:
        outcome = sweep(planned, args.quiet)
    except BaseException:
        args.interrupted = f"; {_left(planned)}"
        raise
    for backbone, value in outcome.plain.items():
        report(f"zero-shot {backbone}: {value:.2f} % {outcome.measure}")
    best, *others = outcome.models
    report(f"best of {len(planned.points)}: {outcome.best:.2f} % by {best}{and_others(others)}")
    other = f"Report the {outcome.measure} of that choice on other images: it was made on these."
    report(_TUNING if request.split == "test" else other)
    for path in (planned.folder, *outcome.written):
        report(f"wrote {path}")


def _left(planned: Plan) -> str:
    """Return in words which results an interrupted sweep has written, and how to continue."""
    done = len(planned.files) - len(planned.pending)
    if len(planned.results) <= done:
        state = f"nothing was added to {counted(done, 'result')} in {planned.folder}" if done else "nothing was written"
        return f"{state}: all points are evaluated together, in one pass over the images; run the same command again"
    written = f"{len(planned.results)} of {len(planned.files)} results are in {planned.folder}"
    older = sum(planned.files[model].exists() for model in planned.pending if model not in planned.results)
    hint = f" (it keeps {counted(older, 'older result')} there, too: remove what is out of date)" if older else ""
    return f"{written}; to continue, run the same command with --skip_existing{hint}"
