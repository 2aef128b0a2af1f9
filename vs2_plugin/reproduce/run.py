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
import shutil
import subprocess
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from vs2_plugin.checkpoint.manifest import Checkpoint
from vs2_plugin.checkpoint.store import Store
from vs2_plugin.errors import CheckpointError, DataError, Vs2Error
from vs2_plugin.reproduce.fetch import missing_data, missing_weights
from vs2_plugin.reproduce.plan import Cell, Evaluation, Sae, Table
from vs2_plugin.reproduce.table import Measured, markdown, write

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
    problems: dict[Hashable, str] = field(default_factory=dict)
    """What could not be done -> why."""
    _fetched: dict[tuple, str | None] = field(default_factory=dict, init=False)

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
            content = json.loads(file.read_text(encoding="utf-8"))
            metrics = content["metrics"]
            same = (content["model"], content["pretrained"], content["dataset"])
            used = metrics.get("vs2_checkpoint_digest")
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return False
        if same != (run.model, run.weights, run.dataset) or not file.with_suffix(".images.npz").is_file():
            return False
        checkpoint = self.checkpoint(run.checkpoint) if run.checkpoint else None
        return used == (checkpoint.digest[:16] if checkpoint else None) and bool(checkpoint) == bool(run.checkpoint)

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
        return ["--num_workers", "0"] if self.stand_in else []

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
        for sae, seeds in trainings:
            problem = self._missing(sae.backbone, sae.weights, sae.datasets, "train")
            problem = problem or self._train(self.train_words(sae, seeds))
            if problem:
                self.problems |= {sae.name(seed): problem for seed in seeds}
        for runs in groups:
            self._evaluate(runs)

    def _say(self, line: str) -> None:
        if not self.quiet:
            print(line, flush=True)

    def _missing(self, backbone: str, weights: str, datasets: Sequence[str], split: str) -> str | None:
        """What cannot be fetched for a run, in words. Everything is tried once."""
        if self.stand_in:  # it is there
            return None
        needed = [((backbone, weights), missing_weights, (backbone, weights))]
        needed += [((name, split), missing_data, (name, self.dataset_root, split)) for name in datasets]
        for key, fetch, arguments in needed:
            if key not in self._fetched:
                self._fetched[key] = fetch(*arguments)
            if self._fetched[key]:
                return self._fetched[key]
        return None

    def _train(self, words: Sequence[str]) -> str | None:
        """Train; why it failed, or None."""
        self._say(f"\n$ {shlex.join(words)}")
        try:
            self.train(words)
        except Exception as error:  # this package's own, or the memory, or the disk: the other cells go on
            problem = _one_line(str(error) if isinstance(error, Vs2Error) else f"{type(error).__name__}: {error}")
            print(f"vs2: error: {problem}", file=sys.stderr)
            return problem
        return None

    def _evaluate(self, runs: Sequence[Evaluation]) -> None:
        """Evaluate what can be: one model that fails does not keep the others from it."""
        todo = []
        for run in runs:
            problem = self.problems.get(run.checkpoint) if run.checkpoint else None
            problem = problem or self._missing(run.backbone, run.weights, [run.dataset], "test")
            if problem:
                self.problems[run] = problem
            elif not self.is_done(run):  # a training may have given the same checkpoint again
                todo.append(run)
        batches = [todo] if todo else []
        while batches:
            batch = batches.pop(0)
            problem = self._command(self.evaluate_words(batch))
            left = [run for run in batch if not self.is_done(run)]
            if left and len(batch) == 1:
                self.problems[batch[0]] = problem or "clip_benchmark wrote no results for it"
            elif left:  # one of them is to blame: if not even the first went well, each gets a command of its own
                batches += [left] if len(left) < len(batch) else [[run] for run in left]

    def _command(self, words: Sequence[str]) -> str | None:
        """Run a command; why it failed, or None."""
        self._say(f"\n$ {shlex.join(words)}")
        # The script installed beside this Python, whether or not its environment is the active one.
        script = shutil.which(words[0], path=os.path.dirname(sys.executable)) or shutil.which(words[0])
        if script is None:
            return f"the command {words[0]} is not installed beside {sys.executable}"
        shown = not self.quiet and sys.stderr.isatty()
        said = b""
        hidden = subprocess.DEVNULL if self.quiet else None
        with open(self.out / "log.txt", "ab") as log:
            log.write(f"\n$ {shlex.join(words)}\n".encode())
            with subprocess.Popen([script, *words[1:]], stdout=hidden, stderr=subprocess.PIPE) as process:
                try:
                    while chunk := process.stderr.read1(65536):
                        said = (said + chunk)[-65536:]
                        log.write(chunk)
                        if shown:
                            sys.stderr.buffer.write(chunk)
                            sys.stderr.buffer.flush()
                except BaseException:
                    process.terminate()
                    raise
        return None if process.returncode == 0 else _reason(said.decode(errors="replace"), process.returncode)

    # ------------------------------------------------------------------ the numbers

    def measured(self, table: Table) -> list[Measured]:
        """The cells of a table with what was found."""
        return [self._measure(cell) for cell in table.cells]

    def _measure(self, cell: Cell) -> Measured:
        if cell.model is None:
            return Measured(cell)
        values, problems = {}, []
        for seed in cell.seeds:
            runs = cell.evaluations(seed)
            blame = [cell.sae.name(seed)] if cell.sae else []
            trouble = next((self.problems[key] for key in (*blame, *runs) if key in self.problems), None)
            if trouble is None:
                try:
                    values[seed] = self._value(cell, seed)
                except (DataError, CheckpointError) as error:
                    trouble = str(error)
            if trouble:
                problems.append(trouble)
        names = [cell.sae.name(seed) for seed in cell.seeds] if cell.sae else []
        facts = {
            "results": [str(self.results(run)) for seed in cell.seeds for run in cell.evaluations(seed)],
            "checkpoints": names,
            "transductive": any(found.transductive for found in map(self.checkpoint, names) if found),
        }
        return Measured(cell, values, _one_line(problems[0]) if problems else None, facts)

    def _value(self, cell: Cell, seed: int) -> float:
        if cell.metric == "fvu":
            checkpoint, spec = self.store.find(cell.sae.name(seed)), cell.spec
            return checkpoint.select(spec.options.get("blocks"), spec.method.sae)[-1].fvu
        files = [self.results(run) for run in cell.evaluations(seed)]
        if cell.metric == "gain":
            return _gain(*files, cell.of_class)
        name = {"accuracy": "acc1", "coverage": "vs2_coverage"}[cell.metric]
        try:
            return 100 * json.loads(files[-1].read_text(encoding="utf-8"))["metrics"][name]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise DataError(f"{files[-1]} has no {name} ({type(error).__name__}); run the same command again") from None

    def finish(self) -> int:
        """Print and write the tables. Returns how many cells could not be measured."""
        missing = 0
        for table in self.tables:
            cells = self.measured(table)
            missing += sum(measured.problem is not None for measured in cells)
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


def _reason(said: str, code: int) -> str:
    """Why a command failed, from what it said on stderr."""
    lines = [line for line in said.replace("\r", "\n").splitlines() if line.strip()]
    ours = [line.partition("error: ")[2] for line in lines if line.startswith("vs2: error: ")]
    if ours:
        return ours[-1]
    return f"clip_benchmark ended with exit code {code}: {_one_line(lines[-1])[:300] if lines else 'it said nothing'}"


def _gain(plain: Path, steered: Path, name: str | None) -> float:
    """How many points more of a class's images are classified correctly; without a name, the most of any class."""
    import numpy as np

    from vs2_plugin.report.results import Images

    shares = []
    for file in (plain, steered):
        images = Images.load(file.with_suffix(".images.npz"))
        count = np.bincount(images.target, minlength=len(images.classes))
        right = np.bincount(images.target[images.correct], minlength=len(images.classes))
        shares.append(100 * right / np.maximum(count, 1))
    gains = shares[1] - shares[0]
    if name is None:
        return float(gains.max())
    if name not in images.classes:
        raise DataError(f"{steered}: there is no class {name!r}; the classes: {', '.join(images.classes[:5])}, ...")
    return float(gains[images.classes.index(name)])
