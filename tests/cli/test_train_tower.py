"""The tower of vs2-train-sae: as the harness loads it, without the random numbers that weights overwrite."""

from pathlib import Path

import pytest
import torch
from torch import nn

import vs2_plugin
from vs2_plugin.clip.backbone import load_backbone
from vs2_plugin.clip.tower import Tower

TINY = f"local-dir:{Path(vs2_plugin.__file__).parent / 'demo' / 'tiny_clip'}"


def load(monkeypatch, build, pretrained="some", **options):
    """What load_backbone makes of a model that ``build`` gives in the place of clip_benchmark's."""
    monkeypatch.setattr(
        "clip_benchmark.models.open_clip.load_open_clip", lambda **given: (build(), "transform", "tokenizer")
    )
    monkeypatch.setattr("vs2_plugin.clip.backbone.check_backbone", lambda *args: None)
    torch.manual_seed(0)
    return load_backbone("ViT-B-32", pretrained, **options).model


def same(one, other):
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == also and torch.equal(x, y) for (name, x), (also, y) in pairs)


def test_loaded_weights_are_the_same_without_random_ones_before():
    torch.manual_seed(0)
    usual = load_backbone(TINY, "")
    drawn = torch.get_rng_state()
    torch.manual_seed(0)
    quick = load_backbone(TINY, "", initialize=False)
    assert not torch.equal(torch.get_rng_state(), drawn)  # it did draw fewer
    assert same(quick.model, usual.model) and not quick.model.training
    assert Tower.of(quick.model, quick.transform) == Tower.of(usual.model, usual.transform)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(quick.model.encode_image(images), usual.model.encode_image(images))


def test_the_tiny_clip_of_random_weights_is_the_seeded_one(monkeypatch):
    build = lambda: nn.Linear(5, 4)  # noqa: E731
    usual = load(monkeypatch, build, "")
    assert same(load(monkeypatch, build, "", initialize=False), usual)


@pytest.mark.parametrize(
    "fill",
    [
        nn.init.kaiming_uniform_,
        nn.init.xavier_normal_,
        nn.init.trunc_normal_,
        nn.init.orthogonal_,
        lambda x: nn.init.normal_(tensor=x, std=0.02),
        lambda x: x.data.normal_(),
        lambda x: x.data[1:].uniform_(),
    ],
)
def test_what_no_weights_were_loaded_for_is_the_seeded_one(fill, monkeypatch):
    def build():
        model = nn.Sequential(nn.Linear(5, 4), nn.Linear(5, 4))
        fill(model[1].weight)
        model[0].load_state_dict({"weight": torch.ones(4, 5), "bias": torch.zeros(4)})
        return model

    assert same(load(monkeypatch, build, initialize=False), load(monkeypatch, build))


def test_a_buffer_that_was_not_loaded_is_the_seeded_one(monkeypatch):
    def build():
        model = nn.BatchNorm1d(3)
        model.register_buffer("noise", torch.empty(3).normal_(), persistent=False)
        return model

    assert torch.equal(load(monkeypatch, build, initialize=False).noise, load(monkeypatch, build).noise)
