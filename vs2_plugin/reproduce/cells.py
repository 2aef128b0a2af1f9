"""A table of the paper: its cells, with the trainings and evaluations that each one needs. No heavy imports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vs2_plugin import settings
from vs2_plugin.checkpoint.store import checkpoint_name
from vs2_plugin.files import json_digest
from vs2_plugin.modelstring import ModelString, parse
from vs2_plugin.names import file_stem, is_steered
from vs2_plugin.training.request import TrainRequest

__all__ = ["METRICS", "Cell", "Evaluation", "Sae", "Table"]

#: Metric of a cell -> decimals of its number.
METRICS = {"accuracy": 2, "coverage": 2, "fvu": 4, "gain": 2}


@dataclass(frozen=True)
class Sae:
    """A training of SAEs, without the seed: a checkpoint is one of these with a seed."""

    backbone: str
    weights: str
    datasets: tuple[str, ...]
    flags: tuple[tuple[str, Any], ...]
    """Flags of ``vs2-train-sae``, sorted."""
    transductive: bool = False
    """Whether the training images may include images that are evaluated."""

    @property
    def base(self) -> str:
        """The name of the checkpoints without the seed; equal trainings have the same name."""
        digest = json_digest([self.backbone, self.weights, self.datasets, self.flags])[:8]
        return f"{checkpoint_name(self.backbone, self.weights, '+'.join(self.datasets))}-{digest}"

    def name(self, seed: int) -> str:
        """Return the name of the checkpoint of a seed, as ``vs2-train-sae`` names each of several seeds."""
        return f"{self.base}-seed{seed}"

    def request(self, seeds: Sequence[int], dataset_root: str) -> TrainRequest:
        """Return the request to train some seeds."""
        return TrainRequest(
            model=self.backbone,
            pretrained=self.weights,
            dataset=self.datasets,
            dataset_root=dataset_root,
            transductive=self.transductive,
            seed=tuple(seeds),
            name=self.base if len(seeds) > 1 else self.name(seeds[0]),
            **settings.read(TrainRequest, dict(self.flags)),
        )


@dataclass(frozen=True)
class Evaluation:
    """One run of ``clip_benchmark eval``."""

    model: str
    """The value of ``--model``: a plain model, or a model string that names its checkpoint."""
    backbone: str
    weights: str
    dataset: str
    prompts: tuple[str, ...]
    """Empty: those of the harness."""
    checkpoint: str | None = None

    @property
    def file(self) -> str:
        """The name of the results file."""
        return f"{file_stem(self.model)}.json"


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
    """The training of the checkpoint; None if the model needs none."""
    seeds: tuple[int, ...]
    """Seeds of the SAE; a single one without an SAE."""
    of_class: str | None = None
    """For the metric gain: the class; None: the class of the largest gain."""
    best_of: tuple[str, ...] = ()
    """Rows of which the cell shows the best number; such a cell has no model."""

    @property
    def title(self) -> str:
        """Row and column of the cell."""
        return f"{self.row} / {self.column}"

    @property
    def is_wanted(self) -> bool:
        """Whether a number is to be measured for the cell; else only the published one is shown."""
        return self.model is not None or bool(self.best_of)

    @property
    def ends(self) -> tuple[float, ...]:
        """The published number, or both ends of the published interval; empty if there is neither."""
        if self.published is None:
            return ()
        return self.published if isinstance(self.published, tuple) else (self.published,)

    @property
    def spec(self) -> ModelString | None:
        """The parsed model string; None for a plain model."""
        return parse(self.model) if self.model is not None and is_steered(self.model) else None

    def evaluation(self, seed: int) -> Evaluation:
        """Return the evaluation of the cell's model with the SAE of a seed."""
        name = self.sae.name(seed) if self.sae else None
        model = _canonical(replace(self.spec, checkpoint=name)) if self.spec else self.backbone
        return replace(self.plain, model=model, checkpoint=name)

    @property
    def plain(self) -> Evaluation:
        """The evaluation of the same backbone without steering."""
        return Evaluation(self.backbone, self.backbone, self.weights, self.dataset, self.prompts)

    def evaluations(self, seed: int) -> list[Evaluation]:
        """Return all evaluations that the cell's number is computed from."""
        if self.model is None or self.metric == "fvu":  # the checkpoint holds its FVU
            return []
        return [*([self.plain] if self.metric == "gain" else []), self.evaluation(seed)]


def _canonical(spec: ModelString) -> str:
    """Return the same string for all equivalent specs: options in the method's order, without redundant ones.

    >>> _canonical(parse("vs2:ViT-B-32@lam=3@gamma=1.5"))
    'vs2:ViT-B-32@lam=3.0'
    """
    fill = spec.method.fill
    options = {option.name: spec.given[option.name] for option in spec.method.all_options if option.name in spec.given}
    for name in list(options):
        without = {key: value for key, value in options.items() if key != name}
        if fill(without) == fill(options):  # a default may matter too: it unsets the options that it excludes
            options = without
    return str(replace(spec, given=options))


@dataclass(frozen=True)
class Table:
    """A table, as one file declares it."""

    path: Path
    title: str
    source: str
    notes: tuple[str, ...]
    cells: tuple[Cell, ...]
    """All cells, row by row."""
    stand_in: bool = False
    """Whether the cells are those of the stand-in instead of the paper's."""
