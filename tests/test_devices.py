"""What is known of the processor, and graphs, without a GPU."""

import os
import platform
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from vs2_plugin import devices
from vs2_plugin.devices import Replayed, emulates_bfloat16, has_bfloat16_units, own_device
from vs2_plugin.distributed import Processes


@pytest.mark.parametrize(
    ("machine", "capabilities", "has_units"),
    [
        ("x86_64", {"avx2": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ("x86_64", {"avx2": True, "avx512_bf16": True, "amx_bf16": False}, True),
        ("AMD64", {"avx2": True, "amx_bf16": True}, True),
        ("arm64", {"neon": True}, None),
        ("x86_64", {}, None),
    ],
)
def test_processors_without_bfloat16_units_are_known(machine, capabilities, has_units, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert has_bfloat16_units() is has_units
    assert emulates_bfloat16() is (has_units is False)


def test_a_gpu_is_another_matter(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not emulates_bfloat16()


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert own_device(Processes(5, 8, 1)) == "cuda:1"
    assert own_device(Processes(7, 8, 3)) == "cuda:1"  # of two GPUs
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert own_device() == "cpu"


class Gpu:
    """What torch.cuda has for graphs, of which this writes down what happens."""

    def __init__(self, patch):
        self.done, self.stream, self.fails = [], "own", False
        patch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: self.done.append("replay")))
        patch.setattr(torch.cuda, "graph", self.graph)
        patch.setattr(torch.cuda, "current_device", lambda: 3)
        patch.setattr(torch.cuda, "current_stream", lambda: self.stream)
        patch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "stream", stream))
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        patch.setattr(devices, "_capture_stream", lambda device: f"side {device}")
        patch.setattr(Replayed, "failed", False)

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert (pool, stream, capture_error_mode) == ("pool", "side 3", "thread_local")
        before, self.stream = self.stream, stream
        self.done.append("begin")
        try:
            yield
        finally:
            self.done.append("end")
            if self.fails:  # as torch does, without the stream of before
                raise RuntimeError("previous error during capture")
            self.stream = before


@pytest.fixture
def gpu(monkeypatch):
    return Gpu(monkeypatch)


def work_of(gpu, replayed, stops=()):
    """Work in two parts; and what it raises, call by call."""
    stops = iter(stops)

    def work():
        gpu.done.append(("one", gpu.stream))
        replayed.pause(lambda: gpu.done.append("then"))
        if stop := next(stops, None):
            raise stop
        gpu.done.append(("two", gpu.stream))

    return work


ONCE, AGAIN = [("one", "own"), "then", ("two", "own")], ["replay", "then", "replay"]
RECORDED = ["begin", ("one", "side 3"), "end", "begin", ("two", "side 3"), "end"]


def test_work_is_done_twice_recorded_in_parts_and_replayed(gpu):
    replayed, told = Replayed(), []
    work = work_of(gpu, replayed)
    for _ in range(4):
        replayed(work)
        told.append(replayed.is_told)
    assert told == [False, False, True, True] and gpu.done == ONCE * 2 + RECORDED + AGAIN * 2


@pytest.mark.parametrize("ends", ["in the work", "at the end"])
def test_work_that_cannot_be_recorded_is_done_each_time_and_no_other_recorded(gpu, ends):
    replayed = Replayed("pool")
    work = work_of(gpu, replayed, [None, None, RuntimeError("waits")] if ends == "in the work" else [])
    replayed(work), replayed(work)
    gpu.fails = ends == "at the end"
    gpu.done.clear()
    for _ in range(2):
        replayed(work)
        assert gpu.stream == "own" and not replayed.is_told
    assert gpu.done[-6:] == ONCE * 2 and gpu.done[0] == "begin" and gpu.done.count("begin") < 3
    other = Replayed()
    gpu.done.clear()
    for _ in range(4):
        other(work_of(gpu, other))
    assert gpu.done == ONCE * 4


def test_what_was_interrupted_is_recorded_anew(gpu):
    replayed = Replayed()
    work = work_of(gpu, replayed, [None, None, KeyboardInterrupt()])
    replayed(work), replayed(work)
    with pytest.raises(KeyboardInterrupt):
        replayed(work)
    assert not replayed.is_told and gpu.stream == "own"
    gpu.done.clear()
    replayed(work), replayed(work)
    assert gpu.done == RECORDED + AGAIN * 2


LEAVES = """
import gc, os
from vs2_plugin import devices

class Cycle:
    def __init__(self):
        self.own = self
    def __del__(self):
        print(name, flush=True)

gc.disable()
name = "the first's"
Cycle()
child = os.fork()
if not child:
    gc.collect()
    name = "its own"
    Cycle()
    gc.collect()
    os._exit(0)
os.waitpid(child, 0)
gc.collect()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_forked_process_frees_nothing_that_another_left():
    done = subprocess.run([sys.executable, "-c", LEAVES], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["its own", "the first's"]
