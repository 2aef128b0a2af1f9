"""The study of automatic and selective strength, on rendered and handwritten characters and several tiny CLIPs.

    python benchmark_configs/strength/run.py --out DIR [--half report] [--jobs 2] [--seeds 5] [--quick] [--only TEXT]
    python benchmark_configs/strength/run.py --out DIR --embeddings FILE.npz

What is studied, and how, is in the README.md beside this file. Each run is a line of DIR/HALF/runs.jsonl as soon as it
is done, and is not done again; tables and a figure are written beside it at the end.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

from settings import HALVES, SEEDS, Sizes, settings
from tqdm import tqdm

HERE = Path(__file__).parent
PACKAGE = HERE.parents[1] / "vs2_plugin"
#: What the runs come from. The rule is not among it: the tables choose by the rule as it is when they are made.
CODE = (
    *(HERE / name for name in ("settings.py", "sources.py", "methods.py", "embeddings.py", "train_tiny_clip.py")),
    *(PACKAGE / name for name in ("model/automatic.py", "clip/sites.py")),
    PACKAGE / "strength" / "criterion.py",
    *(path for part in ("steering", "sae", "gallery") for path in sorted((PACKAGE / part).glob("*.py"))),
)
#: A thread for each job, and no GPU: read when the libraries are loaded, here and in the processes that are started.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "CUDA_VISIBLE_DEVICES": "",
}
#: An SAE by default sees 200,000 activations or more, which would take most of the time.
FULL = Sizes(steps=1500, pool=4000, test=4000, samples=40_000)
QUICK = Sizes(steps=30, pool=1000, test=500, samples=8_000)


class Task(NamedTuple):
    """Something to do once other tasks are done."""

    function: Callable[..., Any]
    arguments: Sequence[Any]
    needs: Sequence[Hashable] = ()


class Here(Executor):
    """Does at once what it is given, in this process."""

    def submit(self, function: Callable[..., Any], /, *args: Any) -> Future:
        """The result, or what was raised."""
        done: Future = Future()
        try:
            done.set_result(function(*args))
        except Exception as error:
            done.set_exception(error)
        return done


def work(tasks: Mapping[Hashable, Task], jobs: int) -> Iterator[tuple[Hashable, Any]]:
    """Do the tasks, several at a time, in their order as far as what they need is done; gives key and result."""
    waiting, done, running = dict(tasks), set(), {}
    pool = Here() if jobs == 1 else ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))
    with pool:
        while waiting or running:
            for key, task in list(waiting.items()):
                if len(running) >= jobs:
                    break
                if done.issuperset(task.needs):
                    running[pool.submit(task.function, *task.arguments)] = key
                    del waiting[key]
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                key = running.pop(future)
                yield key, future.result()
                done.add(key)


def code_digest() -> str:
    """SHA-256 over the files that the figures come from."""
    digest = hashlib.sha256()
    for path in CODE:
        digest.update(path.name.encode() + b"\n" + path.read_bytes())
    return digest.hexdigest()[:16]


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add a line. One that was cut short before stays a line of its own, which is not read."""
    with open(path, "a+b") as file:
        file.seek(0, os.SEEK_END)
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(row).encode() + b"\n")


def machine() -> dict[str, Any]:
    """Where it ran."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": named[0] if named else platform.processor(),
        "cores": os.cpu_count(),
        "load_before": [round(value, 2) for value in os.getloadavg()],
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def study(root: Path, half: str, quick: bool, jobs: int, only: str = "", seeds: int = SEEDS) -> None:
    """Do the runs of a half that are not done yet, and write its tables. ``only``: part of the settings' names."""
    os.environ.update(ENVIRONMENT)
    import table

    folder = root / half
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "runs.jsonl"
    known = {(row["setting"], row["seed"]) for row in table.read(file)}
    sizes = QUICK if quick else FULL
    chosen = settings(half, quick)
    looked_at = [setting for setting in chosen if only in setting.name]
    wanted = [(setting, seed) for setting in looked_at for seed in range(1 if quick else seeds)]
    missing = [(setting, seed) for setting, seed in wanted if (setting.name, seed) not in known]

    tasks: dict[Hashable, Task] = {}
    if missing:
        from methods import prepare, run_quietly, train  # torch, for which a second call need not wait
    # All that look at the same images follow each other.
    shown = dict.fromkeys((setting.clip, setting.source, setting.corruption) for setting, _ in missing)
    for key in shown:
        if key[0] != "tiny":
            tasks.setdefault(key[:1], Task(train, (root, key[0], sizes.steps)))
        tasks[key] = Task(prepare, (root, *key, sizes), [key[:1]] if key[:1] in tasks else [])
        for setting, seed in missing:
            if (setting.clip, setting.source, setting.corruption) == key:
                tasks[setting, seed] = Task(run_quietly, (root, setting, seed, sizes), [key])

    code, facts, started = code_digest(), machine(), time.monotonic()
    with tqdm(total=len(wanted), initial=len(wanted) - len(missing), desc=half, unit="run", disable=None) as bar:
        for key, result in work(tasks, jobs):
            if len(key) != 2:  # a CLIP, or images
                continue
            setting, seed = key
            bar.set_postfix_str(setting.name)
            append(file, {"setting": setting.name, "seed": seed, **vars(setting), **result, "code": code})
            bar.update()
    if missing:
        seconds = round(time.monotonic() - started)
        append(file, {"session": {**facts, "seconds": seconds, "runs": len(missing), "jobs": jobs, "code": code}})
    print(f"{len(missing)} runs done, {len(wanted) - len(missing)} were there")
    print(table.write(folder, half, [setting.name for setting in chosen]))


def study_embeddings(
    path: Path, root: Path, half: str, quick: bool, jobs: int, only: str = "", seeds: int = SEEDS
) -> None:
    """Do what is not done yet of a file of embeddings; rows and a table are in ``root``."""
    os.environ.update(ENVIRONMENT)
    from embeddings import ARRAYS, draws, evaluate, read, table

    drawn = [None] if set(ARRAYS) <= set(read(path)) else [draw for draw in draws(half) if only in draw.name]
    file, digest = root / "embeddings.json", hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    rows = [row for row in rows if row["file"] == digest]
    done = {(row["draw"], row["seed"], row["half"]) for row in rows}
    tasks: dict[Hashable, Task] = {}
    for draw in drawn:
        for seed in range(1 if quick else seeds):
            key = (path.stem if draw is None else draw.name, seed, half)
            if key not in done:
                tasks[key] = Task(evaluate, (path, draw, seed, half, quick))
    code = code_digest()
    root.mkdir(parents=True, exist_ok=True)
    for key, found in tqdm(work(tasks, jobs), path.name, len(tasks), unit="run", disable=None):
        about = {**dict(zip(("draw", "seed", "half"), key, strict=True)), "file": digest, "code": code}
        rows += [{**about, **row} for row in found]
        scratch = file.with_suffix(".partial")
        scratch.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        scratch.replace(file)
    told = table([row for row in rows if row["half"] == half])
    file.with_suffix(".md").write_text(told + "\n", encoding="utf-8")
    print(f"{told}\nwrote {file} and {file.with_suffix('.md').name}")


def main() -> None:
    """Read the command line, and do the study."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for all that is made")
    parser.add_argument("--half", choices=tuple(HALVES), default="report", help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, on a core each (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="few and small runs, which only show that all works")
    parser.add_argument("--only", default="", metavar="TEXT", help="settings with this in their names (see results.md)")
    parser.add_argument(
        "--embeddings", type=Path, metavar="FILE.npz",
        help="study these embeddings of a CLIP instead: unlabeled [n, d], test [m, d], test_labels [m], text [classes, "
        "d]; or image [n, d], label [n], text, of which settings are made",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=SEEDS, help="of each setting (default: %(default)s)")
    args = parser.parse_args()
    for flag in ("jobs", "seeds"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag} is {getattr(args, flag)}; expected at least 1")
    root = args.out.resolve() / "quick" if args.quick else args.out.resolve()
    known = args.half, args.quick, args.jobs, args.only, args.seeds
    if args.embeddings is not None:
        from vs2_plugin.errors import Vs2Error

        try:
            study_embeddings(args.embeddings, root, *known)
        except Vs2Error as error:
            parser.error(str(error))
        return
    if not any(args.only in setting.name for setting in settings(args.half, args.quick)):
        parser.error(f"no setting of this half has {args.only!r} in its name; expected a part of one such as 'rotated'")
    study(root, *known)


if __name__ == "__main__":
    main()
