"""What is known of the processor."""

import platform

import pytest
import torch

from vs2_plugin.devices import emulates_bfloat16, has_bfloat16_units, own_device
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
