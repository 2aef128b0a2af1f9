"""``vs2 latents``: writes a page and a table of all latents of an SAE."""

from __future__ import annotations

import argparse
from pathlib import Path

from vs2_plugin.cli.common import AGAIN, Commands, load_torch
from vs2_plugin.cli.inspect import add_subject, positive, say_problems, subject_of
from vs2_plugin.inspection.notes import GROUPS, WORDS
from vs2_plugin.messages import say

__all__ = ["add_latents"]

_DESCRIPTION = """\
Look at a whole SAE: how many latents are dead, rare or dense, how often and how strongly they are active, how pure
their top-activating training images are by zero-shot class (and would be by chance), and a selection of latents with
those images and their nearest words. Writes a page that opens from disk (index.html) and a table of all latents
(latents.csv). Reads the gallery of the checkpoint once, in blocks."""

_EXAMPLES = """\
examples:
  vs2 latents --model vs2:ViT-B-32-quickgelu --pretrained openai --dataset cifar100 --dataset_root root
  vs2 latents --model vs2:ViT-B-32-quickgelu@blocks=10 --pretrained openai --dataset cifar100 --dataset_root root \\
      --concepts words.txt --limit 40 --out block-10
"""


def add_latents(commands: Commands) -> None:
    """Add ``vs2 latents``."""
    command = commands.add_parser(
        "latents",
        help="a page and a table of all latents of an SAE",
        description=_DESCRIPTION,
        epilog=f"{_EXAMPLES}\n{GROUPS}\n\n{WORDS}",
    )
    add_subject(command)
    add = command.add_argument
    add("--limit", type=positive, default=100, help="latents shown, a quarter in each group (default: %(default)s)")
    add("--out", type=Path, default=Path("latents"), help="folder to write (default: %(default)s)")
    add("--quiet", action="store_true", help="print nothing but errors")
    command.set_defaults(run=_run, interrupted=AGAIN)


def _run(args: argparse.Namespace) -> None:
    load_torch()
    from vs2_plugin.inspection.pages import require_survey_place, write_survey
    from vs2_plugin.inspection.survey import require_sae, survey_latents
    from vs2_plugin.modelstring import parse

    require_sae(parse(args.model))  # refused before anything is loaded
    require_survey_place(args.out)
    survey = survey_latents(subject_of(args), limit=args.limit)
    paths = write_survey(survey, args.out)
    if args.quiet:
        return
    for name, value in survey.title:
        say(f"{name}: {value}")
    say_problems(survey.problems)
    for path in paths:
        say(f"wrote {path}")
