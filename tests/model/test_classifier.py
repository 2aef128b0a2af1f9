"""Class names and prompts, and the class embeddings that are made of them."""

import pytest
import torch
from open_clip.model import CLIP
from torch._subclasses.fake_tensor import FakeTensorMode

import vs2_plugin
from vs2_plugin.demo.digits import CLASSES
from vs2_plugin.errors import SettingError
from vs2_plugin.model import classifier as module
from vs2_plugin.model.classifier import Classifier, class_names, prompts_of

from .conftest import TINY


def test_class_embeddings_that_are_not_of_unit_norm_are_said(caplog):
    weights = torch.nn.functional.normalize(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), dim=0)
    assert Classifier.unnamed(weights).names == ("0", "1", "2") and not caplog.records
    Classifier.unnamed(weights * torch.tensor([1, 1, 0.9]))
    assert "class embeddings are not of unit norm" in caplog.text


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        ("cat", "expected a list of names"),
        ([1, 2], "expected a list of names"),
        (5, "expected a list of names"),
        ({"cat", "dog"}, "expected a list of names"),
        ([], "none; expected at least two"),
        (["cat"], "'cat' alone"),
        (["cat", "dog", " cat"], "'cat' is given twice"),
        (["cat", " "], "name number 2 is empty"),
    ],
)
def test_wrong_classes_are_told(names, problem):
    with pytest.raises(SettingError, match=problem):
        class_names(names)
    with pytest.raises(SettingError, match=problem):  # before anything is loaded
        vs2_plugin.load("vs2:no-such-model", classes=names)


def test_names_may_come_one_after_another():
    assert class_names(name for name in ("cat", "dog")) == ("cat", "dog")


def test_classes_that_the_model_cannot_tell_apart_are_named(in_demo, caplog):
    vs2_plugin.load(f"vs2:{TINY}", dataset="wds/digits", classes=["zero", "one", "Zero"], amp=False)
    (said,) = [record.message for record in caplog.records if "cannot tell them apart" in record.message]
    assert said.startswith("the classes 'zero', 'Zero' have the same embedding")
    vs2_plugin.load(f"vs2:{TINY}", dataset="wds/digits", classes=CLASSES, amp=False)
    assert caplog.text.count("cannot tell them apart") == 1


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"),
    reason="torch before 2.9 looks for the GPU even where nothing is computed",
)
def test_classes_are_embedded_on_the_model_s_own_gpu_of_several(monkeypatch):
    """Of two GPUs that are not there, nothing is computed, but where it would be."""
    monkeypatch.setattr(module, "warn_of_equals", lambda names, weights: None)  # it reads the numbers
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    with FakeTensorMode():
        with torch.device("cuda:1"):
            model = CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text)
        tokens = torch.zeros(1, 8, dtype=torch.long)  # of one prompt
        classifier = Classifier.of(model, lambda texts: tokens, ["cat", "dog"], None, False)
    assert classifier.weights.device == torch.device("cuda:1")


def test_prompts_have_a_place_for_the_name():
    assert prompts_of(None) == ("a photo of a {c}.",) and prompts_of("{} and {c}") == ("{c} and {c}",)
    for wrong in ("a photo", "a {d}", "a {", "{c.x}", "{0}", "a {c:{c}}", "{c:>100000}", "{c!r}"):
        with pytest.raises(SettingError, match="expected one {c} where the class name goes"):
            prompts_of([wrong])
    with pytest.raises(SettingError, match="prompts: none"):
        prompts_of([])
    for wrong in (5, {"a {c}"}):
        with pytest.raises(SettingError, match="expected a list of prompts"):
            prompts_of(wrong)
