"""``vs2``: the command line with all sub-commands; the demo and the doctor are added here."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from vs2_plugin import __version__
from vs2_plugin.checkpoint.store import Store
from vs2_plugin.cli.classify import add_classify
from vs2_plugin.cli.common import AGAIN, Command, add_store_option, end_well, make_folder
from vs2_plugin.cli.data import add_data
from vs2_plugin.cli.inspect import add_inspect
from vs2_plugin.cli.latents import add_latents
from vs2_plugin.cli.methods import add_methods
from vs2_plugin.cli.new_plugin import add_new_plugin
from vs2_plugin.cli.report import add_report
from vs2_plugin.cli.reproduce import add_reproduce
from vs2_plugin.cli.sae import add_sae
from vs2_plugin.cli.store import add_store
from vs2_plugin.cli.stress import add_stress
from vs2_plugin.cli.sweep import add_sweep

__all__ = ["main", "parser"]


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    command = Command(
        prog="vs2",
        description="SAE-steered CLIP models for clip_benchmark. Evaluate with clip_benchmark itself; "
        "train SAEs with vs2-train-sae.",
        epilog="examples:\n  vs2 demo\n  vs2 methods\n  vs2 doctor\n  vs2 report results\n  vs2 store list\n"
        "  vs2 classify photos --model vs2s:ViT-B-32-quickgelu --pretrained openai --classes cat,dog\n"
        "  vs2 sweep --model vs2:ViT-B-32-quickgelu@alpha=0:3:0.25 --pretrained openai --dataset cifar100\n"
        "  vs2 inspect --model vs2:ViT-B-32-quickgelu --pretrained openai --dataset cifar100 photo.jpg\n"
        "  vs2 latents --model vs2:ViT-B-32-quickgelu --pretrained openai --dataset cifar100\n"
        "  vs2 sae ViT-B-32-quickgelu_openai_cifar100\n"
        "  vs2 reproduce main_accuracy --stand_in digits\n"
        "  vs2 data cub CUB_200_2011.tgz root/cub200\n"
        "each command's --help shows more\n",
    )
    command.add_argument("--version", action="version", version=f"vs2-plugin {__version__}")
    commands = command.add_subparsers(dest="command", metavar="COMMAND", required=True)

    demo = commands.add_parser(
        "demo",
        help="a full run, offline: train an SAE, evaluate CLIP and VS2 on handwritten digits",
        epilog="examples: vs2 demo --out vs2-demo; vs2 demo --seed 0 1 2 3 4",
    )
    demo.add_argument("--out", type=Path, default=Path("vs2-demo"), help="folder to work in (default: %(default)s)")
    demo.add_argument(
        "--seed",
        type=int,
        nargs="+",
        default=[0],
        help="seed of the SAEs; with several, the table gives mean and standard deviation over them (default: 0)",
    )
    demo.add_argument("--quiet", action="store_true", help="hide the output of the commands")
    demo.set_defaults(run=_demo, interrupted=AGAIN)

    doctor = commands.add_parser(
        "doctor", help="check the installation, the plugins and the store", epilog="example: vs2 doctor --store store"
    )
    add_store_option(doctor)
    doctor.set_defaults(run=_doctor)

    add_methods(commands)
    add_classify(commands)
    add_report(commands)
    add_inspect(commands)
    add_latents(commands)
    add_sae(commands)
    add_sweep(commands)
    add_stress(commands)
    add_reproduce(commands)
    add_data(commands)
    add_store(commands)
    add_new_plugin(commands)
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return its exit code."""
    args = argparse.Namespace(interrupted="")
    return end_well("vs2", lambda: _run(argv, args), lambda: args.interrupted)


def _run(words: Sequence[str] | None, into: argparse.Namespace | None = None) -> int | None:
    """Parse ``words`` ``into`` a namespace and run the command, perhaps within another one, which handles errors."""
    args = parser().parse_args(words, into)
    code: int | None = args.run(args)
    return code


def _demo(args: argparse.Namespace) -> None:
    from vs2_plugin.cli import train_sae
    from vs2_plugin.demo.run import demo
    from vs2_plugin.training.request import TrainRequest

    TrainRequest(dataset=("wds/digits",), seed=tuple(args.seed))  # refused before anything is written
    make_folder(args.out)
    commands: dict[str, Callable[[Sequence[str]], int | None]] = {"vs2": _run, "vs2-train-sae": train_sae.run}
    demo(args.out, commands, args.quiet, list(dict.fromkeys(args.seed)))


def _doctor(args: argparse.Namespace) -> int:
    from vs2_plugin.cli.doctor import doctor

    return doctor(Store.default(args.store))


if __name__ == "__main__":
    sys.exit(main())
