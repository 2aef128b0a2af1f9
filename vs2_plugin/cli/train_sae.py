"""``vs2-train-sae``: extract a data set's training activations once, train an SAE per site, store the checkpoint."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable, Sequence

from vs2_plugin.cli.common import end_well, load_torch

__all__ = ["main", "parser"]

# Training makes many short parallel steps. Where another process holds a core, threads that spin while they wait
# for each other slow it down a hundredfold; sleeping ones cost a few microseconds. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_EXAMPLES = """\
examples:
  vs2-train-sae --model ViT-B-32-quickgelu --pretrained openai --dataset cifar100 --dataset_root root
  vs2-train-sae --model ViT-B-16-quickgelu --pretrained openai --dataset cifar100 --recipe paper
  vs2-train-sae --model ViT-B-32 --pretrained laion2b_s34b_b79k --dataset wds/mine --dataset_root mine --k 32
  vs2-train-sae --model ViT-B-32-quickgelu --pretrained openai --dataset cifar100 food101 --name both
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


def parser() -> argparse.ArgumentParser:
    """The command line. Flags that clip_benchmark has too have its names and defaults."""
    from vs2_plugin.checkpoint.store import ENVIRONMENT_VARIABLE
    from vs2_plugin.sae.config import RECIPES, TrainConfig

    made = argparse.ArgumentParser(
        prog="vs2-train-sae",
        description="Train the sparse autoencoders that steered models use, on the unlabeled training "
        "images of a data set.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data = made.add_argument_group("model and data (as for clip_benchmark)")
    data.add_argument("--model", default="ViT-B-32-quickgelu", help="open_clip model name (default: %(default)s)")
    data.add_argument(
        "--pretrained",
        default="laion400m_e32",
        help="weights tag or file; '' for random weights (default: %(default)s)",
    )
    data.add_argument(
        "--dataset",
        required=True,
        nargs="+",
        help="data sets that clip_benchmark knows, or wds/NAME for webdataset shards; labels are not needed. Several "
        "make one SAE for all, used by its name",
    )
    data.add_argument("--dataset_root", default="root", help="its folder, or the URL of shards (default: %(default)s)")
    data.add_argument("--train_split", help="the split to train on (default: the data set's training split)")
    data.add_argument(
        "--transductive",
        action="store_true",
        help="allow training on the images that are evaluated, for data sets without a training split; "
        "marked in checkpoint and results",
    )
    data.add_argument(
        "--max_images", type=_at_least(1), help="use at most this many images: a random subset (default: all)"
    )
    data.add_argument(
        "--batch_size", type=_at_least(1), default=64, help="images per forward pass (default: %(default)s)"
    )
    data.add_argument(
        "--num_workers",
        type=_at_least(0),
        default=min(4, os.cpu_count() or 1),
        help="image loader processes (default: %(default)s)",
    )
    data.add_argument("--no_amp", action="store_false", dest="amp", help="extract in full precision")
    data.add_argument("--seed", type=int, nargs="+", default=[0], help="random seed, or several (default: 0)")
    data.add_argument("--model_cache_dir", help="where downloaded models are kept")
    data.add_argument("--wds_cache_dir", help="where clip_benchmark keeps downloaded shards")
    data.add_argument("--quiet", action="store_true", help="no progress, only the result")

    sae = made.add_argument_group(
        "SAE",
        "--k, --expansion_factor, --pass_weight and --seed take several values: all SAEs are trained from one pass "
        "over the activations, each combination a checkpoint called NAME-k32-x8-seed1; --pass_weight 0 0.8 puts the "
        "plain SAE and that of PASS into one checkpoint",
    )
    sae.add_argument(
        "--recipe",
        choices=sorted(RECIPES),
        default="default",
        help="named settings, which single flags override; paper: those of arXiv 2506.01247 (default: %(default)s)",
    )
    sae.add_argument(
        "--blocks",
        nargs="+",
        default=["last"],
        metavar="BLOCK",
        help="where: last, all, output (the embedding), or block numbers counted from 0; one SAE each (default: last)",
    )
    usual = TrainConfig()
    words = {"activation": ("relu", "abs"), "init": ("data", "random"), "pass_means": ("batch", "running")}
    helps = {
        "expansion_factor": "latents per dimension of the activations",
        "k": "active latents per activation; by default 64, at most an eighth of the width",
        "activation": "relu, or abs: top-k of the magnitude",
        "lr": "peak learning rate of Adam",
        "warmup": "share of the steps over which the rate rises; it then falls linearly to 0",
        "samples": "activations seen in training, repeats included; 0: by the size of the data set",
        "sae_batch_size": "activations per step; 0: by the size of the data set",
        "auxk": "weight of the loss that revives dead latents; 0: off",
        "init": "decoder directions to start from: differences of activations (data), or random ones",
        "pass_weight": "PASS (arXiv 2506.01247): pull the codes of a class towards their mean with this "
        "weight (the paper: 0.8); reads the training labels, and adds a second SAE, for pass:, to the checkpoint",
        "pass_means": "the means of PASS: of the batch, or running ones for batches with few images per class",
        "dead_after": "steps of silence after which a latent counts as dead",
    }
    for name, text in helps.items():
        value = getattr(usual, name)
        default = "" if name == "k" else f" (default: {value if isinstance(value, str) else f'{value:g}'})"
        several = {"nargs": "+"} if name in ("k", "expansion_factor", "pass_weight") else {}
        sae.add_argument(f"--{name}", type=type(value), choices=words.get(name), help=text + default, **several)

    sae.add_argument(
        "--calibrate_on",
        nargs="+",
        metavar="DATASET",
        help="of several data sets, those whose held-out activations set the thresholds of the gate (default: all)",
    )

    gallery = made.add_argument_group(
        "gallery", "what vs2pp, clipsteer, rag, knn and proto look up; links to the cached activations, no copies"
    )
    gallery.add_argument(
        "--no_gallery", action="store_false", dest="gallery", help="keep no gallery beside the checkpoint"
    )
    gallery.add_argument(
        "--gallery_labels",
        action="store_true",
        help="keep the training labels too, for the methods that are oracles; nothing else reads them",
    )
    gallery.add_argument(
        "--retrieval_encoder",
        nargs="+",
        default=[],
        metavar="MODEL[,FILE]",
        help="timm models by whose embeddings images can be compared too (@encoder=MODEL), for example "
        "vit_small_patch14_dinov2; FILE holds their weights (default: those that timm fetches)",
    )

    store = made.add_argument_group("store")
    store.add_argument(
        "--store",
        help=f"folder of checkpoints and cached activations (default: ${ENVIRONMENT_VARIABLE}, else the "
        "platform's cache folder)",
    )
    store.add_argument(
        "--name",
        help="name of the checkpoint, for vs2:MODEL@NAME (default: one that --model and --dataset find by themselves)",
    )
    store.add_argument("--overwrite", action="store_true", help="replace a checkpoint of that name")
    store.add_argument(
        "--cache_dtype",
        choices=("float16", "float32"),
        default="float16",
        help="precision of cached activations (default: %(default)s)",
    )
    store.add_argument("--refresh_cache", action="store_true", help="extract again, even if the activations are cached")
    return made


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is not at least {least}")
        return int(text)

    number.__name__ = "whole number"  # argparse's own complaint about "x" names it
    return number


def _run(argv: Sequence[str] | None) -> None:
    load_torch()  # and all else that takes a moment: here, where Ctrl-C ends well
    args = parser().parse_args(argv)
    from vs2_plugin.distributed import joined
    from vs2_plugin.training import run as training

    with joined() as processes:
        training.run(args, processes, _look_for_garbage)


def _look_for_garbage() -> None:
    """From here on; and only among what is new, since what is loaded stays."""
    gc.freeze()
    gc.enable()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command."""
    gc.disable()  # until all is loaded: to look for garbage among modules that stay takes a quarter of the start
    try:
        return end_well(
            "vs2-train-sae",
            lambda: _run(argv),
            "; activations that were extracted completely are kept: run the same command to go on",
        )
    finally:
        gc.unfreeze()
        gc.enable()


if __name__ == "__main__":
    sys.exit(main())
