"""A sweep from its settings to its files."""

from __future__ import annotations

import os
import warnings
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vs2_plugin.clip.backbone import check_backbone
from vs2_plugin.errors import HarnessError, SettingError
from vs2_plugin.harness import preflight
from vs2_plugin.modelstring import is_steered
from vs2_plugin.sweep.grid import Grid, Point, read_grids
from vs2_plugin.sweep.results import Result, headline, read_result, write_result, write_table

__all__ = ["Plan", "Summary", "plan", "sweep"]

TASK = "zeroshot_classification"


@dataclass(frozen=True)
class Plan:
    """What a sweep is going to do."""

    args: Namespace
    """The settings, with clip_benchmark's names."""
    grids: list[Grid]
    """One per steered model string."""
    backbones: list[str]
    """The plain models."""
    files: dict[str, Path]
    """Model -> its results file; plain models first."""
    pending: list[str]
    """The models that are to be evaluated; the others have results already."""
    results: dict[str, Result] = field(default_factory=dict)
    """Model -> its results, as soon as they are in its file."""

    @property
    def points(self) -> dict[str, Point]:
        """Model string -> point."""
        return {point.model: point for grid in self.grids for point in grid.points}

    @property
    def folder(self) -> Path:
        """Where the files lie."""
        return next(iter(self.files.values())).parent

    def file(self, model: str, suffix: str) -> Path:
        """A file beside the results, named for a model string."""
        return self.folder / (_file(self.args, model).name.removesuffix(".json") + suffix)


@dataclass(frozen=True)
class Summary:
    """What a sweep has found."""

    plain: dict[str, float]
    """Plain model -> accuracy."""
    best: tuple[str, float]
    """The model string with the highest accuracy of all points, and that."""
    written: list[Path]
    """Table and pictures."""


def plan(args: Namespace) -> Plan:
    """Read the model strings and check all of it, without loading anything.

    Raises:
        Vs2Error: the first thing that would go wrong.
    """
    grids = read_grids(args.model)
    if not grids:
        raise SettingError(f"--model {' '.join(args.model)} names no steered model; expected one such as "
                           f"vs2:{args.model[0]}@gamma=1:3:0.1")  # fmt: skip
    plain = [name for name in args.model if not is_steered(name)]
    backbones = list(dict.fromkeys([*plain, *(grid.backbone for grid in grids)]))
    models = list(dict.fromkeys([*backbones, *(point.model for grid in grids for point in grid.points)]))
    files = {model: _file(args, model) for model in models}
    if len(set(files.values())) < len(files):
        raise SettingError(f"--output {args.output!r} names one file for several points; put {{model}} into its name")
    if len({file.parent for file in files.values()}) > 1:
        raise SettingError(f"--output {args.output!r}: expected {{model}} in the file's name, not in its folder's")
    pending = [model for model, file in files.items() if not (args.skip_existing and file.exists())]
    made = Plan(args, grids, backbones, files, pending)
    _check(made)
    try:
        made.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HarnessError(
            f"the results could not be written to {made.folder}: {error.strerror}; give another --output"
        ) from None
    return made


def _file(args: Namespace, model: str) -> Path:
    # As in clip_benchmark, but for what cannot stand in a file's name.
    name = model.replace("/", "-").replace(":", "-" if os.name == "nt" else ":")
    return Path(preflight.output_file(Namespace(**{**vars(args), "model": name})))


def _check(made: Plan) -> None:
    """The harness's own checks, of one point of each kind: they do not look at strengths."""
    for backbone in made.backbones:
        check_backbone(backbone, made.args.pretrained)
    _check_task(made.args.dataset)
    kinds = {}
    for model, point in made.points.items():
        words = [pair for pair in point.spec.options.items() if not isinstance(pair[1], float)]
        if model in made.pending:
            kinds.setdefault((point.spec.method.name, point.spec.backbone, point.spec.checkpoint, *words), model)
    common = {**vars(made.args), "output": "unused", "skip_existing": False}
    preflight.check(made.args, [Namespace(**{**common, "model": model}) for model in kinds.values()])


def _check_task(dataset: str) -> None:
    from clip_benchmark.datasets.builder import get_dataset_default_task

    task = get_dataset_default_task(dataset.removeprefix("wds/"))
    if task != TASK:
        raise HarnessError(f"the task of {dataset} is {task}; a sweep evaluates {TASK} only")


def sweep(made: Plan, quiet: bool = False) -> Summary:
    """Evaluate what is to be evaluated, and write all files.

    Raises:
        Vs2Error: something cannot be loaded, or an existing results file is none.
    """
    made.results.update({model: read_result(file) for model, file in made.files.items() if model not in made.pending})
    points = made.points
    for backbone in made.backbones:
        mine = [points[model] for model in made.pending if model in points and points[model].spec.backbone == backbone]
        if mine or backbone in made.pending:
            with warnings.catch_warnings():
                if quiet:  # --num_workers is clip_benchmark's, so that batches of shards are; few cores make torch warn
                    warnings.filterwarnings("ignore", "This DataLoader will create")
                _evaluate(made, backbone, mine, quiet)
    return _finish(made)


def _evaluate(made: Plan, backbone: str, points: Sequence[Point], quiet: bool) -> None:
    from vs2_plugin.sweep.evaluate import evaluate

    args = made.args
    for model, metrics in evaluate(args, backbone, points, quiet):
        if model in made.pending:
            result = {
                "dataset": args.dataset, "model": model, "pretrained": args.pretrained, "task": TASK,
                "metrics": metrics, "language": args.language,
            }  # fmt: skip
            write_result(made.files[model], result)
            made.results[model] = result


def _finish(made: Plan) -> Summary:
    from vs2_plugin.sweep.figures import draw

    table, results = made.file("sweep", ".csv"), made.results
    write_table(table, [results[model] for model in made.files])
    values = {model: 100 * headline(result) for model, result in results.items()}
    pictures = []
    for grid in made.grids:

        def name(what: str, text: str = grid.text) -> Path:
            return made.file(f"{text}{'@' + what if what else ''}", ".png")

        pictures += draw(grid, values, values[grid.backbone], name)
    best = max(made.points, key=values.__getitem__)
    plain = {backbone: values[backbone] for backbone in made.backbones}
    return Summary(plain, (best, values[best]), [table, *pictures])
