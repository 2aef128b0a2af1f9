"""Commands that are killed, and go on: the end has the bytes of a run that nothing interrupted.

``VS2_KILLS=50 pytest tests/training/test_resume.py`` kills that many, at random moments.
"""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import pytest

from vs2_plugin.checkpoint.checkpoint import Checkpoint
from vs2_plugin.checkpoint.manifest import MANIFEST
from vs2_plugin.checkpoint.store import Store
from vs2_plugin.cli import train_sae

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
KILLS = int(os.environ.get("VS2_KILLS", "2"))
WORDS = ["--model", "local-dir:tiny-clip", "--dataset", "wds/digits", "--dataset_root", "digits", "--no_amp"]
WORDS += ["--samples", "8000", "--pass_weight", "0", "0.8", "--batch_size", "48", "--num_workers", "2"]
WORDS += ["--save_every", "0", "--name", "mine"]


@pytest.fixture(scope="module")
def place(workplace, tmp_path_factory):
    """The working folder, with the digits' shards four times over: 1,200 images."""
    folder = shutil.copytree(workplace, tmp_path_factory.mktemp("resume"), dirs_exist_ok=True)
    train = folder / "digits/train"
    count = int((train / "nshards.txt").read_text())
    for number in range(count, 4 * count):
        os.link(train / f"{number % count}.tar", train / f"{number}.tar")
    (train / "nshards.txt").write_text(str(4 * count))
    return folder


def start(place, store, processes):
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launch, "-m", "vs2_plugin.cli.train_sae", *WORDS, "--store", str(store)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(
        command, cwd=place, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def here(place, store):
    """Run the command in this process: its exit code, and what it says."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(said):
        patch.chdir(place)
        return train_sae.main([*WORDS, "--store", str(store.root)]), said.getvalue()


def kill(process, store):
    """Kill the command and all of its processes, those that load images and those of torchrun too."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if str(store.root).encode() in (folder / "cmdline").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)
    process.communicate()


def until(condition, process):
    """Wait until there is something. Tells whether the process still runs."""
    while not condition() and process.poll() is None:
        time.sleep(0.01)
    return process.poll() is None


def contents(store):
    """The bytes of the checkpoint, but for times and the command."""
    folder, found = store.folder("mine"), {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in (MANIFEST, "verified.json"):
            found[str(path.relative_to(folder))] = path.read_bytes()
    values = json.loads((folder / MANIFEST).read_text())
    del values["created"]
    for site in values["sites"]:
        del site["training"]["seconds"]
    return {**found, MANIFEST: values}


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """What comes out without an interruption, by the number of processes."""
    made = {}

    def of(processes):
        if processes not in made:
            store = Store(tmp_path_factory.mktemp("whole"))
            if processes == 1:
                assert here(place, store)[0] == 0
            else:
                process = start(place, store.root, processes)
                output, _ = process.communicate()
                assert process.returncode == 0, output
            assert list(store.unfinished()) == []
            made[processes] = contents(store)
        return made[processes]

    return of


@pytest.mark.parametrize("processes", [1, *([2] if KILLS > 2 else [])])
def test_a_killed_training_goes_on_and_ends_with_the_same_bytes(processes, place, whole, tmp_path):
    store = Store(tmp_path / "store")
    moments = [  # in the middle of the extraction, and of the training
        lambda: any(path.stat().st_size for path in store.activations.glob(".*.part/digests.npy.sha256")),
        lambda: any(store.training.glob("*/*.safetensors")),
    ]
    for number in range(KILLS):
        process = start(place, store.root, processes)
        if KILLS > 2:
            deadline = time.monotonic() + random.uniform(4, 20)
            running = until(lambda deadline=deadline: time.monotonic() > deadline, process)
        else:
            running = until(moments[number], process)
        if running:
            kill(process, store)
        else:  # it was faster
            output, _ = process.communicate()
            assert process.returncode == 0, output
            assert contents(store) == whole(processes)
            shutil.rmtree(store.root)
    if processes == 1:
        code, output = here(place, store)
    else:
        process = start(place, store.root, processes)
        output, _ = process.communicate()
        code = process.returncode
    assert code == (2 if "checkpoint 'mine' in" in output else 0), output  # or killed at its end
    if KILLS == 2:
        assert "cached, in" in output and "the training continues after" in output
    Checkpoint.load(store.folder("mine")).verify()
    assert list(store.unfinished()) == []
    assert contents(store) == whole(processes)
