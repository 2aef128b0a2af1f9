"""``vs2 demo``: trains, evaluates and reports offline, on handwritten digits, by commands that a user would type."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TypeAlias

from vs2_plugin.checkpoint.store import ENVIRONMENT_VARIABLE
from vs2_plugin.demo.digits import TINY_CLIP, write_digits
from vs2_plugin.errors import DataError, Vs2Error
from vs2_plugin.harness.patches import PER_IMAGE
from vs2_plugin.reproduce.command import surroundings
from vs2_plugin.results.runs import read_run

__all__ = ["EVALUATED", "MODEL", "SWEPT", "SYSTEMS", "demo", "prepare", "table"]

MODEL = "local-dir:tiny-clip"
#: Rows that the stock clip_benchmark evaluates, one model after another -> model string.
EVALUATED = {
    "zero-shot CLIP": MODEL,
    "VS2": f"vs2:{MODEL}",
    "VS2, strength chosen without labels": f"vs2:{MODEL}@alpha=auto",
}
#: Rows that ``vs2 sweep`` evaluates, all in one pass over the images -> model string.
SWEPT = {
    "selective VS2, chosen without labels": f"vs2s:{MODEL}",
    "VS2++, pseudo-labels": f"vs2pp:{MODEL}",
    "VS2, gated at q = 0.99": f"vs2:{MODEL}@gate=0.99",
    "VS2, last two blocks": f"vs2:{MODEL}@blocks=2+3",
    "VS2 + PASS (training labels)": f"pass:{MODEL}",
    "PASS, strength chosen without test images": f"pass:{MODEL}@alpha=auto",
    "REC_F, reconstruction": f"rec:{MODEL}",
    "REC_A, at every block": f"rec:{MODEL}@blocks=all",
    "REC_F+gamma, gamma = 1.5": f"amp:{MODEL}",
    "VS2++, query rule": f"vs2pp:{MODEL}@rule=query",
    "VS2++, pseudo-labels, N = 10, braked": f"vs2pp:{MODEL}@n=10@brake=0.9",
    "CLIP steering, pseudo-labels": f"clipsteer:{MODEL}",
    "weighted RAG": f"rag:{MODEL}",
    "weighted RAG, pseudo-labels": f"rag:{MODEL}@labels=pseudo",
    "k-NN vote": f"knn:{MODEL}",
    "VS2++, oracle (training labels)": f"vs2pp:{MODEL}@labels=oracle",
    "CLIP steering, oracle (training labels)": f"clipsteer:{MODEL}@labels=oracle",
    "weighted RAG, oracle (training labels)": f"rag:{MODEL}@labels=oracle",
    "oracle prototypes (test labels)": f"proto:{MODEL}",
    "control: gamma = 0": f"amp:{MODEL}@gamma=0",
    "control: gamma = -1": f"amp:{MODEL}@gamma=-1",
}
#: Row of the table -> model string.
SYSTEMS = {**EVALUATED, **SWEPT}
#: Training samples per SAE: a quarter of the default, so that eight SAEs take a minute.
SAMPLES = 50_000
#: Name of a command -> function that runs it with the given arguments, and returns an exit code or None.
Commands: TypeAlias = Mapping[str, Callable[[Sequence[str]], "int | str | None"]]
_MINE = ("digits", "tiny-clip", "store", "results", "report", "benchmark.csv")  # what the demo writes


def prepare(folder: Path) -> None:
    """Empty ``folder`` of an earlier demo, and write the digits and the tiny CLIP into it.

    Raises:
        DataError: the folder holds files that no demo wrote.
    """
    strange = sorted(path.name for path in folder.iterdir() if path.name not in _MINE) if folder.is_dir() else []
    if strange:
        raise DataError(
            f"{folder} holds {', '.join(strange[:3])}, which the demo did not write; name an empty or new "
            "folder with --out"
        )
    for name in _MINE:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    write_digits(folder / "digits")
    shutil.copytree(TINY_CLIP, folder / "tiny-clip")
    (folder / "results").mkdir()


def demo(folder: Path, commands: Commands, quiet: bool = False, seeds: Sequence[int] = (0,)) -> None:
    """Train SAEs, evaluate models and print the table.

    Args:
        folder: the folder to work in.
        commands: functions for ``vs2`` and ``vs2-train-sae``, which run in this process, as ``clip_benchmark`` does.
        quiet: hide the output of the commands.
        seeds: seeds of the SAEs. With several, the table gives mean and standard deviation over them.

    Raises:
        Vs2Error: a command failed.
    """
    started = time.monotonic()
    prepare(folder)
    print(
        f"# 1,797 real handwritten digits (scikit-learn) and a tiny CLIP, trained on printed glyphs only, in {folder}"
    )
    # Where loader and model share two cores, threads that spin while they wait slow each other down.
    settings = {ENVIRONMENT_VARIABLE: "store", PER_IMAGE: "1", "OMP_WAIT_POLICY": "PASSIVE"}
    exported = " ".join(f"{name}={value}" for name, value in settings.items())
    print(f"cd {shlex.quote(str(folder))}; export {exported}")
    with surroundings(folder, settings):
        for words in _steps(seeds):
            _command(words, {**commands, "clip_benchmark": _clip_benchmark}, quiet)
    outputs = "results/*.json, results/sweep.csv, the checkpoints in store/checkpoints"
    if len(seeds) == 1:
        outputs = "report/index.html, results/*.json, the checkpoint in store/checkpoints"
    print(f"\n{table(folder / 'results', seeds)}")
    print(f"\n{time.monotonic() - started:.0f} s. All of it is in {folder}: {outputs}.")


def _steps(seeds: Sequence[int]) -> Iterator[list[str]]:
    """Yield each command of the demo, as a list of words."""
    data = ["--dataset", "wds/digits", "--dataset_root", "digits", "--num_workers", "1", "--no_amp"]
    evaluation = ["--pretrained", "", *data, "--output", "results/{model}.json", "--quiet"]
    yield [
        "vs2-train-sae", "--model", MODEL, *data, "--blocks", "all", "--pass_weight", "0", "0.8",
        "--samples", str(SAMPLES), "--seed", *map(str, seeds), *(["--name", "digits"] if len(seeds) > 1 else []),
    ]  # fmt: skip
    if len(seeds) == 1:
        yield ["clip_benchmark", "eval", "--model", *EVALUATED.values(), *evaluation]
        yield ["vs2", "sweep", "--model", *SWEPT.values(), *evaluation, "--skip_existing"]
        yield ["vs2", "report", "results", "--out", "report"]
    else:
        saes = ",".join(f"digits-seed{seed}" for seed in seeds)
        strings = [with_checkpoint(model, saes) for model in SYSTEMS.values() if model != MODEL]
        yield ["vs2", "sweep", "--model", *strings, *evaluation]


def with_checkpoint(model: str, checkpoint: str) -> str:
    """Return the model string with the name of a checkpoint; a plain model's name is returned unchanged."""
    return model.replace(MODEL, f"{MODEL}@{checkpoint}") if model != MODEL else model


def table(results: Path, seeds: Sequence[int] = (0,)) -> str:
    """Return a Markdown table of accuracies in percent, with the change over zero-shot CLIP in points.

    With several seeds, each cell is the mean over them, with the standard deviation of the sample in parentheses.
    """
    keys = {"acc1": "top-1 %", "acc5": "top-5 %", "mean_per_class_recall": "recall %"}
    titles = [*keys.values(), "change of top-1", "coverage %"]
    over = f", mean (sd) over SAE seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else ""
    lines = [f"| 897 test images{over} | " + " | ".join(titles) + " |", "|---|" + "---:|" * len(titles)]
    before = _metrics(results, MODEL)["acc1"]
    for name, model in SYSTEMS.items():
        names = [model] if len(seeds) == 1 else [with_checkpoint(model, f"digits-seed{seed}") for seed in seeds]
        runs = [_metrics(results, one) for one in dict.fromkeys(names)]
        cells = [_cell([run[key] for run in runs if key in run]) for key in keys]
        cells.append(_cell([run["acc1"] - before for run in runs], sign="+") if model != MODEL else "")
        cells.append(_cell([run["vs2_coverage"] for run in runs if "vs2_coverage" in run], digits=1))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _metrics(results: Path, model: str) -> dict[str, Any]:
    return read_run(results / f"{model}.json").metrics


def _cell(values: Sequence[float], digits: int = 2, sign: str = "") -> str:
    """Return shares as percent: one value, or the mean of several (standard deviation); empty where there are none."""
    if len(values) < 2:
        return f"{100 * values[0]:{sign}.{digits}f}" if values else ""
    return f"{100 * mean(values):{sign}.1f} ({100 * stdev(values):.1f})"


def _command(words: Sequence[str], commands: Commands, quiet: bool) -> None:
    """Print a command and run it in this process, since starting torch and the harness anew takes ten seconds."""
    print(f"\n$ {shlex.join(words)}", flush=True)
    stderr = StringIO()
    try:
        with ExitStack() as stack:
            if quiet:
                stack.enter_context(redirect_stdout(StringIO()))
                stack.enter_context(redirect_stderr(stderr))
            code = commands[words[0]](words[1:])
    except SystemExit as stop:
        code = stop.code
    if code:
        last = [f": {line}" for line in stderr.getvalue().splitlines() if line.strip()][-1:]
        raise Vs2Error(f"the command above ended with exit code {code}" + "".join(last))


def _clip_benchmark(words: Sequence[str]) -> None:
    """Run the stock ``clip_benchmark`` command, as its script does."""
    from clip_benchmark import cli

    before, sys.argv = sys.argv, ["clip_benchmark", *words]
    try:
        cli.main()
    finally:
        sys.argv = before
