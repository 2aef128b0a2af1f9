"""``vs2-train-sae``: extract a data set's training activations once, train an SAE per site, store the checkpoint."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from vs2_plugin.checkpoint.store import ENVIRONMENT_VARIABLE, Store, checkpoint_name
from vs2_plugin.cli.common import end_well, gigabytes
from vs2_plugin.data.splits import training_split
from vs2_plugin.errors import CheckpointError, DataError, SettingError, TowerError

__all__ = ["main", "parser"]

# Training makes many short parallel steps. Where another process holds a core, threads that spin while they wait
# for each other slow it down a hundredfold; sleeping ones cost a few microseconds. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_EXAMPLES = """\
examples:
  vs2-train-sae --model ViT-B-32-quickgelu --pretrained openai --dataset cifar100 --dataset_root root
  vs2-train-sae --model ViT-B-16-quickgelu --pretrained openai --dataset cifar100 --recipe paper
  vs2-train-sae --model ViT-B-32 --pretrained laion2b_s34b_b79k --dataset wds/mine --dataset_root mine --k 32
  vs2-train-sae --model ViT-L-14 --pretrained openai --dataset cars --name cars-wide --expansion_factor 10 --k 128

afterwards:
  clip_benchmark eval --model vs2:ViT-B-32-quickgelu --pretrained openai --dataset cifar100 --dataset_root root
"""


def parser() -> argparse.ArgumentParser:
    """The command line. Flags that clip_benchmark has too have its names and defaults."""
    from vs2_plugin.sae.train import RECIPES, TrainConfig

    made = argparse.ArgumentParser(
        prog="vs2-train-sae",
        description="Train the sparse autoencoders that steered models use, on the unlabeled training images of a data set.",
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
        help="data-set name that clip_benchmark knows, or wds/NAME for webdataset shards; labels are not needed",
    )
    data.add_argument("--dataset_root", default="root", help="its folder, or the URL of shards (default: %(default)s)")
    data.add_argument("--train_split", help="the split to train on (default: the data set's training split)")
    data.add_argument(
        "--transductive",
        action="store_true",
        help="allow training on the images that are evaluated, for data sets without a training split; marked in checkpoint and results",
    )
    data.add_argument(
        "--max_images", type=_positive, help="use at most this many images: a random subset (default: all)"
    )
    data.add_argument("--batch_size", type=_positive, default=64, help="images per forward pass (default: %(default)s)")
    data.add_argument(
        "--num_workers",
        type=int,
        default=min(4, os.cpu_count() or 1),
        help="image loader processes (default: %(default)s)",
    )
    data.add_argument("--no_amp", action="store_false", dest="amp", help="extract in full precision")
    data.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    data.add_argument("--model_cache_dir", help="where downloaded models are kept")
    data.add_argument("--wds_cache_dir", help="where clip_benchmark keeps downloaded shards")
    data.add_argument("--quiet", action="store_true", help="no progress, only the result")

    sae = made.add_argument_group("SAE")
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
        "pass_weight": "PASS (arXiv 2506.01247): pull the codes of a class towards their mean with this weight (the paper: 0.8); reads the training labels, and adds a second SAE for pass: to the checkpoint",
        "pass_means": "the means of PASS: of the batch, or running ones for batches with few images per class",
        "dead_after": "steps of silence after which a latent counts as dead",
    }
    for name, text in helps.items():
        value = getattr(usual, name)
        choices = {"activation": ("relu", "abs"), "init": ("data", "random"), "pass_means": ("batch", "running")}.get(
            name
        )
        default = (
            "" if name == "k" else f" (default: {value:g})" if not isinstance(value, str) else f" (default: {value})"
        )
        sae.add_argument(f"--{name}", type=type(value), choices=choices, help=text + default)

    store = made.add_argument_group("store")
    store.add_argument(
        "--store",
        help=f"folder of checkpoints and cached activations (default: ${ENVIRONMENT_VARIABLE}, else the platform's cache folder)",
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


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command."""
    args = parser().parse_args(argv)
    return end_well(
        "vs2-train-sae",
        lambda: run(args),
        "; activations that were extracted completely are kept: run the same command to go on",
    )


def run(args: argparse.Namespace) -> None:
    """Do what the command line says.

    Raises:
        Vs2Error: what is wrong, before any image is read where that can be told.
    """
    say = (lambda *words: None) if args.quiet else print
    from vs2_plugin.clip.backbone import check_backbone, ignores_pretrained
    from vs2_plugin.modelstring import is_steered

    if is_steered(args.model):
        backbone = args.model.partition(":")[2].partition("@")[0] or "ViT-B-32"
        raise TowerError(
            f"--model {args.model!r}: an SAE is trained for the plain backbone; use --model {shlex.quote(backbone)}"
        )
    if ignores_pretrained(args.model):
        args.pretrained = ""
    check_backbone(args.model, args.pretrained)
    split = training_split(args.dataset, args.train_split, args.transductive)
    store = Store.default(args.store)
    name = args.name or checkpoint_name(args.model, args.pretrained, args.dataset)
    folder = store.folder(name)
    variant = "pass" if args.pass_weight else "plain"
    existing = _existing(store, name, variant, args.overwrite)
    config = _config(args)  # before anything slow

    import numpy as np
    import torch

    from vs2_plugin.checkpoint.manifest import SiteFacts, save_checkpoint
    from vs2_plugin.clip.backbone import Tower, load_backbone
    from vs2_plugin.data.activations import ActivationCache, extract, require_space
    from vs2_plugin.data.images import open_images
    from vs2_plugin.sae.train import train_sae

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)  # as clip_benchmark does before it loads a model
    loaded = load_backbone(args.model, args.pretrained, args.model_cache_dir, device)
    tower = Tower.of(loaded.model, loaded.transform)
    sites = _sites(loaded.model, args.blocks)
    images = open_images(
        args.dataset, args.dataset_root, split.name, loaded.transform,
        max_images=args.max_images, seed=args.seed, wds_cache_dir=args.wds_cache_dir, labels=variant == "pass",
    )  # fmt: skip
    say(
        f"{args.model} on the split {split.name!r} of {args.dataset}: {_count(images.count)} images, {', '.join(map(str, sites))}, on {device}"
    )
    if images.labels:
        say("PASS: the training labels are read; the checkpoint and every result of pass: say so")
    if split.transductive:
        say(
            "transductive: these are the images that are evaluated (without their labels); the checkpoint and every result say so"
        )

    cache = ActivationCache(store.activations)
    dtype = np.dtype(args.cache_dtype)
    key = {
        "tower": tower.to_json(), "sites": [site.hookpoint for site in sites], "dataset": args.dataset,
        "root": os.path.abspath(args.dataset_root) if "://" not in args.dataset_root else args.dataset_root,
        "split": split.name, "images": images.fingerprint, "max_images": args.max_images, "seed": args.seed if args.max_images else None,
        "amp": args.amp, "device": device, "dtype": dtype.name, "labels": images.labels,
    }  # fmt: skip
    activations = None if args.refresh_cache else cache.open(key, sites)
    if activations is not None:
        say(f"activations: cached, in {cache.folder(key)}")
    else:
        if images.count is not None:
            needed = images.count * sum(site.width for site in sites) * dtype.itemsize
            free = require_space(store.activations, needed)
            say(f"activations: {gigabytes(needed)} on disk, in {cache.folder(key)} ({gigabytes(free)} free)")
        activations = extract(
            loaded.model, images, sites, cache, key,
            batch_size=args.batch_size, num_workers=args.num_workers, amp=args.amp, dtype=dtype, quiet=args.quiet,
        )  # fmt: skip
    count = len(activations[sites[0]])
    labels = cache.labels(key) if images.labels else None

    saes = [] if existing is None else _keep(existing, variant, tower)
    for site in sites:
        settings = config(site.width).for_size(count)
        sae, mean, figures = train_sae(
            activations[site], settings, labels=labels, device=device, quiet=args.quiet, name=f"SAE at {site}"
        )
        facts = SiteFacts(
            site.hookpoint, variant, "none" if labels is None else "train", site.width, mean.tolist(), figures.fvu, figures.fvu_quantiles,
            training={"recipe": args.recipe, **vars(settings), **{k: v for k, v in vars(figures).items() if not k.startswith("fvu")}},
            files={},
        )  # fmt: skip
        saes.append((facts, sae))
        print(
            f"SAE at {site}: {sae.config.num_latents} latents, {sae.config.k} active; FVU {figures.fvu:.4f} on {figures.held_out_count:,} "
            f"held-out activations, {figures.dead:.1%} of latents dead, {figures.train_count:,} activations in {figures.seconds:.1f} s"
        )

    checkpoint = save_checkpoint(
        folder, backbone=args.model, pretrained=args.pretrained, tower=tower,
        data={
            "datasets": [args.dataset], "split": split.name, "images": count, "transductive": split.transductive, "amp": args.amp, "max_images": args.max_images,
        },
        saes=sorted(saes, key=lambda pair: pair[0].variant != "plain"), created=_versions(),
    )  # fmt: skip
    print(f"wrote {checkpoint.folder}")
    say("evaluate with: " + _evaluate_command(args, named=args.name is not None))


def _existing(store: Store, name: str, variant: str, overwrite: bool):
    """The checkpoint that this training adds to; None if there is none.

    Raises:
        DataError: it holds an SAE of this variant already.
    """
    from vs2_plugin.checkpoint.manifest import Checkpoint

    if not store.folder(name).exists():
        return None
    try:
        existing = Checkpoint.open(store.folder(name))
    except CheckpointError:
        if overwrite:
            return None
        raise
    if any(site.variant == variant for site in existing.sites) and not overwrite:
        raise DataError(
            f"there is a checkpoint {name!r} in {store.root} already{' with a PASS SAE' if variant == 'pass' else ''}; replace it "
            "with --overwrite, or give another --name"
        )
    return existing


def _keep(existing, variant: str, tower) -> list:
    """The SAEs of the other variant, which stay in the checkpoint. Raises CheckpointError if they are of another tower."""
    others = [site for site in existing.sites if site.variant != variant]
    if others:
        existing.require_tower(tower)
    return [(site, existing.load(site)[0]) for site in others]


def _config(args: argparse.Namespace):
    """A function from the activations' width to the training settings; wrong settings are found here."""
    from vs2_plugin.sae.train import RECIPES, TrainConfig

    chosen: dict[str, Any] = dict(RECIPES[args.recipe])
    if args.recipe == "paper":
        chosen |= _paper_shape(args.model)
    chosen |= {
        key: value for key, value in vars(args).items() if key in TrainConfig.__dataclass_fields__ and value is not None
    }

    def config(width: int) -> TrainConfig:
        return TrainConfig(**{"k": min(64, max(1, width // 8)), **chosen})

    config(512)
    return config


def _paper_shape(backbone: str) -> dict[str, int]:
    """Expansion factor and k that the paper uses with a backbone."""
    if "L-14" in backbone:
        return {"expansion_factor": 10, "k": 128}
    return {"expansion_factor": 4, "k": 256 if "B-16" in backbone else 64}


def _sites(model, blocks: Sequence[str]):
    from vs2_plugin.clip.sites import block_sites, default_site, output_site

    offered = block_sites(model)
    chosen = []
    for word in blocks:
        if word == "last":
            chosen.append(default_site(model))
        elif word == "all" and offered:
            chosen.extend(offered)
        elif word in ("output", "all"):
            chosen.append(output_site(model))
        elif word.isdigit() and int(word) < len(offered):
            chosen.append(offered[int(word)])
        else:
            numbers = (
                f"block numbers from 0 to {len(offered) - 1}"
                if offered
                else "no block numbers, as this tower pools no CLS token"
            )
            raise SettingError(f"--blocks {word!r}: expected last, all, output, or {numbers}")
    in_order = [*offered, *(site for site in chosen if site not in offered)]
    return [site for site in dict.fromkeys(in_order) if site in chosen]


def _count(count: int | None) -> str:
    return "an unknown number of" if count is None else f"{count:,}"


def _versions() -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "torch": version("torch"),
        "open_clip": version("open_clip_torch"),
        "command": shlex.join(["vs2-train-sae", *sys.argv[1:]]),
    }


def _evaluate_command(args: argparse.Namespace, named: bool) -> str:
    model = f"{'pass' if args.pass_weight else 'vs2'}:{args.model}" + (f"@{args.name}" if named else "")
    words = ["clip_benchmark", "eval", "--model", args.model, model, "--pretrained", args.pretrained]
    return shlex.join([*words, "--dataset", args.dataset, "--dataset_root", args.dataset_root])


if __name__ == "__main__":
    sys.exit(main())
