"""A table of the paper: its cells, and what is to be trained and run for each. No heavy imports."""

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

#: What a cell may be a number of -> its decimals.
METRICS = {"accuracy": 2, "coverage": 2, "fvu": 4, "gain": 2}


@dataclass(frozen=True)
class Sae:
    """One training: the SAEs of one checkpoint, but for the seed."""

    backbone: str
    weights: str
    datasets: tuple[str, ...]
    flags: tuple[tuple[str, Any], ...]
    """Flags of ``vs2-train-sae``, sorted."""
    transductive: bool = False
    """True if images that are evaluated may be among them."""

    @property
    def base(self) -> str:
        """The name of its checkpoints, but for the seed: two trainings share one if they are the same."""
        digest = json_digest([self.backbone, self.weights, self.datasets, self.flags])[:8]
        return f"{checkpoint_name(self.backbone, self.weights, '+'.join(self.datasets))}-{digest}"

    def name(self, seed: int) -> str:
        """Return the name of a checkpoint, which ``vs2-train-sae`` gives too where it is told several seeds."""
        return f"{self.base}-seed{seed}"

    def request(self, seeds: Sequence[int], dataset_root: str) -> TrainRequest:
        """Return the training of some seeds."""
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
    """Empty: the harness's own."""
    checkpoint: str | None = None

    @property
    def file(self) -> str:
        """The name of its results file."""
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
    """The training of its checkpoint, if it has one."""
    seeds: tuple[int, ...]
    """Seeds of the SAE; one where there is none."""
    of_class: str | None = None
    """The class whose gain it is; None: the largest gain of any class."""
    best_of: tuple[str, ...] = ()
    """Rows whose best number it is. It has no model of its own then."""

    @property
    def title(self) -> str:
        """Its row and column."""
        return f"{self.row} / {self.column}"

    @property
    def is_wanted(self) -> bool:
        """Whether a number is to be found for it, and not only the published one shown."""
        return self.model is not None or bool(self.best_of)

    @property
    def ends(self) -> tuple[float, ...]:
        """The published number, or both ends of the interval; empty if none was published."""
        if self.published is None:
            return ()
        return self.published if isinstance(self.published, tuple) else (self.published,)

    @property
    def spec(self) -> ModelString | None:
        """The model string, read; None for a plain model."""
        return parse(self.model) if self.model is not None and is_steered(self.model) else None

    def evaluation(self, seed: int) -> Evaluation:
        """Return the run of its model, with the SAE of a seed."""
        name = self.sae.name(seed) if self.sae else None
        model = _canonical(replace(self.spec, checkpoint=name)) if self.spec else self.backbone
        return replace(self.plain, model=model, checkpoint=name)

    @property
    def plain(self) -> Evaluation:
        """The run of the same model without steering."""
        return Evaluation(self.backbone, self.backbone, self.weights, self.dataset, self.prompts)

    def evaluations(self, seed: int) -> list[Evaluation]:
        """Return all runs that its number comes from."""
        if self.model is None or self.metric == "fvu":  # the checkpoint tells it
            return []
        return [*([self.plain] if self.metric == "gain" else []), self.evaluation(seed)]


def _canonical(spec: ModelString) -> str:
    """Return one string for all models of one meaning: options in the method's order, those that say nothing left out.

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
    """A table, as one file declares it."""

    path: Path
    title: str
    source: str
    notes: tuple[str, ...]
    cells: tuple[Cell, ...]
    """Row by row."""
    stand_in: bool = False
    """True if the cells are those of the stand-in, and not the paper's."""
