"""What ``vs2-train-sae`` does once the activations are there: an SAE per site, and the checkpoint."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from vs2_plugin.arrays import stack
from vs2_plugin.checkpoint.manifest import Checkpoint, SiteFacts, save_checkpoint
from vs2_plugin.checkpoint.store import Store, checkpoint_name
from vs2_plugin.cli.extraction import Extraction, all_labels, load_encoders
from vs2_plugin.data.splits import training_split
from vs2_plugin.errors import CheckpointError, DataError, SettingError, TowerError
from vs2_plugin.modelstring import is_steered
from vs2_plugin.processes import ALONE, Processes

if TYPE_CHECKING:
    from torch import nn

    from vs2_plugin.clip.sites import Site
    from vs2_plugin.sae import TopKSAE, TrainConfig

__all__ = ["run"]


def run(args: argparse.Namespace, processes: Processes = ALONE) -> None:
    """Do what the command line of :mod:`vs2_plugin.cli.train_sae` says, alone or with others.

    Raises:
        Vs2Error: what is wrong, before any image is read where that can be told.
    """
    args.quiet = args.quiet or not processes.first
    from vs2_plugin.clip.backbone import Tower, check_backbone, ignores_pretrained, load_backbone
    from vs2_plugin.clip.sites import find_site

    say = (lambda *words: None) if args.quiet else print
    if is_steered(args.model):
        backbone = args.model.partition(":")[2].partition("@")[0] or "ViT-B-32"
        mended = shlex.quote(backbone)
        raise TowerError(f"--model {args.model!r}: an SAE is trained for the plain backbone; use --model {mended}")
    if ignores_pretrained(args.model):
        args.pretrained = ""
    check_backbone(args.model, args.pretrained)
    splits = {dataset: training_split(dataset, args.train_split, args.transductive) for dataset in args.dataset}
    calibrate_on = args.calibrate_on or list(splits)
    strangers = [dataset for dataset in calibrate_on if dataset not in splits]
    if strangers:
        raise SettingError(f"--calibrate_on {strangers[0]!r}: expected some of --dataset: {' '.join(splits)}")
    store = Store.default(args.store)
    folder = store.folder(args.name or checkpoint_name(args.model, args.pretrained, "+".join(splits)))
    variant = "pass" if args.pass_weight else "plain"
    existing = _existing(folder, variant, args.overwrite)
    settings = _settings(args)

    import torch

    device = f"cuda:{processes.local_rank}" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)  # as clip_benchmark does before it loads a model
    loaded = load_backbone(args.model, args.pretrained, args.model_cache_dir, device)
    tower = Tower.of(loaded.model, loaded.transform)
    sites = _sites(loaded.model, args.blocks)
    if variant == "pass":
        say("PASS: the training labels are read; the checkpoint and every result of pass: say so")
    if any(split.transductive for split in splits.values()):
        say("transductive: images that are evaluated are trained on; the checkpoint and every result say so")

    kept = [] if existing is None else [site for site in existing.sites if site.variant != variant]
    if kept:
        existing.require_tower(tower)
    held = existing.gallery if kept and args.gallery else None  # what the gallery there holds stays in it
    extraction = Extraction(
        args=args,
        store=store,
        loaded=loaded,
        tower=tower,
        sites=_in_order(loaded.model, [*sites, *(find_site(loaded.model, site.hookpoint) for site in kept)]),
        encoders=load_encoders(args, held, tower, device),
        labels=variant == "pass" or args.gallery_labels or bool(held and held["labels"]),
        device=device,
        say=say,
        processes=processes,
    )
    parts = [extraction.run(dataset, split) for dataset, split in splits.items()]
    counts = [len(part) for part in parts]

    data = {
        "datasets": list(splits),
        "splits": [split.name for split in splits.values()],
        "images": sum(counts),
        "calibrated_on": calibrate_on,
        "transductive": any(split.transductive for split in splits.values()),
        "amp": args.amp,
        "max_images": args.max_images,
    }
    saes = _keep(existing, kept, data)
    for site in sites:
        saes.append(
            _train(
                site,
                stack([part.tower.columns[site.hookpoint] for part in parts]),
                all_labels(parts) if variant == "pass" else None,
                np.repeat([dataset in calibrate_on for dataset in splits], counts),
                settings(site.width).for_size(sum(counts)),
                args,
                device,
                processes,
            )
        )
    if not processes.first:
        return  # the first one writes the checkpoint
    checkpoint = save_checkpoint(
        folder,
        backbone=args.model,
        pretrained=args.pretrained,
        tower=tower,
        data=data,
        saes=sorted(saes, key=lambda pair: pair[0].variant != "plain"),
        gallery=extraction.gallery(parts),
        created={
            "torch": version("torch"),
            "open_clip": version("open_clip_torch"),
            "command": shlex.join(["vs2-train-sae", *sys.argv[1:]]),
        },
    )
    print(f"wrote {checkpoint.folder}")
    say(f"evaluate with: {_evaluate_command(args, checkpoint)}")


def _existing(folder: os.PathLike, variant: str, overwrite: bool) -> Checkpoint | None:
    """The checkpoint that this training adds to; None if there is none.

    Raises:
        DataError: it holds an SAE of this variant already.
    """
    if not os.path.exists(folder):
        return None
    try:
        existing = Checkpoint.open(folder)
    except CheckpointError:
        if overwrite:
            return None
        raise
    if any(site.variant == variant for site in existing.sites) and not overwrite:
        what = " with a PASS SAE" if variant == "pass" else ""
        raise DataError(
            f"there is a checkpoint {existing.name!r} in {existing.folder.parent} already{what}; replace it with "
            "--overwrite, or give another --name"
        )
    return existing


def _keep(
    existing: Checkpoint | None, kept: Sequence[SiteFacts], data: dict[str, Any]
) -> list[tuple[SiteFacts, TopKSAE]]:
    """The SAEs of the other variant, which stay in the checkpoint.

    Raises:
        DataError: they are of other data.
    """
    differing = [name for name in data if existing.data.get(name) != data[name]] if kept else []
    if differing:
        facts = ", ".join(f"{name} {existing.data.get(name)}, now {data[name]}" for name in differing)
        raise DataError(f"the other SAE of checkpoint {existing.name!r} is of other data ({facts}); give --name")
    return [(site, existing.load(site)[0]) for site in kept]


def _settings(args: argparse.Namespace) -> Callable[[int], TrainConfig]:
    """A function from the activations' width to the training settings. Raises SettingError for wrong ones now."""
    from vs2_plugin.sae.train import RECIPES, TrainConfig

    chosen: dict[str, Any] = dict(RECIPES[args.recipe])
    if args.recipe == "paper":
        chosen |= _paper_shape(args.model)
    fields = TrainConfig.__dataclass_fields__
    chosen |= {name: value for name, value in vars(args).items() if name in fields and value is not None}

    def settings(width: int) -> TrainConfig:
        return TrainConfig(**{"k": min(64, max(1, width // 8)), **chosen})

    settings(512)
    return settings


def _paper_shape(backbone: str) -> dict[str, int]:
    """Expansion factor and k that the paper uses with a backbone."""
    if "L-14" in backbone:
        return {"expansion_factor": 10, "k": 128}
    return {"expansion_factor": 4, "k": 256 if "B-16" in backbone else 64}


def _sites(model: nn.Module, blocks: Sequence[str]) -> list[Site]:
    """The sites that ``--blocks`` names, in the order of the tower."""
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
            numbers = f"block numbers from 0 to {len(offered) - 1}"
            numbers = numbers if offered else "no block numbers, as this tower pools no CLS token"
            raise SettingError(f"--blocks {word!r}: expected last, all, output, or {numbers}")
    return _in_order(model, chosen)


def _in_order(model: nn.Module, chosen: Sequence[Site]) -> list[Site]:
    """The chosen sites, each once, in the order of the tower."""
    from vs2_plugin.clip.sites import block_sites, output_site

    return [site for site in (*block_sites(model), output_site(model)) if site in chosen]


def _train(
    site: Site,
    activations: np.ndarray,
    labels: np.ndarray | None,
    calibration: np.ndarray,
    config: TrainConfig,
    args: argparse.Namespace,
    device: str,
    processes: Processes,
) -> tuple[SiteFacts, TopKSAE]:
    """Train the SAE of one site and say how it went."""
    from vs2_plugin.sae.train import train_sae

    name = f"SAE at {site}"
    sae, mean, figures = train_sae(
        activations,
        config,
        labels=labels,
        calibration=calibration,
        device=device,
        quiet=args.quiet,
        name=name,
        processes=processes,
    )
    if processes.first:
        print(
            f"{name}: {sae.config.num_latents} latents, {sae.config.k} active; FVU {figures.fvu:.4f} on "
            f"{figures.held_out_count:,} held-out activations, {figures.dead:.1%} of latents dead, "
            f"{figures.train_count:,} activations in {figures.seconds:.1f} s"
        )
    progress = {key: value for key, value in asdict(figures).items() if not key.startswith("fvu")}
    facts = SiteFacts(
        hookpoint=site.hookpoint,
        variant="plain" if labels is None else "pass",
        labels="none" if labels is None else "train",
        width=site.width,
        mean=mean.tolist(),
        fvu=figures.fvu,
        fvu_quantiles=figures.fvu_quantiles,
        training={"recipe": args.recipe, **asdict(config), **progress},
        files={},
    )
    return facts, sae


def _evaluate_command(args: argparse.Namespace, checkpoint: Checkpoint) -> str:
    named = args.name is not None or len(args.dataset) > 1  # else it is found by its data set
    model = f"{'pass' if args.pass_weight else 'vs2'}:{args.model}" + (f"@{checkpoint.name}" if named else "")
    words = ["clip_benchmark", "eval", "--model", args.model, model, "--pretrained", args.pretrained]
    return shlex.join([*words, "--dataset", *args.dataset, "--dataset_root", args.dataset_root])
