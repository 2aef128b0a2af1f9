"""What is asked of a sweep has clip_benchmark's names and defaults."""

import sys

import pytest

from vs2_plugin.errors import SettingError
from vs2_plugin.settings import settings_of
from vs2_plugin.sweep.request import SweepRequest


def test_names_and_defaults_are_those_of_clip_benchmark(monkeypatch):
    from clip_benchmark.cli import get_parser_args

    monkeypatch.setattr(sys, "argv", ["clip_benchmark", "eval"])
    _, stock = get_parser_args()
    request = SweepRequest(model="vs2:B", dataset="cifar100")
    others = {"model", "dataset", "output"}  # of these, a sweep has its own
    for name in settings_of(SweepRequest).keys() - others:
        usual = getattr(stock, name)
        assert getattr(request, name) == (usual[0] if isinstance(usual, list) else usual), name
    assert request.model == ("vs2:B",)


def test_values_outside_their_range_are_refused():
    with pytest.raises(SettingError, match="batch_size is 0; expected a whole number, at least 1"):
        SweepRequest(model="vs2:B", dataset="cifar100", batch_size=0)
