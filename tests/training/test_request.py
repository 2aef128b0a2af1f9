"""What a training is asked for, before anything is loaded."""

import subprocess
import sys
from dataclasses import replace

import pytest

from vs2_plugin.errors import SettingError, TowerError
from vs2_plugin.sae.config import TrainConfig
from vs2_plugin.settings import settings_of
from vs2_plugin.training.request import TrainRequest


def test_a_request_is_the_command_that_a_person_would_type():
    model = {"model": "ViT-L-14", "pretrained": "openai"}
    request = TrainRequest(**model, dataset="cifar100", k=(32, 64), lr=5e-4, gallery=False)
    words = ["vs2-train-sae", "--model", "ViT-L-14", "--pretrained", "openai", "--dataset", "cifar100"]
    assert request.words() == [*words, "--k", "32", "64", "--lr", "0.0005", "--no_gallery"]
    assert TrainRequest(dataset=("a", "b")).words() == ["vs2-train-sae", "--dataset", "a", "b"]


def test_settings_of_the_sae_are_declared_where_they_are_used():
    """With the same ranges, choices and types, and without values: those are the recipe's."""
    declared, asked = settings_of(TrainConfig), settings_of(TrainRequest)
    assert declared.keys() - asked.keys() == {"rescale"}  # the recipe's alone
    for name in declared.keys() & asked.keys():
        same = {"default": None, "help": "", "several": False}
        assert replace(declared[name], **same) == replace(asked[name], **same)
        assert getattr(TrainRequest(dataset="a"), name) is None
    assert {name for name in declared if asked.get(name) and asked[name].several} == {
        "k", "expansion_factor", "pass_weight", "seed"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"model": "vs2:ViT-B-32@gamma=2"}, TowerError, "plain backbone; use --model ViT-B-32"),
        ({"max_images": 0}, SettingError, "max_images is 0; expected a whole number, at least 1"),
        ({"blocks": "first"}, SettingError, "blocks is 'first'; expected last, all, output, or block numbers"),
        ({"blocks": "1" * 5000}, SettingError, "blocks is '1{79}; expected last, all, output, or block numbers"),
        ({"blocks": "\u00b2"}, SettingError, "blocks is '\u00b2'; expected last, all, output, or block numbers"),
        ({"blocks": "\u0663"}, SettingError, "blocks is '\u0663'; expected last, all, output, or block numbers"),
        ({"seed": 2**63}, SettingError, "seed is 9223372036854775808; expected a whole number from 0 to"),
        ({"k": (8, 0)}, SettingError, "k is 0; expected a whole number from 1"),
        ({"calibrate_on": "b"}, SettingError, "--calibrate_on 'b': expected some of --dataset: a"),
        ({"gallery_labels": True, "gallery": False}, SettingError, "--gallery_labels is for the gallery"),
        ({"retrieval_encoder": "resnet10t,", "gallery": False}, SettingError, "leave out --no_gallery"),
        ({"retrieval_encoder": "local-dir:timm/model,"}, SettingError, "model,'; expected names of timm models"),
    ],
)
def test_mistakes_are_named(given, error, message):
    with pytest.raises(error, match=message):
        TrainRequest(**{"dataset": "a", **given})


@pytest.mark.parametrize(
    ("name", "hint"),
    [("no_gallery", "; did you mean gallery=False?"), ("sampels", "; did you mean samples?"), ("zz", "")],
)
def test_a_setting_that_there_is_not_is_named(name, hint):
    with pytest.raises(SettingError) as told:
        TrainRequest.of(**{"dataset": "a", name: True})
    assert str(told.value) == f"a training has no setting {name!r}{hint}"


def test_a_request_loads_nothing():
    code = "import sys, vs2_plugin.training.request; print(sorted({'torch', 'numpy'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
