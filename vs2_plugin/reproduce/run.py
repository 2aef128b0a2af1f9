"""Trains what is missing, evaluates what is not there yet, and gathers the numbers.

Trainings run in this process, by the command's own entry; evaluations are the stock ``clip_benchmark eval``. All that
is done is found again: checkpoints by their names, which tell their settings, and results by the digest of their
checkpoint. So an interruption loses at most the run at hand.

    OUT/results/…/{model}.json, {model}.images.npz    results, as clip_benchmark writes them
    OUT/prompts/….json                                prompts, for --custom_template_file
    OUT/log.txt                                       what the evaluations said on stderr
    OUT/TABLE.md, TABLE.json                          the tables
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from vs2_plugin.checkpoint.checkpoint import Checkpoint
from vs2_plugin.checkpoint.store import Store
from vs2_plugin.errors import CheckpointError, DataError, Vs2Error
from vs2_plugin.reproduce.cells import Cell, Evaluation, Sae, Table
from vs2_plugin.reproduce.command import run_command
from vs2_plugin.reproduce.fetch import Missing, missing_data, missing_encoder, missing_weights
from vs2_plugin.reproduce.table import Measured, best, markdown, write
from vs2_plugin.results.images import Images, images_file
from vs2_plugin.results.runs import read_run
from vs2_plugin.text import one_line

__all__ = ["Reproduction"]

#: A command of vs2-train-sae, done in this process.
Train = Callable[[Sequence[str]], None]


@dataclass
class Reproduction:
    """What is to be done for some tables, and what has been found."""

    tables: Sequence[Table]
    out: Path
    """The folder of results and tables."""
    dataset_root: str
    """Where data sets are; ``{dataset}`` is filled in."""
    train: Train
    """Does a command of vs2-train-sae; raises what is wrong."""
    quiet: bool = False
    problems: dict[Hashable, tuple[str, ...]] = field(default_factory=dict)
    """What could not be done -> why; one reason or several."""
    _looked_for: dict[tuple, Missing | None] = field(default_factory=dict, init=False)
    _numbers: dict[Evaluation, int] = field(default_factory=dict, init=False)
    """The place of every evaluation in this run, from 1."""

    @property
    def cells(self) -> list[Cell]:
        """The cells of all tables that something is to be run for."""
        return [cell for table in self.tables for cell in table.cells if cell.model is not None]

    @property
    def stand_in(self) -> bool:
        """Whether it all runs on the stand-in, which is there and small."""
        return self.tables[0].stand_in

    @cached_property
    def store(self) -> Store:
        """Where the checkpoints are."""
        return Store.default()

    # ------------------------------------------------------------------ what is to be done

    def trainings(self) -> list[tuple[Sae, list[int]]]:
        """The trainings that are missing, with their seeds."""
        wanted = dict.fromkeys((cell.sae, seed) for cell in self.cells if cell.sae for seed in cell.seeds)
        missing = [(sae, seed) for sae, seed in wanted if self.checkpoint(sae.name(seed)) is None]
        return [
            (sae, [seed for other, seed in missing if other == sae]) for sae in dict.fromkeys(s for s, _ in missing)
        ]

    def evaluations(self) -> list[list[Evaluation]]:
        """The evaluations whose results are not there or of another checkpoint; those of one command together."""
        wanted = dict.fromkeys(run for cell in self.cells for seed in cell.seeds for run in cell.evaluations(seed))
        missing = [run for run in wanted if not self.is_done(run)]

        def command(run: Evaluation) -> tuple:
            alone = run.model if run.file != f"{run.model}.json" else ""  # its name cannot stand in a file's
            return run.backbone, run.weights, run.dataset, run.prompts, alone

        order = {key: number for number, key in enumerate(dict.fromkeys(map(command, missing)))}
        missing.sort(key=lambda run: order[command(run)])
        return [list(group) for _, group in groupby(missing, command)]

    def checkpoint(self, name: str) -> Checkpoint | None:
        """The checkpoint of that name, if it is there and can be read."""
        try:
            return self.store.find(name)
        except CheckpointError:
            return None

    def is_done(self, run: Evaluation) -> bool:
        """Whether the results are there, whole, and of the checkpoint as it is now."""
        file = self.results(run)
        try:
            found = read_run(file)
        except DataError:
            return False
        same = (found.model, found.pretrained, found.dataset) == (run.model, run.weights, run.dataset)
        if not same or not images_file(file).is_file():
            return False
        checkpoint = self.checkpoint(run.checkpoint) if run.checkpoint else None
        return found.fact("checkpoint_digest") == (checkpoint.digest[:16] if checkpoint else None) and bool(checkpoint) == bool(run.checkpoint)

    # ------------------------------------------------------------------ where things are

    def results(self, run: Evaluation) -> Path:
        """The results file of a run."""
        parts = (run.dataset, run.weights, _prompt_name(run.prompts))
        return self.out / "results" / "_".join(re.sub(r"[^\w.+-]+", "-", part) for part in parts if part) / run.file

    def prompts(self, run: Evaluation) -> Path:
        """The file of its prompts."""
        return self.out / "prompts" / f"{_prompt_name(run.prompts)}.json"

    # ------------------------------------------------------------------ the commands

    @property
    def _extra(self) -> list[str]:
        return ["--num_workers", "0", "--no_amp"] if self.stand_in else []  # as fast on every processor

    def train_words(self, sae: Sae, seeds: Sequence[int]) -> list[str]:
        """The command that trains some seeds."""
        damaged = any((self.store.checkpoints / sae.name(seed)).exists() for seed in seeds)
        return [*sae.words(seeds, self.dataset_root), *self._extra, *(["--overwrite"] if damaged else [])]

    def evaluate_words(self, runs: Sequence[Evaluation]) -> list[str]:
        """The command that evaluates models which differ in nothing else."""
        first = runs[0]
        one = len(runs) == 1
        output = str(self.results(first) if one else self.results(first).parent).replace("{", "{{").replace("}", "}}")
        made = ["clip_benchmark", "eval", "--model", *(run.model for run in runs), "--pretrained", first.weights]
        made += ["--dataset", first.dataset, "--dataset_root", self.dataset_root]
        if first.prompts:
            made += ["--custom_template_file", str(self.prompts(first))]
        return [*made, *self._extra, "--output", output + ("" if one else os.sep + "{model}.json"), "--quiet"]

    def commands(self) -> Iterator[str]:
        """All that is still to be done, as a person would type it."""
        groups = self.evaluations()
        for line, _ in self._preparations(groups):
            yield line
        for sae, seeds in self.trainings():
            yield shlex.join(self.train_words(sae, seeds))
        for runs in groups:
            yield shlex.join(self.evaluate_words(runs))

    def _preparations(self, groups: Sequence[Sequence[Evaluation]]) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Folders and files that the commands need: the command, and what does the same."""
        for folder in dict.fromkeys(self.results(runs[0]).parent for runs in groups):
            yield shlex.join(["mkdir", "-p", str(folder)]), lambda f=folder: f.mkdir(parents=True, exist_ok=True)
        for file, run in {self.prompts(runs[0]): runs[0] for runs in groups if runs[0].prompts}.items():
            # clip_benchmark takes those of imagenet1k for every data set that has none of its own in the file.
            text = json.dumps({"imagenet1k": list(run.prompts)})
            line = f"mkdir -p {shlex.quote(str(file.parent))}; echo {shlex.quote(text)} > {shlex.quote(str(file))}"

            def make(file: Path = file, text: str = text) -> None:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text + "\n")

            yield line, make

    # ------------------------------------------------------------------ doing it

    def run(self) -> None:
        """Do all of it. What cannot be done is kept in :attr:`problems`, and the rest goes on."""
        self.out.mkdir(parents=True, exist_ok=True)
        trainings, groups = self.trainings(), self.evaluations()
        count = sum(len(seeds) for _, seeds in trainings), sum(map(len, groups))
        self._say(f"# checkpoints to train: {count[0]}; models to evaluate: {count[1]}; what else is needed is there")
        for line, make in self._preparations(groups):
            self._say(f"$ {line}")
            make()
        self._numbers = {run: number for number, run in enumerate((run for runs in groups for run in runs), 1)}
        # Folders that only the user can fill, before anything is waited for.
        wanted = [(name, "train") for sae, _ in trainings for name in sae.datasets]
        for name, split in dict.fromkeys([*wanted, *((runs[0].dataset, "test") for runs in groups)]):
            if name.startswith("wds/"):
                self._data(name, split)
        for sae, seeds in trainings:
            encoders = dict(sae.flags).get("retrieval_encoder", ())
            problems = self._missing(sae.backbone, sae.weights, sae.datasets, "train", encoders)
            problems = problems or self._train(self.train_words(sae, seeds))
            if problems:
                self.problems |= {sae.name(seed): problems for seed in seeds}
        for runs in groups:
            self._evaluate(runs)

    def _say(self, line: str) -> None:
        if not self.quiet:
            print(line, flush=True)

    def _missing(
        self, backbone: str, weights: str, datasets: Sequence[str], split: str, encoders: Sequence[str] = ()
    ) -> tuple[str, ...]:
        """What cannot be had for a run: all reasons, in words."""
        found = [self._data(name, split) for name in datasets]
        what = f"the weights of {','.join(filter(None, (backbone, weights)))}"
        found.append(self._look_for(what, missing_weights, backbone, weights))
        found += [self._look_for(f"the retrieval encoder {name}", missing_encoder, name) for name in encoders]
        return tuple(str(missing) for missing in found if missing)

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
                self._say(f"# looking for {what}")
            found = look(*given)
            if found and found not in self._looked_for.values():
                print(f"vs2: missing: {one_line(found.why, 200)}", file=sys.stderr, flush=True)
            self._looked_for[key] = found
        return self._looked_for[key]

    def _train(self, words: Sequence[str]) -> tuple[str, ...]:
        """Train; why it failed, or nothing."""
        self._say(f"\n$ {shlex.join(words)}")
        try:
            self.train(words)
        except Exception as error:  # this package's own, or the memory, or the disk: the other cells go on
            problem = _one_line(str(error) if isinstance(error, Vs2Error) else f"{type(error).__name__}: {error}")
            print(f"vs2: error: {problem}", file=sys.stderr)
            return (problem,)
        return ()

    def _evaluate(self, runs: Sequence[Evaluation]) -> None:
        """Evaluate what can be: one model that fails does not keep the others from it."""
        todo = []
        for run in runs:
            problems = self.problems.get(run.checkpoint, ()) if run.checkpoint else ()
            problems = problems or self._missing(run.backbone, run.weights, [run.dataset], "test")
            if problems:
                self.problems[run] = problems
            elif not self.is_done(run):  # a training may have given the same checkpoint again
                todo.append(run)
        batches = [todo] if todo else []
        while batches:
            batch = batches.pop(0)
            problem = self._command(batch)
            left = [run for run in batch if not self.is_done(run)]
            if left and len(batch) == 1:
                self.problems[batch[0]] = (problem or "clip_benchmark wrote no results for it",)
            elif left:  # one of them is to blame: if not even the first went well, each gets a command of its own
                batches += [left] if len(left) < len(batch) else [[run] for run in left]

    def _command(self, batch: Sequence[Evaluation]) -> str | None:
        """Evaluate models by one command; why it failed, or None."""
        words = self.evaluate_words(batch)
        self._say(f"\n$ {shlex.join(words)}")
        return run_command(words, self.out / "log.txt", self.quiet, self._announcer(batch))

    def _announcer(self, batch: Sequence[Evaluation]) -> Callable[[], None]:
        """What says, whenever it is called, which model the command has come to: its bars do not tell."""
        before = [_written(self.results(run)) for run in batch]
        said = 0

        def look() -> None:
            nonlocal said
            while said < len(batch) and (
                said == 0 or _written(self.results(batch[said - 1])) not in (None, before[said - 1])
            ):
                run = batch[said]
                self._say(f"[{self._numbers.get(run, said + 1)} of {len(self._numbers)}] {run.model} on {run.dataset}")
                said += 1

        return look

    # ------------------------------------------------------------------ the numbers

    def measured(self, table: Table) -> list[Measured]:
        """The cells of a table with what was found."""
        found = {(cell.row, cell.column): self._measure(cell) for cell in table.cells}
        return [
            best(cell, [found[row, cell.column] for row in cell.best_of]) if cell.best_of else measured
            for cell, measured in zip(table.cells, found.values(), strict=True)
        ]

    def _measure(self, cell: Cell) -> Measured:
        if cell.model is None:
            return Measured(cell)
        values, problems = {}, []
        for seed in cell.seeds:
            runs = cell.evaluations(seed)
            blame = [cell.sae.name(seed)] if cell.sae else []
            trouble = next((self.problems[key] for key in (*blame, *runs) if key in self.problems), ())
            if not trouble:
                try:
                    values[seed] = self._value(cell, seed)
                except (DataError, CheckpointError) as error:
                    trouble = (str(error),)
            problems += trouble
        names = [cell.sae.name(seed) for seed in cell.seeds] if cell.sae else []
        facts = {
            "results": [str(self.results(run)) for seed in cell.seeds for run in cell.evaluations(seed)],
            "checkpoints": names,
            "transductive": any(found.transductive for found in map(self.checkpoint, names) if found),
        }
        return Measured(cell, values, tuple(dict.fromkeys(map(_one_line, problems))), facts)

    def _value(self, cell: Cell, seed: int) -> float:
        if cell.metric == "fvu":
            checkpoint, spec = self.store.find(cell.sae.name(seed)), cell.spec
            return checkpoint.select(spec.options.get("blocks"), spec.method.sae)[-1].fvu
        files = [self.results(run) for run in cell.evaluations(seed)]
        if cell.metric == "gain":
            return _gain(*files, cell.of_class)
        name = {"accuracy": "acc1", "coverage": "vs2_coverage"}[cell.metric]
        number = read_run(files[-1]).number(name)
        if number is None:
            raise DataError(f"{files[-1]} has no {name}; run the same command again")
        return 100 * number

    def finish(self) -> int:
        """Print and write the tables. Returns how many cells could not be measured."""
        missing = 0
        for table in self.tables:
            cells = self.measured(table)
            missing += sum(bool(measured.problems) for measured in cells)
            print("\n" + markdown(table, cells), end="")
            write(table, cells, self.out)
        return missing


def _prompt_name(prompts: Sequence[str]) -> str:
    if not prompts:
        return "harness"
    words = re.sub(r"[^A-Za-z0-9]+", "-", prompts[0])[:32].strip("-")
    return f"{words}-{hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:8]}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _written(file: Path) -> int | None:
    """When a file was written; None if it is not there."""
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return None


def _gain(plain: Path, steered: Path, name: str | None) -> float:
    """How many points more of a class's images are classified correctly; without a name, the most of any class."""
    shares = []
    for file in (plain, steered):
        images = Images.read(images_file(file))
        count = np.bincount(images.target, minlength=len(images.classes))
        right = np.bincount(images.target[images.correct], minlength=len(images.classes))
        shares.append(100 * right / np.maximum(count, 1))
    gains = shares[1] - shares[0]
    if name is None:
        return float(gains.max())
    if name not in images.classes:
        raise DataError(f"{steered}: there is no class {name!r}; the classes: {', '.join(images.classes[:5])}, ...")
    return float(gains[images.classes.index(name)])
