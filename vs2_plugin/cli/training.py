"""What ``vs2-train-sae`` does: activations, an SAE per site, the checkpoint."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vs2_plugin.checkpoint.manifest import Checkpoint, SiteFacts, save_checkpoint
from vs2_plugin.checkpoint.store import Store, checkpoint_name
from vs2_plugin.cli.common import gigabytes
from vs2_plugin.data.splits import Split, training_split
from vs2_plugin.errors import CheckpointError, DataError, SettingError, TowerError
from vs2_plugin.modelstring import is_steered

if TYPE_CHECKING:
    from torch import nn

    from vs2_plugin.clip.backbone import Loaded, Tower
    from vs2_plugin.clip.sites import Site
    from vs2_plugin.sae import TopKSAE, TrainConfig

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """Do what the command line of :mod:`vs2_plugin.cli.train_sae` says.

    Raises:
        Vs2Error: what is wrong, before any image is read where that can be told.
    """
    from vs2_plugin.clip.backbone import Tower, check_backbone, ignores_pretrained, load_backbone
    from vs2_plugin.data.activations import stack

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

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)  # as clip_benchmark does before it loads a model
    loaded = load_backbone(args.model, args.pretrained, args.model_cache_dir, device)
    tower = Tower.of(loaded.model, loaded.transform)
    sites = _sites(loaded.model, args.blocks)
    if variant == "pass":
        say("PASS: the training labels are read; the checkpoint and every result of pass: say so")
    if any(split.transductive for split in splits.values()):
        say("transductive: images that are evaluated are trained on; the checkpoint and every result say so")
    parts = [_extract(args, store, loaded, tower, sites, *item, device, say) for item in splits.items()]
    counts = [part.count for part in parts]

    data = {
        "datasets": list(splits),
        "splits": [split.name for split in splits.values()],
        "images": sum(counts),
        "calibrated_on": calibrate_on,
        "transductive": any(split.transductive for split in splits.values()),
        "amp": args.amp,
        "max_images": args.max_images,
    }
    saes = [] if existing is None else _keep(existing, variant, tower, data)
    for site in sites:
        saes.append(
            _train(
                site,
                stack([part.activations[site] for part in parts]),
                _all_labels(parts) if variant == "pass" else None,
                np.repeat([dataset in calibrate_on for dataset in splits], counts),
                settings(site.width).for_size(sum(counts)),
                args,
                device,
            )
        )
    checkpoint = save_checkpoint(
        folder,
        backbone=args.model,
        pretrained=args.pretrained,
        tower=tower,
        data=data,
        saes=sorted(saes, key=lambda pair: pair[0].variant != "plain"),
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


def _keep(existing: Checkpoint, variant: str, tower: Tower, data: dict[str, Any]) -> list[tuple[SiteFacts, TopKSAE]]:
    """The SAEs of the other variant, which stay in the checkpoint.

    Raises:
        CheckpointError: they are of another tower.
        DataError: they are of other data.
    """
    others = [site for site in existing.sites if site.variant != variant]
    if others:
        existing.require_tower(tower)
        differing = [name for name in data if existing.data.get(name) != data[name]]
        if differing:
            facts = ", ".join(f"{name} {existing.data.get(name)}, now {data[name]}" for name in differing)
            raise DataError(f"the other SAE of checkpoint {existing.name!r} is of other data ({facts}); give --name")
    return [(site, existing.load(site)[0]) for site in others]


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
    in_order = [*offered, *(site for site in chosen if site not in offered)]
    return [site for site in dict.fromkeys(in_order) if site in chosen]


class _Part(NamedTuple):
    """What one data set contributes."""

    activations: dict[Site, np.ndarray]
    """Per site ``[count, d]``."""
    labels: np.ndarray | None
    """``[count]``, where they were asked for."""
    count: int
    """Number of images."""


def _all_labels(parts: Sequence[_Part]) -> np.ndarray:
    """The labels of all data sets, whose classes are not each other's."""
    starts = np.cumsum([0, *(int(part.labels.max()) + 1 for part in parts)])
    return np.concatenate([part.labels + start for part, start in zip(parts, starts, strict=False)])


def _extract(
    args: argparse.Namespace,
    store: Store,
    loaded: Loaded,
    tower: Tower,
    sites: list[Site],
    dataset: str,
    split: Split,
    device: str,
    say: Callable[..., None],
) -> _Part:
    """The activations of one data set at ``sites``, from the cache or extracted into it."""
    from vs2_plugin.data.activations import ActivationCache, extract, require_space
    from vs2_plugin.data.images import open_images

    images = open_images(
        dataset,
        args.dataset_root,
        split.name,
        loaded.transform,
        max_images=args.max_images,
        seed=args.seed,
        wds_cache_dir=args.wds_cache_dir,
        labels=bool(args.pass_weight),
    )
    number = "an unknown number of" if images.count is None else f"{images.count:,}"
    places = ", ".join(map(str, sites))
    say(f"{args.model} on the split {split.name!r} of {dataset}: {number} images, {places}, on {device}")

    cache = ActivationCache(store.activations)
    dtype = np.dtype(args.cache_dtype)
    remote = "://" in args.dataset_root
    key = {  # all that the activations depend on
        "tower": tower.to_json(),
        "sites": [site.hookpoint for site in sites],
        "dataset": dataset,
        "root": args.dataset_root if remote else os.path.abspath(args.dataset_root),
        "split": split.name,
        "images": images.fingerprint,
        "max_images": args.max_images,
        "seed": args.seed if args.max_images else None,
        "labels": images.labels,
        "amp": args.amp,
        "device": device,
        "dtype": dtype.name,
    }
    activations = None if args.refresh_cache else cache.open(key, sites)
    if activations is not None:
        say(f"activations: cached, in {cache.folder(key)}")
    else:
        if images.count is not None:
            needed = images.count * sum(site.width for site in sites) * dtype.itemsize
            free = require_space(store.activations, needed)
            say(f"activations: {gigabytes(needed)} on disk, in {cache.folder(key)} ({gigabytes(free)} free)")
        activations = extract(
            loaded.model,
            images,
            sites,
            cache,
            key,
            batch_size=args.batch_size,
            num_workers=args.num_workers,
            amp=args.amp,
            dtype=dtype,
            quiet=args.quiet,
        )
    return _Part(activations, cache.labels(key) if images.labels else None, len(activations[sites[0]]))


def _train(
    site: Site,
    activations: np.ndarray,
    labels: np.ndarray | None,
    calibration: np.ndarray,
    config: TrainConfig,
    args: argparse.Namespace,
    device: str,
) -> tuple[SiteFacts, TopKSAE]:
    """Train the SAE of one site and say how it went."""
    from vs2_plugin.sae.train import train_sae

    name = f"SAE at {site}"
    sae, mean, figures = train_sae(
        activations, config, labels=labels, calibration=calibration, device=device, quiet=args.quiet, name=name
    )
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
