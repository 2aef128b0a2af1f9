"""``vs2-train-sae``: extracts training activations of a data set, trains an SAE per site and stores the checkpoint."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from vs2_plugin.cli.common import Command, add_flags, end_well, load_torch
from vs2_plugin.messages import say
from vs2_plugin.training.request import TrainRequest

__all__ = ["main", "parser", "run", "train"]

# Training makes many short parallel steps. Where another process holds a core, threads that spin while they wait
# for each other slow it down a hundredfold; sleeping ones cost a few microseconds. Torch reads this at its import.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_EXAMPLES = """\
examples:
  vs2-train-sae --model ViT-B-32-quickgelu --pretrained openai --dataset cifar100 --dataset_root root
  vs2-train-sae --model ViT-B-16-quickgelu --pretrained openai --dataset cifar100 --recipe paper
  vs2-train-sae --model ViT-B-32 --pretrained laion2b_s34b_b79k --dataset wds/mine --dataset_root mine --k 32
  vs2-train-sae --model ViT-B-32-quickgelu --pretrained openai --dataset cifar100 food101 --name both
  vs2-train-sae --model ViT-B-32-quickgelu --pretrained openai --activations X.npy --name mine
  vs2-train-sae --model ViT-L-14 --pretrained openai --dataset cars --name cars-wide --expansion_factor 10 --k 128
  vs2-train-sae --model ViT-B-32-quickgelu --pretrained openai --dataset cifar100 --retrieval_encoder \\
      vit_small_patch14_dinov2 --gallery_labels

several at once:
  vs2-train-sae --model ViT-B-32-quickgelu --pretrained openai --dataset cifar100 --blocks all --k 32 64 --seed 0 1 2
  vs2-train-sae --model ViT-B-32-quickgelu --pretrained openai --dataset cifar100 --pass_weight 0 0.8

several processes (one per GPU), which share the images and every training step:
  torchrun --nproc_per_node=4 --no_python vs2-train-sae --model ViT-L-14 --pretrained openai --dataset cifar100

afterwards:
  clip_benchmark eval --model vs2:ViT-B-32-quickgelu --pretrained openai --dataset cifar100 --dataset_root root
"""


#: First setting of a group of flags -> title and description of the group.
_GROUPS = {
    "model": ("model and data (as for clip_benchmark)", None),
    "recipe": (
        "SAE",
        "--k, --expansion_factor, --pass_weight and --seed take several values: all SAEs are trained from one pass "
        "over the activations, each combination becomes a checkpoint called NAME-k32-x8-seed1; --pass_weight 0 0.8 "
        "puts the plain SAE and the PASS SAE into one checkpoint",
    ),
    "gallery": (
        "gallery",
        "the images that vs2s, @alpha=auto, dn, vs2pp and others use (see vs2 methods); links to the cached "
        "activations, not copies",
    ),
    "store": ("store", None),
}


def parser() -> Command:
    """Return the parser of the command line. Settings that clip_benchmark has too are named as there."""
    command = Command(
        prog="vs2-train-sae",
        description="Train the sparse autoencoders that steered models use, on the unlabeled training "
        "images of a data set.",
        epilog=_EXAMPLES,
        argument_default=argparse.SUPPRESS,
    )
    add_flags(command, TrainRequest, _GROUPS)
    return command


def train(given: Mapping[str, Any]) -> None:
    """Train SAEs as the given settings of a :class:`TrainRequest` ask for."""
    load_torch()
    request = TrainRequest.of(**given)
    from vs2_plugin.distributed import joined
    from vs2_plugin.training.run import train as make

    with joined() as processes:
        make(request, processes, say)


def run(words: Sequence[str] | None = None) -> None:
    """Run the command without handling errors, for use within another command."""
    train(vars(parser().parse_args(words)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    return end_well(
        "vs2-train-sae",
        lambda: run(argv),
        lambda: "; what was extracted and trained so far is kept: run the same command to continue",
    )


if __name__ == "__main__":
    sys.exit(main())
