"""What is known of the processor, and graphs, without a GPU."""

import platform
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from vs2_plugin.devices import GraphRoom, Replayed, emulates_bfloat16, has_bfloat16_units, own_device
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
        patch.setattr(torch.cuda, "current_stream", lambda: self.stream)
        patch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "stream", stream))

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert (pool, stream, capture_error_mode) == ("pool", "side", "thread_local")
        before, self.stream = self.stream, stream
        self.done.append("begin")
        try:
            yield
        finally:
            self.done.append("end")
            if self.fails:  # as torch does, without the stream of before
                raise RuntimeError("previous error during capture")
            self.stream = before


def test_work_is_told_twice_recorded_in_parts_and_replayed(monkeypatch):
    gpu = Gpu(monkeypatch)

    def work():
        gpu.done.append(("one", gpu.stream))
        replayed.pause(lambda: gpu.done.append("then"))
        gpu.done.append(("two", gpu.stream))

    replayed, told = Replayed(work, GraphRoom("pool", "side")), []
    for _ in range(4):
        replayed()
        told.append(replayed.is_told)
    assert told == [False, False, True, True]
    first, again = [("one", "own"), "then", ("two", "own")], ["replay", "then", "replay"]
    recorded = ["begin", ("one", "side"), "end", "begin", ("two", "side"), "end"]
    assert gpu.done == first * 2 + recorded + again * 2


def test_work_that_cannot_be_recorded_leaves_the_stream_as_it_was(monkeypatch):
    gpu = Gpu(monkeypatch)
    gpu.fails = True
    replayed = Replayed(lambda: None, GraphRoom("pool", "side"))
    replayed(), replayed()
    with pytest.raises(RuntimeError, match="previous error"):
        replayed()
    assert gpu.stream == "own" and gpu.done == ["begin", "end"]
