"""The checkpoints that a request asks for, and the SAEs that stay in those that exist already."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

from vs2_plugin.checkpoint.checkpoint import Checkpoint
from vs2_plugin.checkpoint.records import SiteSAE, TrainingData
from vs2_plugin.checkpoint.store import Store
from vs2_plugin.clip.sites import Site, Sites
from vs2_plugin.errors import CheckpointError, DataError, SettingError
from vs2_plugin.names import with_weights
from vs2_plugin.sae.config import RECIPES, TrainConfig
from vs2_plugin.sae.foreign import ForeignSAE
from vs2_plugin.sae.topk import SaeConfig, TopKSAE
from vs2_plugin.settings import whole
from vs2_plugin.training.request import TrainRequest

__all__ = ["Plan", "chosen_sites", "fitted", "make_plans"]

#: Settings with one checkpoint for each value -> prefix of the value in the checkpoint's name.
_GRID = {"k": "k", "expansion_factor": "x", "seed": "seed"}


@dataclass(frozen=True)
class Plan:
    """One checkpoint to write."""

    folder: Path
    settings: Mapping[str, Any]
    """Settings of the checkpoint's SAEs, by their names in :class:`TrainConfig`; ``k`` may be missing."""
    variants: Mapping[str, float]
    """Variant to train -> PASS weight."""
    existing: Checkpoint | None
    """The checkpoint that is already in the folder."""

    def __post_init__(self) -> None:
        for variant in self.variants:
            self.config(variant, 512)  # raises now instead of after the extraction

    @property
    def kept(self) -> list[SiteSAE]:
        """SAEs of the existing checkpoint that stay: those of other variants."""
        return [] if self.existing is None else [s for s in self.existing.sites if s.variant not in self.variants]

    def load_kept(self, data: TrainingData, images: Sequence[str]) -> list[tuple[SiteSAE, TopKSAE]]:
        """Return the SAEs of the existing checkpoint that stay, with their records.

        Args:
            data: the record of the training images.
            images: for each data set, the SHA-256 of its images' digests.

        Raises:
            DataError: these SAEs were trained on other data.
        """
        existing, staying = self.existing, self.kept
        if existing is None or not staying:
            return []
        gallery = () if existing.gallery is None else existing.gallery.parts
        before = [part.contents.get("digests") for part in gallery if part.contents is not None]
        changed = ["other images now"] if before and before != list(images) else []
        differences = ", ".join(existing.data.differences(data) or changed)
        if differences:
            raise DataError(
                f"the other SAE of checkpoint {existing.name!r} was trained on other data ({differences}); give --name"
            )
        return [(site, existing.sae(site)[0]) for site in staying]

    def config(self, variant: str, width: int) -> TrainConfig:
        """Return a variant's settings for activations of a width. Raises SettingError if no SAE can have them."""
        usual = {"k": min(64, max(1, width // 8))}
        config = TrainConfig(**{**usual, **self.settings, "pass_weight": self.variants[variant]})
        SaeConfig(width, config.expansion_factor * width, config.k, config.activation)
        return config

    def wanted(self, sites: Sequence[Site]) -> list[tuple[str, Site, TrainConfig]]:
        """Return variant, site and settings of each SAE to train."""
        return [(variant, site, self.config(variant, site.width)) for variant in self.variants for site in sites]


def make_plans(request: TrainRequest, store: Store, by_python: bool = False) -> list[Plan]:
    """Return the checkpoints to write: one for each combination of the settings with several values.

    Args:
        request: the settings.
        store: where the checkpoints go.
        by_python: whether Python code supplies the data, so that no command can train on it.

    Raises:
        SettingError: a setting is outside its range.
        DataError: a checkpoint exists already.
    """
    grid, single = _settings(request)
    weights = request.pass_weight or (0.0,)
    passes = tuple(dict.fromkeys(filter(None, weights))) or (0.0,)
    dataset = "+".join(named.name for named in request.data_sets)
    base = request.name or store.name_for(request.model, request.pretrained, dataset)
    plans = []
    for *values, weight in product(*(values or (None,) for values in grid.values()), passes):
        chosen = {name: value for name, value in zip(grid, values, strict=True) if value is not None}
        suffix = "".join(f"-{_GRID[name]}{value:g}" for name, value in chosen.items() if len(grid[name]) > 1)
        suffix += f"-pass{weight:g}" if len(passes) > 1 else ""
        variants = {"plain": 0.0} if 0.0 in weights else {}
        variants |= {"pass": weight} if weight else {}
        settings, folder = {**RECIPES[request.recipe], **single, **chosen}, store.folder(base + suffix)
        plans.append(Plan(folder, settings, variants, _existing(folder, variants, request, by_python)))
    return plans


def fitted(request: TrainRequest, given: ForeignSAE) -> TrainRequest:
    """Return the request with block, k and expansion factor of the SAE ``given`` in place of a training.

    Raises:
        SettingError: the request has settings of a training, several blocks or seeds, or another block than the SAE.
    """
    of_training = [field.name for field in fields(TrainConfig) if field.name not in ("rescale", "seed")]
    asked = [name for name in of_training if getattr(request, name) is not None]
    asked += ["recipe"] if request.recipe != "default" else []
    if asked:
        raise SettingError(f"--sae uses an SAE as it is; omit --{' --'.join(asked)}")
    if len(request.blocks) > 1 or request.blocks == ("all",) or len(request.seed or ()) > 1:
        raise SettingError("--sae is one SAE, for one place; expected one value of --blocks and of --seed")
    config, (block,) = given.sae.config, request.blocks
    if given.block is not None and block != "last" and whole(block) != given.block:
        raise SettingError(f"--blocks {block} contradicts the files, which hold {given}; omit --blocks")
    return replace(
        request,
        blocks=request.blocks if given.block is None else (str(given.block),),
        k=(config.k,),
        expansion_factor=(max(1, config.num_latents // config.d_in),),
    )


def _settings(request: TrainRequest) -> tuple[dict[str, Sequence[Any]], dict[str, Any]]:
    """Return the settings that may have several values, and those with a single value, that the request sets."""
    settings = {f.name: getattr(request, f.name, None) for f in fields(TrainConfig) if f.name != "pass_weight"}
    shape = _paper_shape(request.model) if request.recipe == "paper" else {}
    grid = {name: settings.pop(name) or ((shape[name],) if name in shape else ()) for name in _GRID}
    return grid, {name: value for name, value in settings.items() if value is not None}


def _existing(
    folder: Path, variants: Collection[str], request: TrainRequest, by_python: bool
) -> Checkpoint | None:
    """Return the checkpoint in ``folder``, to which the training adds SAEs; None if there is none.

    Raises:
        CheckpointError: the checkpoint cannot be read, and is not to be overwritten.
        DataError: the checkpoint already holds an SAE of one of the variants, and is not to be overwritten.
    """
    if not folder.exists():
        return None
    try:
        existing = Checkpoint.load(folder)
    except CheckpointError:
        if request.overwrite:
            return None
        raise
    again = [variant for variant in variants if any(site.variant == variant for site in existing.sites)]
    if again and not request.overwrite:
        what = " with a PASS SAE" if again == ["pass"] else ""
        other = _other(existing, request)
        if by_python:
            cure = f"replace it with overwrite=True, or give another name, such as name={existing.free_name!r}"
        else:
            command = shlex.join(replace(request, name=existing.free_name).words())
            both = f"keep both with: {command}; " if other else ""
            cure = f"{both}replace it with --overwrite, or give another --name"
        raise DataError(
            f"checkpoint {existing.name!r} in {existing.folder.parent} already exists{what}{other}; {cure}"
        )
    return existing


def _other(existing: Checkpoint, request: TrainRequest) -> str:
    """Return words on the other model or folder of a checkpoint; empty if the same."""
    model = with_weights(request.model, request.pretrained)
    homes = [named.home for named in request.data_sets if named.home]
    elsewhere = [home for home in homes if not existing.data.is_of(home)]
    if existing.model != model:
        return f", for {existing.model} and not for {model}"
    return f", trained on {' '.join(existing.data.folders)} and not on {elsewhere[0]}" if elsewhere else ""


def _paper_shape(backbone: str) -> dict[str, int]:
    """Return the expansion factor and k that the paper uses with a backbone."""
    if "L-14" in backbone:
        return {"expansion_factor": 10, "k": 128}
    return {"expansion_factor": 4, "k": 256 if "B-16" in backbone else 64}


def chosen_sites(offered: Sites, blocks: Sequence[str]) -> list[Site]:
    """Return the sites that ``--blocks`` names, in the order of the tower.

    Raises:
        SettingError: the tower has no such block.
    """
    chosen: list[Site] = []
    for word in blocks:
        if word == "last":
            chosen.append(offered.default)
        elif word == "all" and offered.blocks:
            chosen.extend(offered.blocks)
        elif word in ("output", "all"):
            chosen.append(offered.output)
        elif (number := whole(word)) is not None and number < len(offered.blocks):
            chosen.append(offered.blocks[number])
        else:
            numbers = f"block numbers from 0 to {len(offered.blocks) - 1}"
            numbers = numbers if offered.blocks else "no block numbers, as this tower pools no CLS token"
            raise SettingError(f"--blocks {word!r}: expected last, all, output, or {numbers}")
    return offered.in_order(chosen)
