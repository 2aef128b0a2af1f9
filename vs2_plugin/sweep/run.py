"""A sweep, from its request to its files."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from vs2_plugin.checkpoint.store import Store
from vs2_plugin.clip.backbone import check_backbone
from vs2_plugin.data.naming import DataSet
from vs2_plugin.errors import CheckpointError, DataError, HarnessError, SettingError
from vs2_plugin.files import atomic_file
from vs2_plugin.harness import preflight
from vs2_plugin.host import Evaluation, default_task
from vs2_plugin.model.parts import find_checkpoint
from vs2_plugin.names import file_stem, is_steered, weights_tag
from vs2_plugin.results.images import images_file
from vs2_plugin.results.runs import Run, read_run, write_run, write_table
from vs2_plugin.sweep import evaluate
from vs2_plugin.sweep.figures import all_best, draw, save
from vs2_plugin.sweep.grid import Grid, Point, read_grids
from vs2_plugin.sweep.request import SweepRequest
from vs2_plugin.text import counted

__all__ = ["Plan", "Summary", "plan", "sweep"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """A request, parsed and checked: the models to evaluate, and the files of their results."""

    request: SweepRequest
    grids: list[Grid]
    """The grids, one per steered model string."""
    backbones: list[str]
    """Names of the plain models."""
    files: dict[str, Path]
    """Model -> its results file; plain models first."""
    pending: list[str]
    """Models still to be evaluated; the others have results already."""
    results: dict[str, Run] = field(default_factory=dict)
    """Model -> its results, as soon as its results file is written or read."""

    @property
    def points(self) -> dict[str, Point]:
        """Model string -> point."""
        return {point.model: point for grid in self.grids for point in grid.points}

    @property
    def folder(self) -> Path:
        """Folder of the results files."""
        return next(iter(self.files.values())).parent

    def file(self, model: str, suffix: str) -> Path:
        """Return a file beside the results, named for a model string."""
        return self.folder / (_file(self.request, model).name.removesuffix(".json") + suffix)


@dataclass(frozen=True)
class Summary:
    """The outcome of a sweep."""

    measure: str
    """What the values are: top-1 accuracy, or mean average precision."""
    plain: dict[str, float]
    """Plain model -> value in percent."""
    best: float
    """Highest value of the points, in percent; points that read test labels count only if all do."""
    models: list[str]
    """Model strings that reach the highest value."""
    written: list[Path]
    """Files of the table and the figures."""


def plan(request: SweepRequest) -> Plan:
    """Parse the model strings and check the whole request, without loading a model.

    Raises:
        Vs2Error: the first fault that is found.
    """
    named = DataSet.of(request.dataset, request.dataset_root)
    request = replace(request, dataset=named.name, dataset_root=named.template)
    names, output = request.model, request.output
    grids = read_grids(names)
    if not grids:
        raise SettingError(f"--model {' '.join(names)} names no steered model; expected one such as "
                           f"vs2:{names[0]}@gamma=1:3:0.1")  # fmt: skip
    plain = [name for name in names if not is_steered(name)]
    backbones = list(dict.fromkeys([*plain, *(grid.backbone for grid in grids)]))
    models = list(dict.fromkeys([*backbones, *(point.model for grid in grids for point in grid.points)]))
    files = {model: _file(request, model) for model in models}
    if len(set(files.values())) < len(files):
        raise SettingError(f"--output {output!r} names one file for several points; put {{model}} into its name")
    if len({file.parent for file in files.values()}) > 1:
        raise SettingError(f"--output {output!r}: expected {{model}} in the file's name, not in its folder's")
    pending = [model for model, file in files.items() if not (request.skip_existing and file.exists())]
    planned = Plan(request, grids, backbones, files, pending)
    planned = replace(planned, request=replace(request, num_workers=_check(planned)))
    try:
        planned.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HarnessError(
            f"the results could not be written to {planned.folder}: {error.strerror}; give another --output"
        ) from None
    return planned


def _file(request: SweepRequest, model: str) -> Path:
    weights = weights_tag(model, request.pretrained)
    return Path(Evaluation.of(request, model=file_stem(model), pretrained=weights).output_file)


def _check(planned: Plan) -> int:
    """Run the harness's own checks on one point of each kind, as they do not depend on strengths. Return the number of
    loader workers."""
    request = planned.request
    for backbone in planned.backbones:
        check_backbone(backbone, request.pretrained)
    _check_task(request.dataset)
    kinds: dict[tuple[object, ...], str] = {}
    for model, point in planned.points.items():
        words = [pair for pair in point.spec.all_options.items() if not isinstance(pair[1], float)]
        if model in planned.pending:
            kinds.setdefault((point.spec.name, point.spec.backbone, point.spec.checkpoint, *words), model)
    fewer = preflight.check(
        [Evaluation.of(request, model=model, skip_existing=False) for model in kinds.values()]
    )
    return fewer.get(request.dataset, request.num_workers)


def _check_task(dataset: str) -> None:
    task = default_task(dataset)
    if task != SweepRequest.task:
        raise HarnessError(f"the task of {dataset} is {task}; a sweep evaluates {SweepRequest.task} only")


def sweep(planned: Plan, quiet: bool = False) -> Summary:
    """Evaluate the pending models, and write all files.

    Raises:
        Vs2Error: something cannot be loaded, or an existing results file is invalid or of another evaluation.
    """
    for model, file in planned.files.items():
        if model not in planned.pending:
            planned.results[model] = _read(file, model, planned)
    lost = [file.name for model in planned.pending if images_file(file := planned.files[model]).exists()]
    if lost:
        _LOG.warning(
            "%s with per-image results will be replaced by results without, which a sweep does not keep: %s",
            counted(len(lost), "result"), ", ".join(lost[:3]) + ", ..." * (len(lost) > 3),
        )  # fmt: skip
    points = planned.points
    for backbone in planned.backbones:
        mine = [points[m] for m in planned.pending if m in points and points[m].spec.backbone == backbone]
        if mine or backbone in planned.pending:
            with warnings.catch_warnings():
                if quiet:  # --num_workers is clip_benchmark's, for equal batches of shards; torch warns on few cores
                    warnings.filterwarnings("ignore", "This DataLoader will create")
                _evaluate(planned, backbone, mine, quiet)
    return _finish(planned)


def _read(file: Path, model: str, planned: Plan) -> Run:
    """Return the existing results of a model. Raises DataError if they are not of this evaluation, or changed."""
    request = planned.request
    try:
        run = read_run(file)
        if run.headline is None:
            raise DataError(f"{file} has no accuracy")
        recorded = run.model, run.pretrained, run.dataset, run.language
        if recorded != (model, weights_tag(model, request.pretrained), request.dataset, request.language):
            raise DataError(f"{file} holds results of {' '.join(filter(None, recorded))}, and not of this sweep")
        if run.changed:
            raise DataError(f"{file} was changed after it was written, according to the digest in it")
        split = run.fact("split") or "test"
        if split != request.split:
            unsaid = "" if run.fact("split") else ", or of an earlier version, which named no split for plain models"
            raise DataError(f"{file} holds results of the split {split!r}{unsaid}; expected {request.split!r}")
        point = planned.points.get(model)
        if point is None:
            return run
        digest = run.fact("checkpoint_digest")  # missing in results of early versions
        if digest is not None and _digest(point, request) not in (None, digest):
            raise DataError(f"{file} holds results of another SAE than {run.fact('checkpoint')} is now")
        if run.fact("option_files") != point.spec.option_files:
            earlier = " or by an earlier version, which did not record it" if run.fact("option_files") is None else ""
            raise DataError(f"{file} holds results with another content of a file that {model} names{earlier}")
    except DataError as error:
        raise DataError(f"{error}; remove it, give another --output, or omit --skip_existing") from error
    return run


def _digest(point: Point, request: SweepRequest) -> str | None:
    """Return the digest of a point's checkpoint, shortened as in results; None if there is no checkpoint."""
    home = DataSet.of(request.dataset, request.dataset_root).home
    with suppress(CheckpointError):
        checkpoint = find_checkpoint(point.spec, Store.default(), request.pretrained, request.dataset, home)
        return None if checkpoint is None else checkpoint.digest[:16]
    return None


def _evaluate(planned: Plan, backbone: str, points: Sequence[Point], quiet: bool) -> None:
    request = planned.request
    file = planned.file("sweep", ".settings")
    known, settings = _known(file), evaluate.Settings()

    def check(found: evaluate.Settings) -> None:
        settings.update(found)
        _require_same(planned, known, found)

    for model, metrics in evaluate.evaluate(request, backbone, points, quiet, check):
        if model in planned.pending:
            weights = weights_tag(model, request.pretrained)
            about = request.dataset, model, weights, request.task, request.language
            told = {} if request.split == "test" else {"vs2_split": request.split}  # of the plain model's results too
            run = Run(planned.files[model], *about, {**metrics, **told})
            planned.results[model] = write_run(run)
            known[run.path.name] = settings
            with atomic_file(file) as scratch:
                scratch.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def _known(file: Path) -> dict[str, evaluate.Settings]:
    """Return what earlier results depend on, by the names of their files; nothing of those by ``clip_benchmark eval``
    or an earlier version."""
    with suppress(OSError, ValueError):
        known = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(known, dict):
            return {name: settings for name, settings in known.items() if isinstance(settings, dict)}
    return {}


def _require_same(planned: Plan, known: Mapping[str, evaluate.Settings], settings: evaluate.Settings) -> None:
    """Raise DataError if an existing result is of other images, class names or prompts, or of another precision."""
    for run in planned.results.values():
        earlier = known.get(run.path.name, settings)
        different = " and ".join(name for name in settings if earlier.get(name) != settings[name])
        if different:
            raise DataError(
                f"{run.path} is of other {different}; remove it, give another --output, or omit --skip_existing"
            )


def _finish(planned: Plan) -> Summary:
    """Write the table and the figures, and return the summary."""
    table, runs = planned.file("sweep", ".csv"), planned.results
    write_table(table, [runs[model] for model in planned.files])
    values = {model: 100 * (run.headline or 0.0) for model, run in runs.items()}
    measure = next(iter(runs.values())).measure
    pictures = [
        save(figure, planned.file(f"{grid.text}{'@' + what if what else ''}", ".png"), "vs2 sweep")
        for grid in planned.grids
        for what, figure in draw(grid, values, values[grid.backbone], measure)
    ]
    # An oracle reads the labels of the test images, and is not compared with the others.
    own = [model for model in planned.points if runs[model].labels != "oracle"] or planned.points
    models = all_best({model: values[model] for model in own})
    plain = {backbone: values[backbone] for backbone in planned.backbones}
    return Summary(measure, plain, values[models[0]], models, [table, *pictures])
