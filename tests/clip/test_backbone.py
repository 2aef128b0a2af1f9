import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vs2_plugin
from vs2_plugin.clip import backbone
from vs2_plugin.clip.backbone import (
    Loaded,
    Tower,
    check_backbone,
    ignores_pretrained,
    load_backbone,
    warn_about_quickgelu,
)
from vs2_plugin.errors import TowerError

TINY = f"local-dir:{Path(vs2_plugin.__file__).parent / 'demo' / 'tiny_clip'}"


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
    assert " at 0x" not in str(make_tower(transform=transform).preprocessing)


def test_a_tower_survives_json(make_tower):
    tower = make_tower(change=with_preprocessing(fill=torch.float32))  # a value that JSON does not know
    again = Tower.from_json(json.loads(json.dumps(tower.to_json())))
    assert again == tower
    assert tower.difference(again) is None


@pytest.mark.parametrize("facts", [{}, {"parameters": "x"}, None, "text"])
def test_json_of_something_else_is_refused(facts):
    with pytest.raises((KeyError, TypeError)):
        Tower.from_json(facts)


SHIPPED = """
import sys, torch
from vs2_plugin.clip.backbone import Tower, load_backbone
loaded = load_backbone(sys.argv[1], "")
print(Tower.of(loaded.model, loaded.transform).to_json())
"""


def test_the_shipped_tower_is_the_same_in_another_process():
    loaded = load_backbone(TINY, "")
    tower = Tower.of(loaded.model, loaded.transform)
    other = subprocess.run(
        [sys.executable, "-c", SHIPPED, TINY], capture_output=True, text=True, check=True, timeout=120
    )
    assert other.stdout.splitlines()[-1] == str(tower.to_json())
    assert tower.activations == ["GELU"]
    assert tower.preprocessing["size"] in (32, [32, 32])


# ---- names


CHECKED = [
    ("ViT-B-32", "", None),
    ("ViT-B-32", "openai", None),
    ("ViT-B/32", "openai", None),
    ("ViT-B-32", "laion2b-s34b-b79k", None),
    ("ViT-B-32", __file__, None),
    ("hf-hub:org/model", "whatever", None),
    (TINY, "whatever", None),
    ("ViT-B-3", "", "open_clip has no model 'ViT-B-3'; did you mean ViT-B-32"),
    ("vit-b-32", "", "open_clip has no model 'vit-b-32'; did you mean "),
    ("qqqqqq", "", "open_clip has no model 'qqqqqq'; All names: "),
    ("ViT-B-32", "opena", "ViT-B-32 has no weights 'opena'; known tags: openai, "),
    ("ViT-B-32", "/no/such/file.pt", "ViT-B-32 has no weights '/no/such/file.pt'"),
    (
        "ViT-S-16",
        "openai",
        "ViT-S-16 has no weights 'openai'; known tags: none: use --pretrained '' for random weights",
    ),
    ("local-dir:/no/such/folder", "", "no file /no/such/folder/open_clip_config.json"),
    ("local-dir:", "", "no file open_clip_config.json"),
]


@pytest.mark.parametrize(("name", "pretrained", "message"), CHECKED)
def test_names_and_weights_are_checked_before_anything_is_loaded(name, pretrained, message):
    if message is None:
        check_backbone(name, pretrained)
    else:
        with pytest.raises(TowerError) as error:
            check_backbone(name, pretrained)
        assert message in str(error.value)


def test_every_pretrained_pair_of_open_clip_is_accepted():
    import open_clip

    pairs = open_clip.list_pretrained()
    assert len(pairs) > 50
    for name, tag in pairs:
        check_backbone(name, tag)


def test_weights_come_with_some_names():
    names = ["ViT-B-32", "hf-hub:a/b", "local-dir:a", "local-dir"]
    assert [ignores_pretrained(name) for name in names] == [False, True, True, False]


def test_the_quickgelu_mismatch_is_said_once_with_the_right_name(capsys, monkeypatch):
    monkeypatch.setattr(backbone, "_warned", set())
    for _ in range(2):
        warn_about_quickgelu("ViT-B-32", "openai")
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "'openai' were trained with QuickGELU and ViT-B-32 has GELU" in said
    assert "ViT-B-32-quickgelu is the right name for them" in said
    warn_about_quickgelu("ViT-B-16", "openai")
    assert "ViT-B-16-quickgelu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "pretrained"),
    [
        ("ViT-B-32-quickgelu", "openai"),
        ("ViT-B-32", "laion2b_s34b_b79k"),
        ("ViT-B-32", ""),
        ("hf-hub:a/b", "openai"),
        (TINY, ""),
    ],
)
def test_no_quickgelu_warning_where_nothing_is_wrong(name, pretrained, capsys, monkeypatch):
    monkeypatch.setattr(backbone, "_warned", set())
    warn_about_quickgelu(name, pretrained)
    assert capsys.readouterr().err == ""


# ---- loading


def test_the_shipped_model_is_loaded_as_the_harness_loads_it():
    loaded = load_backbone(TINY, "")
    assert isinstance(loaded, Loaded)
    assert not loaded.model.training
    assert loaded.tokenizer(["a photo"]).shape == (1, 16)
    from PIL import Image

    assert loaded.transform(Image.new("L", (8, 8))).shape == (3, 32, 32)


def test_what_open_clip_raises_becomes_one_line(tmp_path):
    (tmp_path / "open_clip_config.json").write_text("{ not json\n")
    with pytest.raises(TowerError) as error:
        load_backbone(f"local-dir:{tmp_path}", "ignored")
    assert str(error.value).startswith(f"could not load local-dir:{tmp_path} ")
    assert "\n" not in str(error.value)


def test_weights_that_cannot_be_read_are_named(tmp_path):
    broken = tmp_path / "weights.pt"
    broken.write_bytes(os.urandom(64))
    with pytest.raises(TowerError, match=r"could not load RN50 with weights '.*weights\.pt'.*: \w+Error"):
        load_backbone("RN50", str(broken))
