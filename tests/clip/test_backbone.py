import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from vs2_plugin.clip import backbone
from vs2_plugin.clip.backbone import (
    Loaded,
    check_backbone,
    ignores_pretrained,
    load_backbone,
    require_weights,
    warn_about_quickgelu,
    weights_repository,
)
from vs2_plugin.demo.digits import MODEL as TINY
from vs2_plugin.errors import TowerError

# ---- names


CHECKED = [
    ("ViT-B-32", "", None),
    ("ViT-B-32", "openai", None),
    ("ViT-B/32", "openai", None),
    ("ViT-B-32", "laion2b-s34b-b79k", None),
    ("ViT-B-32", __file__, None),
    ("hf-hub:org/model", "whatever", None),
    ("hf-hub:", "", r"'hf-hub:' does not name a repository on the hub; expected hf-hub:ORGANISATION/NAME"),
    (TINY, "whatever", None),
    ("ViT-B-3", "", "open_clip has no model 'ViT-B-3'; did you mean ViT-B-32"),
    ("vit-b-32", "", "open_clip has no model 'vit-b-32'; did you mean "),
    ("qqqqqq", "", "open_clip has no model 'qqqqqq'; All names: "),
    ("ViT-B-32", "opena", "ViT-B-32 has no weights 'opena'; known tags: openai, "),
    ("ViT-B-32", "/no/such/file.pt", "ViT-B-32 has no weights '/no/such/file.pt', and there is no such file; known"),
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


def test_the_quickgelu_mismatch_is_said_once_with_the_right_name(caplog):
    warn_about_quickgelu.cache_clear()
    for _ in range(2):
        warn_about_quickgelu("ViT-B-32", "openai")
    [said] = caplog.messages
    assert "'openai' were trained with QuickGELU and ViT-B-32 has GELU" in said
    assert "ViT-B-32-quickgelu is the right name for them" in said
    warn_about_quickgelu("ViT-B-16", "openai")
    assert "ViT-B-16-quickgelu" in caplog.messages[-1]


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
def test_no_quickgelu_warning_where_nothing_is_wrong(name, pretrained, caplog):
    warn_about_quickgelu.cache_clear()
    warn_about_quickgelu(name, pretrained)
    assert caplog.messages == []


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


FETCHED = [
    (("ViT-B-32", "openai"), [("timm/vit_base_patch32_clip_224.openai", "kept")]),
    (("hf-hub:org/name", "ignored"), [("org/name", "kept")]),
    (("ViT-B-16-SigLIP", ""), [("timm/ViT-B-16-SigLIP", None)]),  # its tokenizer
    (("ViT-B-32", ""), []),
    (("ViT-B-32", __file__), []),
    (("local-dir:somewhere", "openai"), []),
]


@pytest.mark.parametrize(("model", "repositories"), FETCHED)
def test_what_is_fetched_from_a_hub_is_asked_for(model, repositories, monkeypatch):
    asked = []
    monkeypatch.setattr(backbone, "require_hub", lambda *given: asked.append(given))
    require_weights(*model, "kept")
    assert asked == repositories


def test_without_a_network_one_sentence_says_what_was_tried_and_what_helps(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("vs2_plugin.hub._PAUSES", (0,))
    with pytest.raises(TowerError) as error:
        load_backbone("ViT-B-32-quickgelu", "openai", str(tmp_path))
    assert re.fullmatch(
        r"could not load ViT-B-32-quickgelu with weights 'openai': no way to http://127.0.0.1:9 \(.*refused\), tried "
        r"for 0 s, and timm/vit_base_patch32_clip_224.openai is not in the hub's cache; without a network, give the "
        r"path of a weights file as --pretrained, or a folder as local-dir:PATH", str(error.value),
    )  # fmt: skip
    assert capfd.readouterr().err == ""


def test_what_the_network_said_comes_before_what_others_made_of_it(monkeypatch):
    def load(**given):
        try:
            raise TimeoutError("timed out")
        except TimeoutError:
            raise RuntimeError("please check your connection " * 20) from None

    monkeypatch.setattr("clip_benchmark.models.open_clip.load_open_clip", load)
    with pytest.raises(TowerError, match=r"PATH\): TimeoutError: timed out; RuntimeError: please check"):
        load_backbone("RN50", "")


@pytest.mark.parametrize("device", ["cuda:99", "no such device"])
def test_a_device_that_is_not_there_is_named(device):
    with pytest.raises(TowerError, match=rf"device '{device}' cannot be used: .*Error: .*; expected 'cpu', or a GPU's"):
        load_backbone(TINY, "", device=device)


def test_weights_that_are_no_numbers_are_told_before_an_image_is_read(tmp_path):
    folder = tmp_path / "clip"
    shutil.copytree(TINY.removeprefix("local-dir:"), folder)
    weights = load_file(folder / "open_clip_model.safetensors")
    weights["visual.conv1.weight"][0, 0, 0, 0] = float("nan")
    save_file(weights, folder / "open_clip_model.safetensors")
    with pytest.raises(TowerError, match=r"could not load local-dir:.*clip: visual.conv1.weight holds NaN or infinity"):
        load_backbone(f"local-dir:{folder}", "")


def test_weights_that_cannot_be_read_are_named(tmp_path):
    broken = tmp_path / "weights.pt"
    broken.write_bytes(os.urandom(64))
    with pytest.raises(TowerError, match=r"with weights '.*weights\.pt': it is not a file of weights \(\w+Error"):
        load_backbone("RN50", str(broken))
    torch.save({"positional_embedding": torch.zeros(77, 8)}, broken)  # refused by open_clip, before it loads them
    with pytest.raises(TowerError, match=r"weights\.pt': its weights do not fit this architecture \(Assertion"):
        load_backbone("ViT-S-32-alt", str(broken))


@pytest.mark.parametrize(
    "model, pretrained, repository",
    [
        ("ViT-B-32", "openai", "timm/vit_base_patch32_clip_224.openai"),
        ("ViT-B-32", "mine.pt", None),
        ("ViT-B-32", __file__, None),
        ("hf-hub:me/clip", "", "me/clip"),
        ("local-dir:clip", "", None),
    ],
)
def test_the_repository_of_weights_is_named_where_it_is_known(model, pretrained, repository):
    assert weights_repository(model, pretrained) == repository
