"""``vs2 classify``: classifies folders of photos and writes a table of predictions."""

from __future__ import annotations

import argparse

from vs2_plugin.classify.request import ClassifyRequest
from vs2_plugin.cli.common import Commands, add_flags, load_torch, request_of
from vs2_plugin.messages import complain, say
from vs2_plugin.text import counted

__all__ = ["add_classify"]

#: Most classes whose counts are printed.
_SHOWN = 10

_DESCRIPTION = """\
Classify photos with a steered CLIP, without labels, and write a table: for each image its path, class and probability,
the next four classes, the class and probability without steering, whether steering changed the class, the share of
variance that the SAE leaves unexplained (fvu), whether the gate let the image be steered, and for an image that cannot
be read, why.

If there is no SAE for the photos yet, one is trained first, without labels: on --train_images, else on the photos
themselves (transductive). Rows are saved as they come: after an interruption, run the same command to continue."""

_EXAMPLES = """\
examples:
  vs2 classify photos --model vs2s:ViT-B-32 --pretrained laion2b_s34b_b79k --classes cat,dog
  vs2 classify photos more/one.jpg --model vs2s:ViT-B-32 --pretrained laion2b_s34b_b79k --classes classes.txt \\
      --prompts prompts.txt --train_images collection --out predictions.parquet --page predictions.html

The same from Python: model.classify(images); see help(vs2_plugin.load).
"""


def add_classify(commands: Commands) -> None:
    """Add ``vs2 classify``."""
    command = commands.add_parser(
        "classify",
        help="folders of photos in, a table of predictions out, with steering and without",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        argument_default=argparse.SUPPRESS,
    )
    command.add_argument("photos", nargs="+", metavar="PHOTOS", help="image files, and folders with their subfolders")
    add_flags(command, ClassifyRequest)
    command.add_argument("--quiet", action="store_true", default=False, help="print nothing but errors")
    command.set_defaults(run=_classify, interrupted="; finished rows are kept: run the same command to continue")


def _classify(args: argparse.Namespace) -> None:
    request = request_of(ClassifyRequest, args, photos=tuple(args.photos))
    load_torch()
    from vs2_plugin.classify.plan import make_plan
    from vs2_plugin.classify.run import classify

    plan = make_plan(request)
    report = (lambda line: None) if args.quiet else say
    report(f"{counted(len(plan.images), 'image')}, {len(plan.classes)} classes{plan.images.skipped}")
    summary = classify(plan, report, args.quiet)
    if summary.unreadable:
        complain(f"vs2: {counted(summary.unreadable, 'image')} could not be read; the column error says why")
    if summary.images:
        report(
            f"steering changed the class of {summary.changed:,} of {counted(summary.images, 'image')} "
            f"({summary.changed / summary.images:.1%})"
        )
    most = summary.classes.most_common(_SHOWN)
    for name, count in most:
        report(f"{count:>7,}  {name}")
    if len(summary.classes) > len(most):
        rest = summary.images - sum(count for _, count in most)
        report(f"{rest:>7,}  in {len(summary.classes) - len(most):,} other classes")
    for path in summary.written:
        report(f"wrote {path}")
