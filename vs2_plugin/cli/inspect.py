"""``vs2 inspect``: shows what steering did to images, latent by latent. Also the flags shared with ``vs2 latents``."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vs2_plugin.cli.common import AGAIN, Commands, load_torch, refuse_silence
from vs2_plugin.data.labels import read_lines, read_names
from vs2_plugin.inspection.notes import ATTRIBUTION, TOP_IMAGES, WORDS
from vs2_plugin.messages import complain, say

if TYPE_CHECKING:
    from vs2_plugin.inspection.findings import Finding
    from vs2_plugin.inspection.subject import Subject

__all__ = ["add_inspect", "add_subject", "positive", "say_problems", "subject_of"]

_DESCRIPTION = """\
Show what steering did to images: the classes before and after, the FVU and the gate's decision, and what each active
latent contributed, with the training images that activate it most and the words it is nearest to. For methods
that look up neighbours: the neighbours, too. All in float32; clip_benchmark's default is autocast, so its numbers may
differ in the last digits."""

_EXAMPLES = """\
examples:
  vs2 inspect --model vs2:ViT-B-32-quickgelu --pretrained openai --dataset cifar100 --dataset_root root photo.jpg
  vs2 inspect --model vs2:ViT-B-32-quickgelu@gate=0.99 --pretrained openai --dataset cifar100 --dataset_root root \\
      photo.jpg other.png --concepts words.txt --out inspect
"""


def add_inspect(commands: Commands) -> None:
    """Add ``vs2 inspect``."""
    command = commands.add_parser(
        "inspect",
        help="what steering did to images, latent by latent",
        description=_DESCRIPTION,
        epilog=f"{_EXAMPLES}\n{ATTRIBUTION}\n\n{WORDS}",
    )
    add = command.add_argument
    add("images", nargs="+", type=Path, metavar="IMAGE", help="image files")
    add_subject(command)
    add("--top", type=positive, default=5, help="classes shown, before and after (default: %(default)s)")
    add("--latents", type=positive, default=8, help="latents shown for each image and site (default: %(default)s)")
    add("--out", type=Path, help="folder for a page with pictures (index.html); default: no page")
    add("--quiet", action="store_true", help="print nothing but errors; needs --out")
    command.set_defaults(run=_run, interrupted=AGAIN)


def _run(args: argparse.Namespace) -> None:
    refuse_silence(args)
    load_torch()
    from vs2_plugin.inspection.findings import inspect_images
    from vs2_plugin.inspection.pages import require_inspection_place, write_inspection
    from vs2_plugin.inspection.pictures import read_image
    from vs2_plugin.model.explanation import require_explainable
    from vs2_plugin.modelstring import parse

    require_explainable(parse(args.model))  # refused before anything is loaded
    if args.out is not None:
        require_inspection_place(args.out)
    images = [read_image(path) for path in args.images]
    inspection = inspect_images(subject_of(args), images, top=args.top, latents=args.latents)
    if not args.quiet:
        for name, value in inspection.title:
            say(f"{name}: {value}")
        for finding in inspection.findings:
            for line in ("", *_lines(finding)):
                say(line)
        say_problems(inspection.problems)
    if args.out is not None:
        for path in write_inspection(inspection, args.out):
            if not args.quiet:
                say(f"wrote {path}")


def _lines(finding: Finding) -> Iterator[str]:
    """Yield the printed lines of one image."""
    yield finding.name
    yield from (f"  {line}" for line in finding.lines())
    if finding.neighbours is not None:
        yield f"  {finding.neighbours.about}"
        nearest = finding.neighbours.images[:TOP_IMAGES]
        yield "    " + ", ".join(f"{image.side} {image.label} {image.similarity:.2f}".strip() for image in nearest)


def positive(text: str) -> int:
    """Parse a whole number from 1 to 999,999,999, for argparse. Raises ValueError for other texts."""
    number = int(text)
    if not 1 <= number < 10**9:
        raise ValueError(text)
    return number


def add_subject(command: argparse.ArgumentParser) -> None:
    """Add the flags that name a model and a data set, with clip_benchmark's names and defaults."""
    add = command.add_argument
    add("--model", required=True, metavar="MODEL", help="model string: method:backbone[@checkpoint][@key=value]...")
    add("--pretrained", default="laion400m_e32", help="open_clip's weights tag or file (default: %(default)s)")
    add("--dataset", required=True, help="the data set whose classes and checkpoint are used; photos/ for a folder")
    add("--dataset_root", default="root", help="where it is; {dataset} is filled in (default: %(default)s)")
    add("--classes", type=Path, metavar="FILE", help="class names, one per line, in place of the data set's")
    add("--concepts", type=Path, metavar="FILE", help="words to compare latents with, one per line (default: classes)")
    add("--model_cache_dir", help="where downloaded models are kept")
    add("--wds_cache_dir", help="where downloaded shards are kept")


def subject_of(args: argparse.Namespace) -> Subject:
    """Load the model and data set that the command line names. Raises Vs2Error if that fails."""
    from vs2_plugin.inspection.subject import open_subject

    return open_subject(
        args.model, args.pretrained, args.dataset, args.dataset_root,
        concepts=args.concepts and read_lines(args.concepts, "--concepts", "one word"),
        classes=args.classes and read_names(args.classes),
        model_cache_dir=args.model_cache_dir, wds_cache_dir=args.wds_cache_dir, progress=not args.quiet,
    )  # fmt: skip


def say_problems(problems: Iterable[str]) -> None:
    """Print on stderr the sentences that say what could not be shown."""
    for problem in problems:
        complain(f"vs2: {problem}")
