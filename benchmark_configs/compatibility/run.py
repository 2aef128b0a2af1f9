"""Do the lowest and the newest versions that pyproject.toml accepts work?

    python benchmark_configs/compatibility/run.py [lowest] [newest] [--folder FOLDER]

For each, a virtual environment is made in a temporary folder (6 GB, removed afterwards), this checkout is installed
with its test packages, and the demo and some of the tests run in it. Printed is a table of the versions and of what
each step came to; what a failed step wrote lies in FOLDER. It exits with 1 if a step failed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[2]
PACKAGES = ["torch", "open_clip_torch", "clip-benchmark", "webdataset", "numpy"]
#: What depends on them most.
TESTS = ["clip", "data", "sae", "checkpoint", "gallery", "training", "model/test_steered.py", "harness/test_towers.py"]
VERSIONS = "from importlib.metadata import version; print(*map(version, {names!r}))"


def requirements(which):
    """The packages at their lowest versions, or at the newest that are accepted."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    found = {re.match(r"[\w-]+", line)[0]: line for line in declared}
    if which == "newest":
        return [found[name] for name in PACKAGES]
    lowest = {name: re.search(r">=([\d.]+)", found[name]) for name in PACKAGES}
    return [f"{name}=={bound[1]}.*" if bound else found[name] for name, bound in lowest.items()]


def steps(which, python, work):
    """Name -> command, in their order."""
    script = python.parent / "vs2"
    tests = [str(ROOT / "tests" / name) for name in TESTS]
    pip = [python, "-m", "pip", "install", "--quiet"]
    yield "installs", [*pip, *requirements(which), f"{ROOT}[test]"]
    yield "imports", [python, "-c", "import vs2_plugin, torch, open_clip, clip_benchmark, webdataset"]
    yield "tests", [python, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", *tests]
    yield "demo", [script, "demo", "--out", work / "demo"]


def attempt(which, folder):
    """Make the environment, and yield (step, what it came to)."""
    work = Path(tempfile.mkdtemp(prefix=f"{which}-"))
    try:
        subprocess.run([sys.executable, "-m", "venv", work / "venv"], check=True)
        python = work / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        for name, command in steps(which, python, work):
            started = time.monotonic()
            with open(folder / f"{which}-{name}.txt", "w") as log:
                done = subprocess.run(
                    command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, timeout=3600
                )
            yield name, f"{'ok' if done.returncode == 0 else 'failed'}, {time.monotonic() - started:.0f} s"
            if name == "installs" and done.returncode != 0:
                return
            if name == "installs":
                code = VERSIONS.format(names=PACKAGES)
                told = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, cwd=work)
                yield from zip(PACKAGES, told.stdout.split(), strict=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", choices=["lowest", "newest", []], metavar="lowest|newest")
    parser.add_argument("--folder", type=Path, default=Path("compatibility"), help="for what the steps write")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    columns = {which: dict(attempt(which, given.folder)) for which in given.which or ["lowest", "newest"]}
    rows = dict.fromkeys([*PACKAGES, *(name for column in columns.values() for name in column)])
    print(f"| Python {sys.version.split()[0]} | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name in rows:
        print(f"| {name} | {' | '.join(column.get(name, '') for column in columns.values())} |")
    failed = any(value.startswith("failed") for column in columns.values() for value in column.values())
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
