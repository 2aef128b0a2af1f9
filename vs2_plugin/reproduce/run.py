"""Trains what is missing, evaluates what is not there yet, and gathers the numbers.

Trainings run in this process; evaluations are the stock ``clip_benchmark eval``. All that is done is found again:
checkpoints by their names, which tell their settings, and results by the digest of their checkpoint. So an
interruption loses at most the run at hand.

    OUT/results/…/{model}.json, {model}.images.npz    results, as clip_benchmark writes them
    OUT/prompts/….json                                prompts, for --custom_template_file
    OUT/log.txt                                       what the evaluations said on stderr
    OUT/TABLE.md, TABLE.json                          the tables
    OUT/index.html                                    all of them on a page
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
from itertools import groupby
from pathlib import Path

import numpy as np

from vs2_plugin.checkpoint.checkpoint import Checkpoint
from vs2_plugin.checkpoint.store import Store
from vs2_plugin.data.naming import DataSet
from vs2_plugin.errors import CheckpointError, DataError, Vs2Error
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
    """Some tables, the runs that their numbers come from, and the numbers."""

    tables: Sequence[Table]
    out: Path
    """The folder of results and tables."""
    dataset_root: str
    """Where data sets are; ``{dataset}`` is filled in."""
    quiet: bool = False
    """True: trainings and evaluations show no progress."""
    report: Callable[[str], None] = _LOG.info
    """Takes a line whenever something begins."""
    problems: dict[Hashable, tuple[str, ...]] = field(default_factory=dict)
    """A run or a checkpoint that could not be made -> why; one reason or several."""
    _looked_for: dict[Hashable, Missing | None] = field(default_factory=dict, init=False)
    _numbers: dict[Evaluation, int] = field(default_factory=dict, init=False)
    """The place of every evaluation in this run, from 1."""

    @property
    def cells(self) -> list[Cell]:
        """The cells of all tables that something is to be run for."""
        return [cell for table in self.tables for cell in table.cells if cell.model is not None]

    @property
    def stand_in(self) -> bool:
        """True if it all runs on the stand-in, which is there and small."""
        return self.tables[0].stand_in

    @cached_property
    def store(self) -> Store:
        """Where the checkpoints are."""
        return Store.default()

    # ------------------------------------------------------------------ what is to be done

    def trainings(self) -> list[tuple[Sae, list[int]]]:
        """Return the trainings that are missing, with their seeds."""
        wanted = dict.fromkeys((cell.sae, seed) for cell in self.cells if cell.sae for seed in cell.seeds)
        missing: dict[Sae, list[int]] = {}
        for sae, seed in wanted:
            if self.checkpoint(sae.name(seed)) is None:
                missing.setdefault(sae, []).append(seed)
        return list(missing.items())

    def evaluations(self) -> list[list[Evaluation]]:
        """Return the evaluations whose results are not there or of another checkpoint, by their commands."""
        wanted = dict.fromkeys(run for cell in self.cells for seed in cell.seeds for run in cell.evaluations(seed))
        missing = [run for run in wanted if not self.is_done(run)]

        def command(run: Evaluation) -> tuple[Hashable, ...]:
            alone = run.model if run.file != f"{run.model}.json" else ""  # its name cannot stand in a file's
            return run.backbone, run.weights, run.dataset, run.prompts, alone

        order = {key: number for number, key in enumerate(dict.fromkeys(map(command, missing)))}
        missing.sort(key=lambda run: order[command(run)])
        return [list(group) for _, group in groupby(missing, command)]

    def checkpoint(self, name: str) -> Checkpoint | None:
        """Return the checkpoint of that name, if it is there and can be read."""
        try:
            return self.store.find(name)
        except CheckpointError:
            return None

    def is_done(self, run: Evaluation) -> bool:
        """Return whether the results are there, whole, and of the checkpoint as it is now."""
        file = self.results(run)
        try:
            found, name = read_run(file), DataSet.of(run.dataset, self.dataset_root).name
        except DataError:
            return False
        same = (found.model, found.pretrained, found.dataset) == (run.model, run.weights, name)
        if not same or not images_file(file).is_file():
            return False
        checkpoint = self.checkpoint(run.checkpoint) if run.checkpoint else None
        used = found.fact("checkpoint_digest")
        return used == (checkpoint.digest[:16] if checkpoint else None) and bool(checkpoint) == bool(run.checkpoint)

    # ------------------------------------------------------------------ where things are

    def results(self, run: Evaluation) -> Path:
        """Return the results file of a run."""
        parts = (run.dataset, run.weights, _prompt_name(run.prompts))
        return self.out / "results" / "_".join(re.sub(r"[^\w.+-]+", "-", part) for part in parts if part) / run.file

    def prompts(self, run: Evaluation) -> Path:
        """Return the file of its prompts."""
        return self.out / "prompts" / f"{_prompt_name(run.prompts)}.json"

    # ------------------------------------------------------------------ the commands

    def request(self, sae: Sae, seeds: Sequence[int]) -> TrainRequest:
        """Return the training of some seeds."""
        damaged = any((self.store.checkpoints / sae.name(seed)).exists() for seed in seeds)
        request = replace(sae.request(seeds, self.dataset_root), overwrite=damaged)
        return replace(request, num_workers=0, amp=False) if self.stand_in else request  # as fast on every processor

    def evaluate_words(self, runs: Sequence[Evaluation]) -> list[str]:
        """Return the command that evaluates models which differ in nothing else."""
        first = runs[0]
        one = len(runs) == 1
        output = str(self.results(first) if one else self.results(first).parent).replace("{", "{{").replace("}", "}}")
        words = ["clip_benchmark", "eval", "--model", *(run.model for run in runs), "--pretrained", first.weights]
        words += ["--dataset", first.dataset, "--dataset_root", self.dataset_root]
        if first.prompts:
            words += ["--custom_template_file", str(self.prompts(first))]
        if self.stand_in:
            words += ["--num_workers", "0", "--no_amp"]
        return [*words, "--output", output + ("" if one else os.sep + "{model}.json"), "--quiet"]

    def commands(self) -> Iterator[str]:
        """Yield all that is still to be done, as a person would type it, and before it what only a person can do."""
        trainings, groups = self.trainings(), self.evaluations()
        folders = [] if self.stand_in else self._folders(trainings, groups)
        missing = [missing_data(name, self.dataset_root, split) for name, split in folders]
        yield from dict.fromkeys(f"# missing: {one}" for one in missing if one)
        yield from (_typed(path, text) for path, text in self._preparations(groups))
        for sae, seeds in trainings:
            yield shlex.join(self.request(sae, seeds).words())
        for runs in groups:
            yield shlex.join(self.evaluate_words(runs))

    def _preparations(self, groups: Sequence[Sequence[Evaluation]]) -> list[tuple[Path, str | None]]:
        """Return the folders that the commands need, and the files with their text."""
        needed: dict[Path, str | None] = {self.results(runs[0]).parent: None for runs in groups}
        for run in (runs[0] for runs in groups if runs[0].prompts):
            # clip_benchmark takes those of imagenet1k for every data set that has none of its own in the file.
            needed[self.prompts(run)] = json.dumps({"imagenet1k": list(run.prompts)})
        return list(needed.items())

    # ------------------------------------------------------------------ doing it

    def run(self) -> None:
        """Do all of it. What cannot be done is kept in :attr:`problems`, and the rest goes on."""
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
        for name, split in self._folders(trainings, groups):  # before anything is waited for
            self._data(name, split)
        for sae, seeds in trainings:
            self._train(sae, seeds)
        for group in groups:
            self._evaluate(group)

    def _folders(
        self, trainings: Sequence[tuple[Sae, list[int]]], groups: Sequence[Sequence[Evaluation]]
    ) -> list[tuple[str, str]]:
        """Return the data sets that only the user can put there, with their splits."""
        needed = [(name, "train") for sae, _ in trainings for name in sae.datasets]
        needed += [(runs[0].dataset, "test") for runs in groups]
        return [(name, split) for name, split in dict.fromkeys(needed) if name.startswith("wds/")]

    def missing(self) -> dict[str, list[str]]:
        """Return how to get what was looked for and not found -> why it is not there, each once."""
        found: dict[str, list[str]] = {}
        for one in dict.fromkeys(missing for missing in self._looked_for.values() if missing and missing.remedy):
            found.setdefault(one.remedy, []).append(one.why)
        return found

    def _missing(
        self, backbone: str, weights: str, datasets: Sequence[str], split: str, encoders: Sequence[str] = ()
    ) -> tuple[str, ...]:
        """Return all reasons why a run cannot be made, in words."""
        found = [self._data(name, split) for name in datasets]
        what = f"the weights of {','.join(filter(None, (backbone, weights)))}"
        found.append(self._look_for(what, missing_weights, backbone, weights))
        found += [self._look_for(f"the retrieval encoder {name}", missing_encoder, name) for name in encoders]
        return tuple(missing.what for missing in found if missing)

    def _data(self, name: str, split: str) -> Missing | None:
        if name.startswith("wds/"):
            return self._look_for("", missing_data, name, self.dataset_root, split)
        return self._look_for(f"the data set {name}", missing_data, name, self.dataset_root, "")  # all of its splits

    def _look_for(self, what: str, look: Callable[..., Missing | None], *given: str) -> Missing | None:
        """Look for something, or fetch it, once in this run. That it is missing is said at once."""
        if self.stand_in:  # it is there
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
        """Train some seeds, if that can be done."""
        encoders = dict(sae.flags).get("retrieval_encoder", ())
        problems = self._missing(sae.backbone, sae.weights, sae.datasets, "train", encoders)
        if not problems:
            request = self.request(sae, seeds)
            self.report(f"\n$ {shlex.join(request.words())}")
            try:
                train(replace(request, quiet=self.quiet), report=self.report)
            except Exception as error:  # this package's own, or the memory, or the disk: the other cells go on
                problem = _flat(str(error) if isinstance(error, Vs2Error) else f"{type(error).__name__}: {error}")
                _LOG.warning("not trained: %s", problem)
                problems = (problem,)
        if problems:
            self.problems |= {sae.name(seed): problems for seed in seeds}

    def _evaluate(self, runs: Sequence[Evaluation]) -> None:
        """Evaluate what can be: one model that fails does not keep the others from it."""
        # A training may have given the same checkpoint again: then it is done.
        batches = [[run for run in runs if self._is_possible(run) and not self.is_done(run)]]
        while batches:
            batch = batches.pop(0)
            problem = self._command(batch) if batch else None
            left = [run for run in batch if not self.is_done(run)]
            if left and len(batch) == 1:
                self.problems[batch[0]] = (problem or "clip_benchmark wrote no results for it",)
            elif left:  # one of them is to blame: if not even the first went well, each gets a command of its own
                batches += [left] if len(left) < len(batch) else [[run] for run in left]

    def _is_possible(self, run: Evaluation) -> bool:
        """Return whether all that an evaluation needs is there; else the reasons are kept."""
        problems = self.problems.get(run.checkpoint) or self._missing(run.backbone, run.weights, [run.dataset], "test")
        if problems:
            self.problems[run] = problems
        return not problems

    def _command(self, batch: Sequence[Evaluation]) -> str | None:
        """Evaluate models by one command; return why it failed, or None."""
        words = self.evaluate_words(batch)
        self.report(f"\n$ {shlex.join(words)}")
        return run_command(words, self.out / "log.txt", self.quiet, self._announcer(batch))

    def _announcer(self, batch: Sequence[Evaluation]) -> Callable[[], None]:
        """Return a function that reports which model the command has come to, which its own bars do not tell."""
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
        """Return the cells of a table with what was found."""
        found = {(cell.row, cell.column): self._measure(cell) for cell in table.cells}
        return [
            best(cell, [found[row, cell.column] for row in cell.best_of]) if cell.best_of else measured
            for cell, measured in zip(table.cells, found.values(), strict=True)
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
            "transductive": any(found.transductive for found in map(self.checkpoint, names) if found),
        }
        return Measured(cell, values, tuple(dict.fromkeys(problems)), facts)

    def _trouble(self, cell: Cell, seed: int) -> tuple[str, ...]:
        """Return why nothing could be run for a cell."""
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
        number = read_run(file).number(name)
        if number is None:
            raise DataError(f"{file} has no {name}; run the same command again")
        return 100 * number

    def finish(self) -> tuple[list[str], int]:
        """Write the tables and the page of them all. Returns them as text, and how many cells could not be measured.

        Raises:
            DataError: a page is there that no reproduction wrote; the tables are written then.
        """
        texts, missing, measured = [], 0, []
        for table in self.tables:
            cells = self.measured(table)
            missing += sum(bool(one.problems) for one in cells)
            texts.append(markdown(table, cells))
            write(table, cells, self.out)
            measured.append((table, cells))
        write_page(measured, self.out)
        return texts, missing


def _typed(path: Path, text: str | None) -> str:
    """Return the command that makes a folder, or a file with a text."""
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
    """Return when a file was written; None if it is not there."""
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return None


def _gain(plain: Path, steered: Path, name: str | None) -> float:
    """Return how many points more of a class's images are classified correctly; without a name, the most of any."""
    before, after = (Images.read(images_file(file)) for file in (plain, steered))
    if not before.classes == after.classes != ():  # without names, nothing bounds the classes that the files number
        raise DataError(f"{plain} and {steered} name {len(before.classes)} and {len(after.classes)} classes; expected "
                        "those of one data set, evaluated with VS2_PER_IMAGE=1")  # fmt: skip
    gains = _recalls(after) - _recalls(before)
    if name is None:
        return float(np.nanmax(gains))
    if name not in after.classes:
        raise DataError(f"{steered}: there is no class {name!r}; the classes: {', '.join(after.classes[:5])}, ...")
    return float(gains[after.classes.index(name)])


def _recalls(images: Images) -> Array:
    """Return the percentage of each class's images that were classified correctly; NaN for a class without images."""
    count = len(images.classes)
    right = np.bincount(images.target[images.correct], minlength=count)
    with np.errstate(invalid="ignore"):
        return np.asarray(100 * right / np.bincount(images.target, minlength=count))
