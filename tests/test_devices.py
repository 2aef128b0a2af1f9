"""What is known of the processor."""

import platform

import pytest
import torch

from vs2_plugin.devices import emulates_bfloat16


@pytest.mark.parametrize(
    ("machine", "capabilities", "emulates"),
    [
        ("x86_64", {"avx2": True, "avx512_bf16": False, "amx_bf16": False}, True),
        ("x86_64", {"avx2": True, "avx512_bf16": True, "amx_bf16": False}, False),
        ("AMD64", {"avx2": True, "amx_bf16": True}, False),
        ("arm64", {"neon": True}, False),
        ("x86_64", {}, False),  # unknown
    ],
)
def test_processors_without_bfloat16_units_are_known(machine, capabilities, emulates, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert emulates_bfloat16() is emulates


def test_a_gpu_is_another_matter(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not emulates_bfloat16()
