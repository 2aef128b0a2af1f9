"""``vs2 data``: converts official archives of data sets that clip_benchmark does not have into shards that it reads."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from vs2_plugin.cli.common import AGAIN, Commands
from vs2_plugin.messages import say

__all__ = ["add_data"]

_DESCRIPTION = """\
Make webdataset shards, which clip_benchmark reads, of a data set as its authors distribute it. ARCHIVE is the archive
or the folder it was unpacked into; nothing is downloaded, and OUT is written completely or not at all. The tables of
vs2 reproduce look for root/cub200 and root/tiny_imagenet."""

_EXAMPLES = """\
examples:
  vs2 data cub CUB_200_2011.tgz root/cub200
  vs2 data tiny-imagenet tiny-imagenet-200.zip root/tiny_imagenet
"""
_HELP = {
    "cub": "CUB-200-2011: the official split, class names from the folders",
    "tiny-imagenet": "Tiny-ImageNet: its validation images are evaluated, since its test images have no labels",
}


def add_data(commands: Commands) -> None:
    """Add ``vs2 data``."""
    data = commands.add_parser(
        "data",
        help="make shards from the archives of CUB-200 and Tiny-ImageNet",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
    )
    sets = data.add_subparsers(dest="official", metavar="DATASET", required=True)
    for word, text in _HELP.items():
        parser = sets.add_parser(word, help=text, description=f"{text}. See: vs2 data --help")
        parser.add_argument("source", type=Path, metavar="ARCHIVE", help="the archive, or the unpacked folder")
        parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write the shards to")
        parser.set_defaults(run=_data, interrupted=AGAIN)


def _data(args: argparse.Namespace) -> None:
    from vs2_plugin.data.archives import OFFICIAL, convert

    official = OFFICIAL[args.official]
    written = convert(official, args.source, args.out)
    say(
        f"wrote {args.out}: {written.train:,} images to train on and {written.test:,} to evaluate, of "
        f"{written.classes:,} classes"
    )
    words = ["--dataset", official.dataset, "--dataset_root", str(args.out)]
    say(f"use it with {shlex.join(words)}")
    if args.out.name == official.dataset.removeprefix("wds/"):
        root = str(args.out.parent / "{dataset}")
        say(f"the paper's tables: vs2 reproduce paper --dataset_root {shlex.quote(root)}")
