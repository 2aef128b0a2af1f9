import json

import pytest
import torch

from vs2_plugin.clip.backbone import load_backbone
from vs2_plugin.clip.tower import Tower
from vs2_plugin.demo.digits import MODEL as TINY


@pytest.fixture(scope="module")
def make_tower(make_clip):
    """A function that gives the Tower of a tiny CLIP; ``change`` gets the model first."""

    def make(change=lambda model: None, transform="plain", **clip):
        model = make_clip(**clip)
        change(model)
        return Tower.of(model, transform)

    return make


def nudge(model):
    with torch.no_grad():
        model.visual.ln_post.bias[3] += 1e-7


def test_equal_towers_have_equal_digests(make_tower):
    assert make_tower() == make_tower()
    assert make_tower().difference(make_tower()) is None


def to_half(model):
    model.visual.half()


DIFFERENT = [
    ("one number", {"change": nudge}, "its vision tower had other parameters (SHA-256 "),
    ("another seed", {"seed": 1}, "its vision tower had other parameters"),
    ("half precision", {"change": to_half}, "its vision tower had other parameters"),
    ("one block more", {"layers": 4}, "its vision tower had other parameters"),
    ("QuickGELU", {"quick_gelu": True}, "it was trained on a tower with GELU, this one has QuickGELU"),
    ("another transform", {"transform": "fancy"}, "its images were preprocessed with transform plain, not fancy"),
]


@pytest.mark.parametrize(("other", "words"), [row[1:] for row in DIFFERENT], ids=[row[0] for row in DIFFERENT])
def test_different_towers_are_told_apart_in_words(other, words, make_tower):
    assert make_tower() != make_tower(**other)
    assert words in make_tower().difference(make_tower(**other))


def test_the_text_tower_does_not_matter(make_tower):
    def change(model):
        with torch.no_grad():
            model.text_projection += 1

    assert make_tower(change=change) == make_tower()


def test_buffers_count_too(make_clip):
    model = make_clip(layers=[1, 1, 1, 1], width=8, head_width=8)
    before = Tower.of(model, None)
    model.visual.bn1.running_mean += 1
    assert "other parameters" in before.difference(Tower.of(model, None))
    assert before.activations == ["ReLU"]


def with_preprocessing(**changed):
    def change(model):
        model.visual.preprocess_cfg = {"size": (32, 32), "mean": (0.5, 0.5, 0.5), "interpolation": "bicubic", **changed}

    return change


def test_open_clips_preprocessing_tells_towers_apart(make_tower):
    tower = make_tower(change=with_preprocessing())
    same = make_tower(change=with_preprocessing(), transform="another object")
    other = make_tower(change=with_preprocessing(interpolation="bilinear", size=(64, 64)))
    assert tower.difference(same) is None
    assert tower.difference(other) == (
        "its images were preprocessed with interpolation bicubic, not bilinear; size [32, 32], not [64, 64]"
    )


def test_a_transform_in_place_of_open_clips_preprocessing_is_told_without_addresses(make_tower):
    import open_clip

    transform = open_clip.image_transform(32, is_train=False)
    transform.transforms.append(nudge)
    told = str(make_tower(transform=transform).preprocessing)
    assert " at 0x" not in told and "<function nudge>" in told


def test_a_tower_survives_json(make_tower):
    tower = make_tower(change=with_preprocessing(fill=torch.float32))  # a value that JSON does not know
    again = Tower(**json.loads(json.dumps(tower.to_json())))
    assert again == tower
    assert tower.difference(again) is None


def test_the_shipped_tower_is_the_same_in_every_process():
    """As in the one that wrote it down here. Another training of the tiny CLIP is another tower."""
    loaded = load_backbone(TINY, "")
    tower = Tower.of(loaded.model, loaded.transform)
    assert tower.to_json()["parameters"] == "481745e54d7a923e0261c69e3bb1643eba208f5d410eb1fcb7a920fef8b60929"
    assert tower.activations == ["GELU"]
    assert tower.preprocessing["size"] in (32, [32, 32])
