"""What ``vs2-train-sae`` does once the activations are there: an SAE per site, and the checkpoint."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vs2_plugin.arrays import stack
from vs2_plugin.checkpoint.checkpoint import Checkpoint, SiteSAE, TrainingData, save_checkpoint
from vs2_plugin.checkpoint.store import Store, checkpoint_name
from vs2_plugin.data.splits import training_split
from vs2_plugin.distributed import ALONE, Processes
from vs2_plugin.errors import CheckpointError, DataError, SettingError, TowerError
from vs2_plugin.names import is_steered, split
from vs2_plugin.training.extract import Extraction, all_labels, load_encoders

if TYPE_CHECKING:
    from vs2_plugin.clip.sites import Site, Sites
    from vs2_plugin.sae.config import TrainConfig
    from vs2_plugin.sae.topk import TopKSAE
    from vs2_plugin.sae.train import Trained

__all__ = ["run"]


def run(args: argparse.Namespace, processes: Processes = ALONE, loaded: Callable[[], None] = lambda: None) -> None:
    """Do what the command line of :mod:`vs2_plugin.cli.train_sae` says, alone or with others.

    ``loaded`` is called when all code is loaded that the work takes.

    Raises:
        Vs2Error: what is wrong, before any image is read where that can be told.
    """
    args.quiet = args.quiet or not processes.first
    import torch

    from vs2_plugin.clip.backbone import ignores_pretrained
    from vs2_plugin.clip.remembered import Backbone

    say = (lambda *words: None) if args.quiet else print
    if is_steered(args.model):
        backbone = split(args.model).backbone or "ViT-B-32"
        mended = shlex.quote(backbone)
        raise TowerError(f"--model {args.model!r}: an SAE is trained for the plain backbone; use --model {mended}")
    if ignores_pretrained(args.model):
        args.pretrained = ""
    store = Store.default(args.store)
    device = f"cuda:{processes.local_rank}" if torch.cuda.is_available() else "cpu"
    backbone = Backbone(
        args.model,
        args.pretrained,
        args.model_cache_dir,
        device,
        seed=args.seed[0],
        folder=store.towers,
        forget=args.refresh_cache,
    )
    splits = {dataset: training_split(dataset, args.train_split, args.transductive) for dataset in args.dataset}
    calibrate_on = args.calibrate_on or list(splits)
    strangers = [dataset for dataset in calibrate_on if dataset not in splits]
    if strangers:
        raise SettingError(f"--calibrate_on {strangers[0]!r}: expected some of --dataset: {' '.join(splits)}")
    plans = _plans(args, store)
    any_pass = any("pass" in plan.variants for plan in plans)
    sites = _sites(backbone.sites, args.blocks)
    if any_pass:
        say("PASS: the training labels are read; the checkpoint and every result of pass: say so")
    if any(split.transductive for split in splits.values()):
        say("transductive: images that are evaluated are trained on; the checkpoint and every result say so")

    for plan in plans:
        if plan.kept:
            plan.existing.require_tower(backbone.tower)
    kept = [backbone.sites.find(site.hookpoint) for plan in plans for site in plan.kept]
    # What the galleries of checkpoints that stay hold already, the new ones hold too.
    held = [plan.existing.gallery for plan in plans if plan.kept and args.gallery and plan.existing.gallery]
    extraction = Extraction(
        args=args,
        store=store,
        backbone=backbone,
        sites=backbone.sites.in_order([*sites, *kept]),
        encoders=load_encoders(args, held, backbone.tower.preprocessing, device),
        labels=any_pass or args.gallery_labels or any(gallery.labels for gallery in held),
        device=device,
        say=say,
        processes=processes,
    )
    loaded()
    parts = [extraction.run(dataset, split) for dataset, split in splits.items()]
    counts = [len(part) for part in parts]

    data = TrainingData(
        datasets=tuple(splits),
        splits=tuple(split.name for split in splits.values()),
        images=sum(counts),
        calibrated_on=tuple(calibrate_on),
        transductive=any(split.transductive for split in splits.values()),
        amp=args.amp,
        max_images=args.max_images,
    )
    saes = [plan.keep(data) for plan in plans]
    trained = _train(
        args,
        plans,
        {site: stack([part.tower.columns[site.hookpoint] for part in parts]) for site in sites},
        all_labels(parts) if any_pass else None,
        np.repeat([dataset in calibrate_on for dataset in splits], counts),
        device,
        processes,
    )
    if not processes.first:
        return  # the first one writes the checkpoints
    for plan, stay, new in zip(plans, saes, trained, strict=True):
        checkpoint = save_checkpoint(
            plan.folder,
            backbone=args.model,
            pretrained=args.pretrained,
            tower=backbone.tower,
            data=data,
            saes=sorted([*stay, *new], key=lambda pair: pair[0].variant != "plain"),
            gallery=extraction.gallery(parts),
            created={
                "torch": version("torch"),
                "open_clip": version("open_clip_torch"),
                "command": shlex.join(["vs2-train-sae", *sys.argv[1:]]),
            },
        )
        print(f"wrote {checkpoint.folder}")
    names = [plan.folder.name for plan in plans] if args.name or len(plans) > 1 or len(splits) > 1 else [""]
    say(f"evaluate with: {_evaluate_command(args, names, plans[0].variants)}")


@dataclass(frozen=True)
class _Plan:
    """One checkpoint to write."""

    folder: Path
    """Where."""
    settings: Mapping[str, Any]
    """Settings of its SAEs, by the names of :class:`TrainConfig`; ``k`` may be missing."""
    variants: Mapping[str, float]
    """Variant to train -> PASS weight."""
    existing: Checkpoint | None
    """The checkpoint that is there."""

    @property
    def kept(self) -> list[SiteSAE]:
        """The SAEs that stay: those of other variants."""
        return [] if self.existing is None else [s for s in self.existing.sites if s.variant not in self.variants]

    def keep(self, data: TrainingData) -> list[tuple[SiteSAE, TopKSAE]]:
        """Read the SAEs that stay.

        Raises:
            DataError: they are of other data.
        """
        kept = self.kept
        differences = self.existing.data.differences(data) if kept else []
        if differences:
            name = self.existing.name
            raise DataError(
                f"the other SAE of checkpoint {name!r} is of other data ({', '.join(differences)}); give --name"
            )
        return [(site, self.existing.load(site)[0]) for site in kept]

    def config(self, variant: str, width: int) -> TrainConfig:
        """The settings for activations of a width. Raises SettingError."""
        from vs2_plugin.sae.config import TrainConfig

        usual = {"k": min(64, max(1, width // 8))}
        return TrainConfig(**{**usual, **self.settings, "pass_weight": self.variants[variant]})


def _plans(args: argparse.Namespace, store: Store) -> list[_Plan]:
    """The checkpoints that the command line asks for: one for each combination of what has several values.

    Raises:
        SettingError: a setting outside its range.
        DataError: a checkpoint is there already.
    """
    from vs2_plugin.sae.config import RECIPES, TrainConfig

    fields = TrainConfig.__dataclass_fields__
    given = {name: value for name, value in vars(args).items() if name in fields and value is not None}
    shape = _paper_shape(args.model) if args.recipe == "paper" else {}
    several = {name: given.pop(name, [shape[name]] if name in shape else []) for name in _SEVERAL}
    chosen = {**RECIPES[args.recipe], **given}
    weights = dict.fromkeys(several.pop("pass_weight") or [0.0])
    passes = [weight for weight in weights if weight] or [0.0]
    base = args.name or checkpoint_name(args.model, args.pretrained, "+".join(args.dataset))
    plans = []
    for *values, weight in product(*(values or [None] for values in several.values()), passes):
        named = dict(zip(several, values, strict=True))
        suffix = "".join(f"-{_SEVERAL[name]}{value:g}" for name, value in named.items() if len(several[name]) > 1)
        suffix += f"-pass{weight:g}" if len(passes) > 1 else ""
        variants = {"plain": 0.0} if 0.0 in weights else {}
        variants |= {"pass": weight} if weight else {}
        folder = store.folder(base + suffix)
        settings = {**chosen, **{name: value for name, value in named.items() if value is not None}}
        plan = _Plan(folder, settings, variants, _existing(folder, variants, args.overwrite))
        for variant in variants:
            plan.config(variant, 512)
        plans.append(plan)
    return plans


#: Settings that may have several values -> what stands before the value in a checkpoint's name.
_SEVERAL = {"k": "k", "expansion_factor": "x", "seed": "seed", "pass_weight": "pass"}


def _existing(folder: Path, variants: Iterable[str], overwrite: bool) -> Checkpoint | None:
    """The checkpoint that a training adds to; None if there is none.

    Raises:
        DataError: it holds an SAE of such a variant already.
    """
    if not folder.exists():
        return None
    try:
        existing = Checkpoint.open(folder)
    except CheckpointError:
        if overwrite:
            return None
        raise
    again = [variant for variant in variants if any(site.variant == variant for site in existing.sites)]
    if again and not overwrite:
        what = " with a PASS SAE" if again == ["pass"] else ""
        raise DataError(
            f"there is a checkpoint {existing.name!r} in {existing.folder.parent} already{what}; replace it with "
            "--overwrite, or give another --name"
        )
    return existing


def _paper_shape(backbone: str) -> dict[str, int]:
    """Expansion factor and k that the paper uses with a backbone."""
    if "L-14" in backbone:
        return {"expansion_factor": 10, "k": 128}
    return {"expansion_factor": 4, "k": 256 if "B-16" in backbone else 64}


def _sites(offered: Sites, blocks: Sequence[str]) -> list[Site]:
    """The sites that ``--blocks`` names, in the order of the tower."""
    chosen = []
    for word in blocks:
        if word == "last":
            chosen.append(offered.default)
        elif word == "all" and offered.blocks:
            chosen.extend(offered.blocks)
        elif word in ("output", "all"):
            chosen.append(offered.output)
        elif word.isdigit() and int(word) < len(offered.blocks):
            chosen.append(offered.blocks[int(word)])
        else:
            numbers = f"block numbers from 0 to {len(offered.blocks) - 1}"
            numbers = numbers if offered.blocks else "no block numbers, as this tower pools no CLS token"
            raise SettingError(f"--blocks {word!r}: expected last, all, output, or {numbers}")
    return offered.in_order(chosen)


def _train(
    args: argparse.Namespace,
    plans: Sequence[_Plan],
    activations: Mapping[Site, np.ndarray],
    labels: np.ndarray | None,
    calibration: np.ndarray,
    device: str,
    processes: Processes,
) -> list[list[tuple[SiteSAE, TopKSAE]]]:
    """Train the SAEs of all plans and say how it went. What two plans have in common is trained once."""
    from vs2_plugin.sae.train import Job, train_saes

    wanted = [
        [(variant, site, plan.config(variant, site.width)) for variant in plan.variants for site in activations]
        for plan in plans
    ]
    jobs = {}
    for plan, saes in zip(plans, wanted, strict=True):
        for variant, site, config in saes:
            which = f" of {plan.folder.name}" if len(plans) > 1 else ""
            name = f"{'PASS ' if variant == 'pass' and len(plan.variants) > 1 else ''}SAE at {site}{which}"
            own = labels if variant == "pass" else None
            jobs.setdefault((site, config), Job(name, activations[site], config, own))
    trained = train_saes(
        list(jobs.values()), calibration=calibration, device=device, quiet=args.quiet, processes=processes
    )
    results = dict(zip(jobs, trained, strict=True))
    for job, (sae, _, figures) in zip(jobs.values(), trained, strict=True):
        if processes.first:
            print(
                f"{job.name}: {sae.config.num_latents} latents, {sae.config.k} active; FVU {figures.fvu:.4f} on "
                f"{figures.held_out_count:,} held-out activations, {figures.dead:.1%} of latents dead, "
                f"{figures.train_count:,} activations in {figures.seconds:.1f} s"
            )
    return [
        [
            (_facts(args, site, variant, config, results[site, config]), results[site, config].sae)
            for variant, site, config in saes
        ]
        for saes in wanted
    ]


def _facts(args: argparse.Namespace, site: Site, variant: str, config: TrainConfig, trained: Trained) -> SiteSAE:
    """What the checkpoint tells of an SAE."""
    figures = trained.figures
    progress = {key: value for key, value in asdict(figures).items() if not key.startswith("fvu")}
    settings = asdict(config.for_size(figures.train_count + figures.held_out_count))
    return SiteSAE(
        hookpoint=site.hookpoint,
        variant=variant,
        labels="train" if variant == "pass" else "none",
        width=site.width,
        mean=trained.mean.tolist(),
        fvu=figures.fvu,
        fvu_quantiles=figures.fvu_quantiles,
        training={"recipe": args.recipe, **settings, **progress},
        files={},
    )


def _evaluate_command(args: argparse.Namespace, names: Sequence[str], variants: Iterable[str]) -> str:
    methods = ["vs2" if variant == "plain" else "pass" for variant in variants]
    models = [f"{method}:{args.model}" + (f"@{name}" if name else "") for name in names for method in methods]
    words = ["clip_benchmark", "eval", "--model", args.model, *models, "--pretrained", args.pretrained]
    return shlex.join([*words, "--dataset", *args.dataset, "--dataset_root", args.dataset_root])
