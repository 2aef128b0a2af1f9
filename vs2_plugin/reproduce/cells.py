"""What a table of the paper asks for: its cells, and what is to be trained and run for each. No heavy imports."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vs2_plugin.checkpoint.store import checkpoint_name
from vs2_plugin.modelstring import ModelString, is_steered, parse

__all__ = ["METRICS", "Cell", "Evaluation", "Sae", "Table"]

#: What a cell may be a number of -> its decimals.
METRICS = {"accuracy": 2, "coverage": 2, "fvu": 4, "gain": 2}


@dataclass(frozen=True)
class Sae:
    """One training: the SAEs of one checkpoint, but for the seed."""

    backbone: str
    weights: str
    datasets: tuple[str, ...]
    """What it is trained on."""
    flags: tuple[tuple[str, Any], ...]
    """Flags of ``vs2-train-sae``, sorted."""
    transductive: bool = False
    """Whether images that are evaluated may be among them."""

    @property
    def base(self) -> str:
        """The name of its checkpoints, but for the seed: two trainings share one if they are the same."""
        facts = json.dumps([self.backbone, self.weights, self.datasets, self.flags])
        digest = hashlib.sha256(facts.encode()).hexdigest()[:8]
        return f"{checkpoint_name(self.backbone, self.weights, '+'.join(self.datasets))}-{digest}"

    def name(self, seed: int) -> str:
        """The name of a checkpoint. ``vs2-train-sae`` gives it too, where it is told several seeds."""
        return f"{self.base}-seed{seed}"

    def words(self, seeds: Iterable[int], dataset_root: str) -> list[str]:
        """The command that trains it with some seeds."""
        seeds = list(seeds)
        made = ["vs2-train-sae", "--model", self.backbone, "--pretrained", self.weights]
        made += ["--dataset", *self.datasets, "--dataset_root", dataset_root]
        for name, value in self.flags:
            values = [] if value is True else value if isinstance(value, tuple) else [value]
            made += [f"--{name}", *map(str, values)]
        if self.transductive:
            made.append("--transductive")
        return [
            *made, "--seed", *map(str, seeds), "--name", self.base if len(seeds) > 1 else self.name(seeds[0])
        ]  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """One run of ``clip_benchmark eval``."""

    model: str
    """What ``--model`` is told: a plain model, or a model string that names its checkpoint."""
    backbone: str
    weights: str
    dataset: str
    prompts: tuple[str, ...]
    """Empty: the harness's own."""
    checkpoint: str | None = None
    """The name of its checkpoint."""

    @property
    def file(self) -> str:
        """The name of its results file."""
        return self.model.replace("/", "-").replace(":", "-" if os.name == "nt" else ":") + ".json"


@dataclass(frozen=True)
class Cell:
    """One number of a table."""

    row: str
    column: str
    metric: str
    published: float | tuple[float, float] | None
    """The published number, or an interval; None: not published."""
    model: str | None
    """A plain model or a model string without checkpoint; None: only the published number is shown."""
    backbone: str
    weights: str
    dataset: str
    prompts: tuple[str, ...]
    sae: Sae | None
    """What its checkpoint is trained by, if it has one."""
    seeds: tuple[int, ...]
    """Seeds of the SAE; one where there is none."""
    of_class: str | None = None
    """The class whose gain it is; None: the largest gain of any class."""
    best_of: tuple[str, ...] = ()
    """Rows whose best number it is. It has no model of its own then."""

    @property
    def spec(self) -> ModelString | None:
        """The model string, read; None for a plain model."""
        return parse(self.model) if self.model is not None and is_steered(self.model) else None

    def evaluation(self, seed: int) -> Evaluation:
        """The run of its model, with the SAE of a seed."""
        name = self.sae.name(seed) if self.sae else None
        model = _canonical(replace(self.spec, checkpoint=name)) if self.spec else self.model
        return Evaluation(model, self.backbone, self.weights, self.dataset, self.prompts, name)

    @property
    def plain(self) -> Evaluation:
        """The run of the same model without steering."""
        return Evaluation(self.backbone, self.backbone, self.weights, self.dataset, self.prompts)

    def evaluations(self, seed: int) -> list[Evaluation]:
        """All runs that its number comes from."""
        if self.model is None or self.metric == "fvu":  # the checkpoint tells it
            return []
        return [*([self.plain] if self.metric == "gain" else []), self.evaluation(seed)]


def _canonical(spec: ModelString) -> str:
    """The same string for all models of one meaning: options in the method's order, those that say nothing left out.

    >>> _canonical(parse("vs2:ViT-B-32@lam=3@gamma=1.5"))
    'vs2:ViT-B-32@lam=3.0'
    """
    fill = spec.method.fill
    given = {option.name: spec.given[option.name] for option in spec.method.all_options if option.name in spec.given}
    for name in list(given):
        without = {key: value for key, value in given.items() if key != name}
        if fill(without) == fill(given):  # a default may say something too: it unsets the options that it excludes
            given = without
    return str(replace(spec, given=given))


@dataclass(frozen=True)
class Table:
    """A file."""

    path: Path
    title: str
    source: str
    notes: tuple[str, ...]
    cells: tuple[Cell, ...]
    """Row by row."""
    stand_in: bool = False
    """Whether the cells are those of the stand-in, and not the paper's."""
