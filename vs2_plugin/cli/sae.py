"""``vs2 sae``: measures SAEs as dictionaries, and shows the figures as text and on a page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vs2_plugin.checkpoint.store import Store
from vs2_plugin.cli.common import AGAIN, Commands, add_store_option, load_torch, refuse_silence
from vs2_plugin.data.labels import read_names
from vs2_plugin.errors import SettingError
from vs2_plugin.messages import say

if TYPE_CHECKING:
    from vs2_plugin.quality.page import Quality

__all__ = ["add_sae"]

_DESCRIPTION = """\
Measure SAEs: explained variance in and out of domain, active, dead and dense latents, how much of the zero-shot
predictions the reconstruction keeps, how well a few latents tell classes apart, monosemanticity, how close the
decoder's directions are to each other and, for several SAEs, how well they agree. Reads the activations of the training
images, which the checkpoint keeps, and no test image. A figure that needs more says what it needs."""

_EXAMPLES = """\
examples:
  vs2 sae ViT-B-32-quickgelu_openai_cifar100
  vs2 sae ViT-B-32-quickgelu_openai_cifar100 --dataset cifar100 --dataset_root root --out quality
  vs2 sae mine-seed0 mine-seed1 mine-seed2 --elsewhere ViT-B-32-quickgelu_openai_food101
  vs2 sae mine --activations X.npy --labels y.npy --json
"""


def add_sae(commands: Commands) -> None:
    """Add ``vs2 sae``."""
    command = commands.add_parser(
        "sae",
        help="how good an SAE is: its figures, what they mean, and typical values",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
    )
    add = command.add_argument
    add("names", nargs="+", metavar="NAME", help="checkpoints, their folders, or hf:OWNER/NAME; several are compared")
    add_store_option(command)
    add("--block", type=int, help="the block whose SAE is measured, if a checkpoint has several (default: the last)")
    add("--variant", choices=("plain", "pass"), default="plain", help="the plain SAE, or the PASS SAE")
    add("--elsewhere", metavar="NAME", help="another data set: a checkpoint of the same tower, whose activations are "
        "used, or a file of them (NAME.npy, NAME.safetensors)")  # fmt: skip
    add("--dataset", help="the data set whose classes and prompts are used to measure the predictions kept")
    add("--dataset_root", default="root", help="where it is; {dataset} is filled in (default: %(default)s)")
    add("--classes", type=Path, metavar="FILE", help="class names, one per line, in place of the data set's")
    add("--activations", type=Path, metavar="FILE", help="activations to use instead of those that the checkpoint "
        "keeps: NAME.npy or NAME.safetensors, [count, width]")  # fmt: skip
    add("--labels", type=Path, metavar="FILE", help="their labels: NAME.npy, whole numbers [count]")
    add("--model_cache_dir", help="where downloaded models are kept")
    add("--wds_cache_dir", help="where downloaded shards are kept")
    add("--json", action="store_true", help="print all figures as JSON")
    add("--out", type=Path, help="folder for a page (index.html) and quality.json; default: no files")
    add("--quiet", action="store_true", help="print nothing but errors; needs --out")
    command.set_defaults(run=_run, interrupted=AGAIN)


def _run(args: argparse.Namespace) -> None:
    _check(args)
    load_torch()
    import torch

    from vs2_plugin.quality.measure import keep, measure, stability
    from vs2_plugin.quality.page import Quality, require_page_place
    from vs2_plugin.quality.subject import open_elsewhere, open_subject, require_comparable
    from vs2_plugin.quality.tower import open_zero_shot

    if args.out is not None:
        require_page_place(args.out)
    store, device = Store.default(args.store), "cuda" if torch.cuda.is_available() else "cpu"
    classes = args.classes and read_names(args.classes)
    subjects = [
        open_subject(name, store, args.block, args.variant, args.activations, args.labels) for name in args.names
    ]
    require_comparable(subjects)
    elsewhere = None if args.elsewhere is None else open_elsewhere(args.elsewhere, store, subjects[0])
    zero_shots = open_zero_shot(
        subjects, args.dataset, args.dataset_root, classes, args.model_cache_dir, args.wds_cache_dir
    )
    saes = [measure(one, elsewhere, zero_shot, device) for one, zero_shot in zip(subjects, zero_shots, strict=True)]
    quality = Quality(saes, *stability(saes))
    recorded = [sae.subject.name for sae, zero_shot in zip(saes, zero_shots, strict=True) if keep(sae, zero_shot)]
    _tell(args, quality, recorded)


def _tell(args: argparse.Namespace, quality: Quality, kept: list[str]) -> None:
    """Print the figures, then write the page; in this order, since writing may fail."""
    from vs2_plugin.quality.page import write_page

    words = not args.quiet and not args.json
    lines = list(quality.lines()) if words else [] if args.quiet else quality.json().splitlines()
    if words and kept:
        lines.append(f"the zero-shot predictions kept are recorded for the model card of {', '.join(kept)}")
    for line in lines:
        say(line)
    for path in [] if args.out is None else write_page(quality, args.out):
        if words:
            say(f"wrote {path}")


def _check(args: argparse.Namespace) -> None:
    """Raise SettingError for flags that contradict each other, or a name given twice."""
    refuse_silence(args)
    if args.labels is not None and args.activations is None:
        raise SettingError("--labels belong to --activations, which are missing; the checkpoint's own labels are read "
                           "automatically if it was trained with --gallery_labels")  # fmt: skip
    twice = next((name for number, name in enumerate(args.names) if name in args.names[:number]), None)
    if twice is not None:
        raise SettingError(f"{twice} is given twice; expected each SAE once")
