"""Shares of the classes, from a file."""

import json

import pytest
import torch

from vs2_plugin.errors import ModelStringError
from vs2_plugin.strength.prior import read_prior


def test_a_prior_is_read_from_the_home_folder_and_told_where_it_does_not_fit(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    path = tmp_path / "prior.json"
    path.write_text(json.dumps({"dog": 3, "cat": 1, "cow": 0}))
    assert read_prior("~/prior.json").tolist() == [0.75, 0.25, 0]
    found = read_prior("~/prior.json", ["ant", "cow", "cat", "dog"], 4)
    assert found.tolist() == [0, 0, 0.25, 0.75] and found.dtype == torch.float64
    with pytest.raises(ModelStringError, match=r"'cat', 'cow', 'dog' is not a class of the data set"):
        read_prior("~/prior.json", ["ant"], 1)
    with pytest.raises(ModelStringError, match="3 shares for 3 classes, whose names are not known"):
        read_prior("~/prior.json", None, 3)
    path.write_text("[1, 2]")
    with pytest.raises(ModelStringError, match="2 shares for 3 classes, whose names are known"):
        read_prior("~/prior.json", ["ant", "cow", "cat"], 3)
