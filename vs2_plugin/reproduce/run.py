"""Trains missing checkpoints, makes missing results, and gathers the numbers.

Trainings run in this process; evaluations are the stock ``clip_benchmark eval``. Finished work is recognised later:
checkpoints by their names, which include a digest of their settings, and results by the digest of their checkpoint. So
an interruption loses at most the current run.

    OUT/results/…/{model}.json, {model}.images.npz    results, as clip_benchmark writes them
    OUT/prompts/….json                                prompts, for --custom_template_file
    OUT/log.txt                                       stderr of the evaluations
    OUT/TABLE.md, TABLE.json                          the tables
    OUT/index.html                                    all tables on a page
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from vs2_plugin.checkpoint.checkpoint import Checkpoint
from vs2_plugin.checkpoint.store import Store
from vs2_plugin.data.naming import DataSet
from vs2_plugin.errors import CheckpointError, DataError, Vs2Error, is_interruption
from vs2_plugin.files import json_digest
from vs2_plugin.reproduce.cells import Cell, Evaluation, Sae, Table
from vs2_plugin.reproduce.command import run_command
from vs2_plugin.reproduce.fetch import Missing, missing_data, missing_encoder, missing_weights
from vs2_plugin.reproduce.page import write_page
from vs2_plugin.reproduce.table import Measured, best, markdown, write
from vs2_plugin.results.images import Array, Images, images_file
from vs2_plugin.results.runs import read_run
from vs2_plugin.text import one_line
from vs2_plugin.training.request import TrainRequest
from vs2_plugin.training.run import train

__all__ = ["Reproduction"]

_LOG = logging.getLogger(__name__)
_METRICS = {"accuracy": "acc1", "coverage": "vs2_coverage"}


@dataclass
class Reproduction:
    """Tables, with the trainings and evaluations that their numbers come from, and the numbers."""

    tables: Sequence[Table]
    out: Path
    """The folder of results and tables."""
    dataset_root: str
    """Root of the data sets, in which ``{dataset}`` is filled in."""
    quiet: bool = False
    """Whether trainings and evaluations hide their progress."""
    report: Callable[[str], None] = _LOG.info
    """Called with a line of text whenever a step begins."""
    problems: dict[Hashable, tuple[str, ...]] = field(default_factory=dict)
    """Evaluation, or name of a checkpoint, that could not be made -> the reasons."""
    _looked_for: dict[Hashable, Missing | None] = field(default_factory=dict, init=False)
    _numbers: dict[Evaluation, int] = field(default_factory=dict, init=False)
    """The number of every evaluation in this run, from 1."""

    @property
    def cells(self) -> list[Cell]:
        """The cells of all tables that have a model to run."""
        return [cell for table in self.tables for cell in table.cells if cell.model is not None]

    @property
    def stand_in(self) -> bool:
        """Whether all tables run on the stand-in, which is small and needs no download."""
        return self.tables[0].stand_in

    @cached_property
    def store(self) -> Store:
        """The store of the checkpoints."""
        return Store.default()

    # ------------------------------------------------------------------ remaining work

    def trainings(self) -> list[tuple[Sae, list[int]]]:
        """Return the trainings whose checkpoints are missing, with the missing seeds."""
        pairs = dict.fromkeys((cell.sae, seed) for cell in self.cells if cell.sae for seed in cell.seeds)
        missing: dict[Sae, list[int]] = {}
        for sae, seed in pairs:
            if self.checkpoint(sae.name(seed)) is None:
                missing.setdefault(sae, []).append(seed)
        return list(missing.items())

    def evaluations(self) -> list[list[Evaluation]]:
        """Return the evaluations whose results are missing or of another checkpoint, grouped by command."""
        runs = dict.fromkeys(run for cell in self.cells for seed in cell.seeds for run in cell.evaluations(seed))
        commands: dict[Hashable, list[Evaluation]] = {}
        for run in runs:
            if not self.is_done(run):
                alone = run.model if run.file != f"{run.model}.json" else ""  # its name is no valid file name
                commands.setdefault((run.backbone, run.weights, run.dataset, run.prompts, alone), []).append(run)
        return list(commands.values())

    def checkpoint(self, name: str) -> Checkpoint | None:
        """Return the checkpoint of that name; None if it is missing or unreadable."""
        try:
            return self.store.find(name)
        except CheckpointError:
            return None

    def is_done(self, run: Evaluation) -> bool:
        """Return whether the results exist, with per-image results, and are of the present checkpoint."""
        file = self.results(run)
        try:
            result, name = read_run(file), DataSet.of(run.dataset, self.dataset_root).name
        except DataError:
            return False
        same = (result.model, result.pretrained, result.dataset) == (run.model, run.weights, name)
        if not same or (result.number("acc1") is not None and not images_file(file).is_file()):
            return False
        checkpoint = self.checkpoint(run.checkpoint) if run.checkpoint else None
        used = result.fact("checkpoint_digest")
        return used == (checkpoint.digest[:16] if checkpoint else None) and bool(checkpoint) == bool(run.checkpoint)

    # ------------------------------------------------------------------ files

    def results(self, run: Evaluation) -> Path:
        """Return the results file of a run."""
        parts = (run.dataset, run.weights, _prompt_name(run.prompts))
        return self.out / "results" / "_".join(re.sub(r"[^\w.+-]+", "-", part) for part in parts if part) / run.file

    def prompts(self, run: Evaluation) -> Path:
        """Return the file of the prompts of a run."""
        return self.out / "prompts" / f"{_prompt_name(run.prompts)}.json"

    # ------------------------------------------------------------------ the commands

    def request(self, sae: Sae, seeds: Sequence[int]) -> TrainRequest:
        """Return the request to train some seeds, which overwrites damaged checkpoints."""
        damaged = any((self.store.checkpoints / sae.name(seed)).exists() for seed in seeds)
        request = replace(sae.request(seeds, self.dataset_root), overwrite=damaged)
        return replace(request, num_workers=0, amp=False) if self.stand_in else request  # no slower, on any processor

    def evaluate_words(self, runs: Sequence[Evaluation]) -> list[str]:
        """Return the command that evaluates several models, whose evaluations are otherwise equal."""
        first = runs[0]
        alone = len(runs) == 1
        output = str(self.results(first) if alone else self.results(first).parent).replace("{", "{{").replace("}", "}}")
        words = ["clip_benchmark", "eval", "--model", *(run.model for run in runs), "--pretrained", first.weights]
        words += ["--dataset", first.dataset, "--dataset_root", self.dataset_root]
        if first.prompts:
            words += ["--custom_template_file", str(self.prompts(first))]
        if self.stand_in:
            words += ["--num_workers", "0", "--no_amp"]
        return [*words, "--output", output + ("" if alone else os.sep + "{model}.json"), "--quiet"]

    def commands(self) -> Iterator[str]:
        """Yield the remaining commands as a person would type them, after comments on data sets that are missing."""
        trainings, groups = self.trainings(), self.evaluations()
        folders = [] if self.stand_in else self._folders(trainings, groups)
        gaps = [missing_data(name, self.dataset_root, split) for name, split in folders]
        yield from dict.fromkeys(f"# missing: {gap}" for gap in gaps if gap)
        yield from (_typed(path, text) for path, text in self._preparations(groups))
        for sae, seeds in trainings:
            yield shlex.join(self.request(sae, seeds).words())
        for runs in groups:
            yield shlex.join(self.evaluate_words(runs))

    def _preparations(self, groups: Sequence[Sequence[Evaluation]]) -> list[tuple[Path, str | None]]:
        """Return path -> text of the files that the commands need; the text is None for folders."""
        needed: dict[Path, str | None] = {self.results(runs[0]).parent: None for runs in groups}
        for run in (runs[0] for runs in groups if runs[0].prompts):
            # clip_benchmark uses the prompts of imagenet1k for every data set that the file does not name.
            needed[self.prompts(run)] = json.dumps({"imagenet1k": list(run.prompts)})
        return list(needed.items())

    # ------------------------------------------------------------------ execution

    def run(self) -> None:
        """Run all trainings and evaluations. Failures are collected in :attr:`problems`, and the rest goes on."""
        self.out.mkdir(parents=True, exist_ok=True)
        trainings, groups = self.trainings(), self.evaluations()
        runs = [run for group in groups for run in group]
        count = sum(len(seeds) for _, seeds in trainings)
        self.report(f"# checkpoints to train: {count}; models to evaluate: {len(runs)}")
        for path, text in self._preparations(groups):
            self.report(f"$ {_typed(path, text)}")
            (path if text is None else path.parent).mkdir(parents=True, exist_ok=True)
            if text is not None:
                path.write_text(text + "\n")
        self._numbers = {run: number for number, run in enumerate(runs, 1)}
        for name, split in self._folders(trainings, groups):  # before any long training
            self._data(name, split)
        for sae, seeds in trainings:
            self._train(sae, seeds)
        for group in groups:
            self._evaluate(group)

    def _folders(
        self, trainings: Sequence[tuple[Sae, list[int]]], groups: Sequence[Sequence[Evaluation]]
    ) -> list[tuple[str, str]]:
        """Return the data sets that only the user can provide (``wds/…``), with their splits."""
        needed = [(name, "train") for sae, _ in trainings for name in sae.datasets]
        needed += [(runs[0].dataset, "test") for runs in groups]
        return [(name, split) for name, split in dict.fromkeys(needed) if name.startswith("wds/")]

    def missing(self) -> dict[str, list[str]]:
        """Return remedy -> reasons, for all weights, encoders and data sets that were not found."""
        reasons: dict[str, list[str]] = {}
        for gap in dict.fromkeys(missing for missing in self._looked_for.values() if missing and missing.remedy):
            reasons.setdefault(gap.remedy, []).append(gap.why)
        return reasons

    def _missing(
        self, backbone: str, weights: str, datasets: Sequence[str], split: str, encoders: Sequence[str] = ()
    ) -> tuple[str, ...]:
        """Return all weights, encoders and data sets that a run needs but that are missing, in words."""
        gaps = [self._data(name, split) for name in datasets]
        label = f"the weights of {','.join(filter(None, (backbone, weights)))}"
        gaps.append(self._look_for(label, missing_weights, backbone, weights))
        gaps += [self._look_for(f"the retrieval encoder {name}", missing_encoder, name) for name in encoders]
        return tuple(missing.what for missing in gaps if missing)

    def _data(self, name: str, split: str) -> Missing | None:
        if name.startswith("wds/"):
            return self._look_for("", missing_data, name, self.dataset_root, split)
        return self._look_for(f"the data set {name}", missing_data, name, self.dataset_root, "")  # all of its splits

    def _look_for(self, what: str, look: Callable[..., Missing | None], *given: str) -> Missing | None:
        """Call ``look(*given)``, once in this run, to find or fetch something; log a warning if it is missing."""
        if self.stand_in:  # comes with the package
            return None
        key = (look, *given)
        if key not in self._looked_for:
            if what:  # it may have to be fetched
                self.report(f"# looking for {what}")
            missing = look(*given)
            if missing and missing not in self._looked_for.values():
                _LOG.warning("missing: %s", one_line(missing.why, 200))
            self._looked_for[key] = missing
        return self._looked_for[key]

    def _train(self, sae: Sae, seeds: Sequence[int]) -> None:
        """Train some seeds; record in :attr:`problems` why that failed, if it did."""
        encoders = dict(sae.flags).get("retrieval_encoder", ())
        problems = self._missing(sae.backbone, sae.weights, sae.datasets, "train", encoders)
        if not problems:
            request = self.request(sae, seeds)
            self.report(f"\n$ {shlex.join(request.words())}")
            try:
                train(replace(request, quiet=self.quiet), report=self.report)
            except Exception as error:  # whatever failed, even memory or disk: the other cells go on
                if is_interruption(error):
                    raise
                problem = _flat(str(error) if isinstance(error, Vs2Error) else f"{type(error).__name__}: {error}")
                _LOG.warning("not trained: %s", problem)
                problems = (problem,)
        if problems:
            self.problems |= {sae.name(seed): problems for seed in seeds}

    def _evaluate(self, runs: Sequence[Evaluation]) -> None:
        """Evaluate all models that can be evaluated: one model that fails does not stop the others."""
        # A training may have made the same checkpoint again, whose results exist already.
        batches = [[run for run in runs if self._is_possible(run) and not self.is_done(run)]]
        while batches:
            batch = batches.pop(0)
            problem = self._command(batch) if batch else None
            left = [run for run in batch if not self.is_done(run)]
            if left and len(batch) == 1:
                self.problems[batch[0]] = (problem or "clip_benchmark wrote no results for it",)
            elif left:  # one model failed: retry the rest together, or each alone if not even the first succeeded
                batches += [left] if len(left) < len(batch) else [[run] for run in left]

    def _is_possible(self, run: Evaluation) -> bool:
        """Return whether an evaluation has all it needs; else record the reasons in :attr:`problems`."""
        problems = self.problems.get(run.checkpoint) or self._missing(run.backbone, run.weights, [run.dataset], "test")
        if problems:
            self.problems[run] = problems
        return not problems

    def _command(self, batch: Sequence[Evaluation]) -> str | None:
        """Evaluate models by one command; return the reason if it failed, else None."""
        words = self.evaluate_words(batch)
        self.report(f"\n$ {shlex.join(words)}")
        return run_command(words, self.out / "log.txt", self.quiet, self._announcer(batch))

    def _announcer(self, batch: Sequence[Evaluation]) -> Callable[[], None]:
        """Return a function that reports the model under evaluation, which the command's progress bars do not show."""
        before = [_written(self.results(run)) for run in batch]
        said = 0

        def look() -> None:
            nonlocal said
            while said < len(batch) and (
                said == 0 or _written(self.results(batch[said - 1])) not in (None, before[said - 1])
            ):
                run = batch[said]
                number = self._numbers.get(run, said + 1)
                self.report(f"[{number} of {len(self._numbers)}] {run.model} on {run.dataset}")
                said += 1

        return look

    # ------------------------------------------------------------------ the numbers

    def measured(self, table: Table) -> list[Measured]:
        """Return the cells of a table with their numbers."""
        by_place = {(cell.row, cell.column): self._measure(cell) for cell in table.cells}
        return [
            best(cell, [by_place[row, cell.column] for row in cell.best_of]) if cell.best_of else measured
            for cell, measured in zip(table.cells, by_place.values(), strict=True)
        ]

    def _measure(self, cell: Cell) -> Measured:
        if cell.model is None:
            return Measured(cell)
        values: dict[int, float] = {}
        problems: list[str] = []
        for seed in cell.seeds:
            trouble = self._trouble(cell, seed)
            try:
                if not trouble:
                    values[seed] = self._value(cell, seed)
            except (DataError, CheckpointError) as error:
                trouble = (str(error),)
            problems += map(_flat, trouble)
        names = [cell.sae.name(seed) for seed in cell.seeds] if cell.sae else []
        facts = {
            "results": [str(self.results(run)) for seed in cell.seeds for run in cell.evaluations(seed)],
            "checkpoints": names,
            "transductive": any(saved.transductive for saved in map(self.checkpoint, names) if saved),
        }
        return Measured(cell, values, tuple(dict.fromkeys(problems)), facts)

    def _trouble(self, cell: Cell, seed: int) -> tuple[str, ...]:
        """Return why a cell's checkpoint or evaluations could not be made; empty if they could."""
        keys = [*([cell.sae.name(seed)] if cell.sae else []), *cell.evaluations(seed)]
        return next((self.problems[key] for key in keys if key in self.problems), ())

    def _value(self, cell: Cell, seed: int) -> float:
        if cell.metric == "fvu" and cell.sae and cell.spec:
            checkpoint = self.store.find(cell.sae.name(seed))
            return checkpoint.select(cell.spec.options.get("blocks"), cell.spec.method.sae)[-1].fvu
        file = self.results(cell.evaluation(seed))
        if cell.metric == "gain":
            return _gain(self.results(cell.plain), file, cell.of_class)
        name = _METRICS[cell.metric]
        result = read_run(file)
        number = result.number(name)
        if number is None:
            several = result.number("mean_average_precision") is not None
            why = "its images have several labels" if several else "run the same command again"
            raise DataError(f"{file} has no {name}; {why}")
        return 100 * number

    def finish(self) -> tuple[list[str], int]:
        """Write the tables and the page. Return the tables as text, and the number of cells with problems.

        Raises:
            DataError: the page exists, but no reproduction wrote it; the tables are written all the same.
        """
        texts, missing, measured = [], 0, []
        for table in self.tables:
            cells = self.measured(table)
            missing += sum(bool(entry.problems) for entry in cells)
            texts.append(markdown(table, cells))
            write(table, cells, self.out)
            measured.append((table, cells))
        write_page(measured, self.out)
        return texts, missing


def _typed(path: Path, text: str | None) -> str:
    """Return the command that creates a folder, or a file with a text."""
    if text is None:
        return shlex.join(["mkdir", "-p", str(path)])
    return f"mkdir -p {shlex.quote(str(path.parent))}; echo {shlex.quote(text)} > {shlex.quote(str(path))}"


def _prompt_name(prompts: Sequence[str]) -> str:
    if not prompts:
        return "harness"
    words = re.sub(r"[^A-Za-z0-9]+", "-", prompts[0])[:32].strip("-")
    return f"{words}-{json_digest(prompts)[:8]}"


def _flat(text: str) -> str:
    return " ".join(text.split())


def _written(file: Path) -> int | None:
    """Return the time of a file's last change, in ns; None if the file is missing."""
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return None


def _gain(plain: Path, steered: Path, name: str | None) -> float:
    """Return the gain in accuracy on a class's images, in points; without a name, the largest gain of any class."""
    before, after = (Images.read(images_file(file)) for file in (plain, steered))
    if not before.classes == after.classes != ():  # without names, the number of classes is unknown
        raise DataError(f"{plain} and {steered} name {len(before.classes)} and {len(after.classes)} classes; expected "
                        "those of one data set, evaluated with VS2_PER_IMAGE=1")  # fmt: skip
    gains = _recalls(after) - _recalls(before)
    if name is None:
        return float(np.nanmax(gains))
    if name not in after.classes:
        raise DataError(f"{steered}: there is no class {name!r}; the classes: {', '.join(after.classes[:5])}, ...")
    gain = float(gains[after.classes.index(name)])
    if np.isnan(gain):
        raise DataError(f"{steered}: class {name!r} has no image, so it has no gain; expected a class with images")
    return gain


def _recalls(images: Images) -> Array:
    """Return the percentage of each class's images that were classified correctly; NaN for a class without images."""
    count = len(images.classes)
    right = np.bincount(images.target[images.correct], minlength=count)
    with np.errstate(invalid="ignore"):
        return np.asarray(100 * right / np.bincount(images.target, minlength=count))
