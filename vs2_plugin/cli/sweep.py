"""``vs2 sweep``: every point of a grid of model strings, from one encoding of the test split."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from typing import TYPE_CHECKING

from vs2_plugin.cli.common import is_interruption, load_torch
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
  @rule=majority,query      a list; so for words, blocks (@blocks=10,11,10+11), N (@n=10,25,50,100) and gates
  @sae-k32,sae-k64          a list of checkpoints, in the checkpoint's place: so is k swept

{_TUNING}

What costs what: at the last block (the default) and at the output embedding, a point costs a steering and a
projection per image, and points that differ only in gamma, lam and alpha but have the same alpha = lam*(gamma-1)
are evaluated once. Before the last block the tower runs again from there, once per point: with 12 blocks, block 10
costs about a twelfth of an encoding per point, block 0 a whole one; and the features of every such point (images x
width of the embedding) are in memory at once. Kept in memory: the activations of all images (images x width).

Written beside each other: the results of each point and of the plain model (as clip_benchmark writes them, so that
clip_benchmark build and vs2 report read them), a table (sweep.csv), and a heat map or a curve for each model string
with several values. A sweep keeps no per-image results, whatever VS2_PER_IMAGE says: for those of single points, run
VS2_PER_IMAGE=1 clip_benchmark eval."""

_EXAMPLES = """\
examples:
  vs2 sweep --model vs2:ViT-B-32-quickgelu@gamma=1:3:0.1@lam=0:10:0.5 --pretrained openai \\
      --dataset cifar100 --dataset_root root
  vs2 sweep --model vs2pp:ViT-B-32-quickgelu@n=10,25,50,100@rule=majority,query vs2:ViT-B-32-quickgelu@gate=0.9,0.99 \\
      --pretrained openai --dataset cifar100 --dataset_root root
  vs2 report sweep

The store of checkpoints is $VS2_STORE, else in the platform's cache folder.
"""


def add_sweep(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command. Settings have clip_benchmark's names and defaults."""
    sweep = commands.add_parser(
        "sweep",
        help="evaluate a grid of strengths, neighbours, gates, blocks or checkpoints, encoding the images once",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, usual = sweep.add_argument, SweepRequest
    add("--model", nargs="+", required=True, metavar="MODEL", help="model strings, with ranges and lists")
    add("--pretrained", default=usual.pretrained, help="open_clip's weights tag or file (default: %(default)s)")
    add("--dataset", required=True, help="a data set of clip_benchmark; wds/NAME for webdataset shards")
    add("--dataset_root", default=usual.dataset_root, help="its folder; {dataset} is filled in (default: %(default)s)")
    add("--split", "--test_split", default=usual.split, help="the split under evaluation (default: %(default)s)")
    add("--batch_size", type=_positive, default=usual.batch_size,
        help="results depend on it in the last digits (default: %(default)s)")  # fmt: skip
    add("--num_workers", type=int, default=usual.num_workers, help="processes that load images (default: %(default)s)")
    add("--no_amp", dest="amp", action="store_false", help="no autocast: float32 throughout")
    add("--seed", type=int, default=usual.seed, help="for random weights (default: %(default)s)")
    add("--language", default=usual.language, help="of class names and prompts (default: %(default)s)")
    add("--custom_classname_file", help="JSON file: data set -> class names")
    add("--custom_template_file", help="JSON file: data set -> prompts")
    add("--model_cache_dir", help="where downloaded models are kept")
    add("--wds_cache_dir", help="where downloaded shards are kept")
    add("--output", default=usual.output, help="results files (default: %(default)s)")
    add("--skip_existing", action="store_true", help="keep the results that are there: goes on after an interruption")
    add("--quiet", action="store_true", help="print nothing but errors")
    sweep.set_defaults(run=_sweep, interrupted="; nothing was written: the same command starts again")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def _sweep(args: argparse.Namespace) -> int:
    load_torch()
    from vs2_plugin.harness.patches import PER_IMAGE
    from vs2_plugin.sweep.run import plan, sweep

    settings = {one.name for one in dataclasses.fields(SweepRequest)} & vars(args).keys()
    planned = plan(SweepRequest(**{name: getattr(args, name) for name in settings}))
    if not args.quiet and os.environ.get(PER_IMAGE, "") not in ("", "0"):
        print(
            f"vs2: a sweep keeps no per-image results; {PER_IMAGE}=1 clip_benchmark eval does, for the points you name",
            file=sys.stderr,
        )
    if not args.quiet:
        there = len(planned.files) - len(planned.pending)
        plain = len(planned.backbones)
        print(f"{len(planned.points)} point(s) and {plain} plain model(s); {there} have results already")
    try:
        found = sweep(planned, args.quiet)
    except (KeyboardInterrupt, RuntimeError) as error:
        if not is_interruption(error):
            raise
        print(f"\nvs2: interrupted; {_left(planned)}", file=sys.stderr)
        return 130
    if not args.quiet:
        for backbone, accuracy in found.plain.items():
            print(f"zero-shot {backbone}: {accuracy:.2f} %")
        print(f"best of {len(planned.points)}: {found.best[1]:.2f} % by {found.best[0]}")
        print(_TUNING if args.split == "test" else "Report the accuracy of that choice on images that did not make it.")
        for path in (planned.folder, *found.written):
            print(f"wrote {path}")
    return 0


def _left(planned: Plan) -> str:
    """Say what an interrupted sweep has left, and how to go on."""
    kept = len(planned.files) - len(planned.pending)
    if len(planned.results) <= kept:
        there = f"nothing was added to {counted(kept, 'result')} in {planned.folder}" if kept else "nothing was written"
        return f"{there}: all points are evaluated together, in one pass of the images; the same command starts again"
    written = f"{len(planned.results)} of {len(planned.files)} results are in {planned.folder}"
    older = sum(planned.files[model].exists() for model in planned.pending if model not in planned.results)
    hint = f" (it keeps {counted(older, 'older result')} there, too: remove what is out of date)" if older else ""
    return f"{written}; to go on, give the same command with --skip_existing{hint}"
