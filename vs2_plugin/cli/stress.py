"""``vs2 stress``: evaluates models where classes are absent, imbalanced or few, or a stream is ordered."""

from __future__ import annotations

import argparse

from vs2_plugin.cli.common import Commands, add_flags, load_torch, request_of
from vs2_plugin.messages import say
from vs2_plugin.names import split
from vs2_plugin.stress.request import StressRequest

__all__ = ["add_stress"]

_DESCRIPTION = """\
Evaluate models on subsets of the test images: of some classes only, long-tailed, few; and, where a method sees a
stream of images, class by class. Each image is encoded once. Models still choose among all classes, and
methods that learn from the checkpoint's gallery keep all of it: only the test images change.

Every number is compared with the plain model's on the same images. Methods that see all test images at once, or a
stream of them, are run again on each subset; for the others, a subset changes only which images count."""

_EXAMPLES = """\
example:
  vs2 stress --model vs2:ViT-B-32@alpha=auto dn:ViT-B-32 --pretrained laion2b_s34b_b79k --dataset cifar100
"""


def add_stress(commands: Commands) -> None:
    """Add ``vs2 stress``. Settings have clip_benchmark's names and defaults."""
    stress = commands.add_parser(
        "stress",
        help="evaluate models where classes are absent, imbalanced or few, or a stream is ordered",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        argument_default=argparse.SUPPRESS,
    )
    add_flags(stress, StressRequest)
    stress.add_argument("--quiet", action="store_true", default=False, help="print nothing but errors")
    stress.set_defaults(run=_stress, interrupted="; nothing was written: run the same command again")


def _stress(args: argparse.Namespace) -> None:
    load_torch()
    from vs2_plugin.stress.outcomes import AXES, means
    from vs2_plugin.stress.run import stress

    outcomes, written = stress(request_of(StressRequest, args), args.quiet)
    if args.quiet:
        return
    averages = means(outcomes)
    columns = list(dict.fromkeys(key[1:] for key in averages))
    names = {key[0]: f"{split(key[0]).label} ({mean.outcomes[0].protocol})" for key, mean in averages.items()}
    width = max(44, *map(len, names.values()))
    say("top-1 accuracy, %, and its change over zero-shot on the same images (standard deviation over draws)")
    for axis, value in columns:
        say("")
        say(f"{AXES.get(axis, 'all test images')}{value and f': {value}'}")
        for (model, *at), mean in averages.items():
            if at != [axis, value]:
                continue
            spread = "" if mean.spread is None else f" ({100 * mean.spread:.1f})"
            change = "" if split(model).label == "zero-shot" else f"{100 * mean.change:+6.1f}{spread}"
            say(f"  {names[model]:<{width}} {100 * mean.accuracy:5.1f}  {change}".rstrip())
    say("")
    for path in written:
        say(f"wrote {path}")
