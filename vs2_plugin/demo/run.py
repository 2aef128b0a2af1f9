"""``vs2 demo``: the whole way, offline, on real handwritten digits, by the commands that a user would type."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vs2_plugin.checkpoint.store import ENVIRONMENT_VARIABLE
from vs2_plugin.demo.digits import write_digits
from vs2_plugin.errors import DataError, Vs2Error
from vs2_plugin.harness.patches import PER_IMAGE

__all__ = ["MODEL", "SYSTEMS", "demo", "prepare"]

MODEL = "local-dir:tiny-clip"
#: Row of the table -> model string.
SYSTEMS = {
    "zero-shot CLIP": MODEL,
    "VS2": f"vs2:{MODEL}",
    "VS2, strength told without labels": f"vs2:{MODEL}@alpha=auto",
    "selective VS2, told without labels": f"vs2s:{MODEL}",
    "VS2, gated at q = 0.99": f"vs2:{MODEL}@gate=0.99",
    "VS2, last two blocks": f"vs2:{MODEL}@blocks=2+3",
    "VS2 + PASS (training labels)": f"pass:{MODEL}",
    "PASS, strength told without test images": f"pass:{MODEL}@alpha=auto",
    "REC_F, reconstruction": f"rec:{MODEL}",
    "REC_A, at every block": f"rec:{MODEL}@blocks=all",
    "REC_F+gamma, gamma = 1.5": f"amp:{MODEL}",
    "VS2++, pseudo-labels": f"vs2pp:{MODEL}",
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
_TINY_CLIP = Path(__file__).parent / "tiny_clip"
_MINE = ("digits", "tiny-clip", "store", "results", "report")  # the folders that the demo writes into its own


def prepare(folder: Path) -> dict[str, str]:
    """Write the digits and the tiny CLIP into ``folder``, and return the environment for commands that run in it.

    Raises:
        DataError: the folder holds something that is not the demo's.
    """
    strange = (
        sorted(path.name for path in folder.iterdir() if path.name not in (*_MINE, "benchmark.csv"))
        if folder.is_dir()
        else []
    )
    if strange:
        raise DataError(
            f"{folder} holds {', '.join(strange[:3])}, which the demo did not write; name an empty or new "
            "folder with --out"
        )
    for name in (*_MINE, "benchmark.csv"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    write_digits(folder / "digits")
    shutil.copytree(_TINY_CLIP, folder / "tiny-clip")
    (folder / "results").mkdir()
    return {**os.environ, ENVIRONMENT_VARIABLE: "store"}


def demo(folder: Path, quiet: bool = False) -> None:
    """Train, evaluate and print the table.

    Raises:
        Vs2Error: a command failed; its own output says why.
    """
    started = time.monotonic()
    environment = prepare(folder)
    print(
        f"# 1,797 real handwritten digits (scikit-learn) and a tiny CLIP, trained on printed glyphs only, in {folder}"
    )
    environment[PER_IMAGE] = "1"
    print(f"cd {shlex.quote(str(folder))}; export {ENVIRONMENT_VARIABLE}=store {PER_IMAGE}=1")
    common = ["--dataset", "wds/digits", "--dataset_root", "digits"]
    _command(folder, environment, quiet, "vs2-train-sae", "--model", MODEL, *common, "--blocks", "all", "--no_amp")
    _command(folder, environment, quiet, "vs2-train-sae", "--model", MODEL, *common, "--pass_weight", "0.8", "--no_amp")
    _command(
        folder, environment, quiet, "clip_benchmark", "eval", "--model", *SYSTEMS.values(), "--pretrained", "", *common,
        "--num_workers", "1", "--no_amp", "--output", "results/{model}.json", "--quiet",
    )  # fmt: skip
    _command(folder, environment, quiet, "clip_benchmark", "build", "results", "--output", "benchmark.csv")
    _command(folder, environment, quiet, "vs2", "report", "results", "--out", "report")

    rows = [
        (name, json.loads((folder / "results" / f"{model}.json").read_text())["metrics"])
        for name, model in SYSTEMS.items()
    ]
    print()
    print(table(rows))
    print(
        f"\n{time.monotonic() - started:.0f} s. All of it is in {folder}: report/index.html, results/*.json, "
        "benchmark.csv, the checkpoint in store/checkpoints."
    )


def table(rows: list[tuple[str, dict]]) -> str:
    """Accuracies in percent, with the change over the first row in points."""
    keys = (("acc1", "top-1 %"), ("acc5", "top-5 %"), ("mean_per_class_recall", "recall %"))
    titles = [title for _, title in keys] + ["change of top-1", "coverage %"]
    lines = ["| 897 test images | " + " | ".join(titles) + " |", "|---|" + "---:|" * len(titles)]
    first = rows[0][1]
    for name, metrics in rows:
        change = f"{100 * (metrics['acc1'] - first['acc1']):+.2f}" if metrics is not first else ""
        coverage = f"{100 * metrics['vs2_coverage']:.1f}" if "vs2_coverage" in metrics else ""
        lines.append(
            f"| {name} | "
            + " | ".join(f"{100 * metrics[key]:.2f}" if key in metrics else "" for key, _ in keys)
            + f" | {change} | {coverage} |"
        )
    return "\n".join(lines)


def _command(folder: Path, environment: dict[str, str], quiet: bool, *words: str) -> None:
    print(f"\n$ {shlex.join(words)}", flush=True)
    # The scripts installed beside this Python, whether or not its environment is the active one.
    script = shutil.which(words[0], path=os.path.dirname(sys.executable)) or shutil.which(words[0])
    if script is None:
        raise Vs2Error(
            f"the command {words[0]} is not installed beside {sys.executable}; install with: pip install vs2-plugin"
        )
    hidden = subprocess.DEVNULL if quiet else None
    with _without_interruptions():
        process = subprocess.Popen([script, *words[1:]], cwd=folder, env=environment, stdout=hidden, stderr=hidden)
    with process:
        try:
            code = process.wait()
        except BaseException:
            process.terminate()
            raise
    if code != 0:
        raise Vs2Error(f"the command above ended with exit code {code}")


@contextmanager
def _without_interruptions() -> Iterator[None]:
    """Commands started within the block leave Ctrl-C to the demo, which ends them: each would print a traceback."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
