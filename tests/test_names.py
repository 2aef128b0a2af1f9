"""How the text of a model name is taken apart, and told from open_clip's own names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vs2_plugin.names import Parts, is_steered, split, with_weights

SPLIT = [
    # text, parts, checkpoint, options
    ("vs2:ViT-B-32", Parts("vs2", "ViT-B-32"), None, {}),
    ("vs2:ViT-B-32@sae@gate=0.9", Parts("vs2", "ViT-B-32", ("sae", "gate=0.9")), "sae", {"gate": "0.9"}),
    ("vs2:hf-hub:org/model@gate=0.9", Parts("vs2", "hf-hub:org/model", ("gate=0.9",)), None, {"gate": "0.9"}),
    (r"vs2:local-dir:C:\tiny", Parts("vs2", r"local-dir:C:\tiny"), None, {}),
    ("local-dir:tiny@sae", Parts(None, "local-dir:tiny", ("sae",)), "sae", {}),
    ("ViT-B-32@word=a=b", Parts(None, "ViT-B-32", ("word=a=b",)), None, {"word": "a=b"}),
    (":@", Parts("", "", ("",)), "", {}),
    ("a@b:c", Parts(None, "a", ("b:c",)), "b:c", {}),
    ("", Parts(None, ""), None, {}),
]


@pytest.mark.parametrize(("text", "parts", "checkpoint", "options"), SPLIT, ids=[repr(row[0]) for row in SPLIT])
def test_names_are_taken_apart(text, parts, checkpoint, options):
    assert split(text) == parts
    assert (split(text).checkpoint, split(text).given) == (checkpoint, options)


@given(st.text(alphabet="ab:@=-") | st.text())
def test_any_text_can_be_taken_apart_and_put_together(text):
    assert str(split(text)) == text


def test_open_clips_own_names_are_not_steered():
    import open_clip

    names = open_clip.list_models()
    assert len(names) > 50
    assert [name for name in names if is_steered(name)] == []


NAMES = [
    ("ViT-B-32", False),
    ("ViT-B/32", False),
    ("hf-hub:org/model", False),
    ("local-dir:/models/tiny", False),
    ("local-dir:/models/a@b", False),
    ("local-dir:C:/models:x@gamma=2", False),
    ("vs2:ViT-B-32", True),
    ("vs2:hf-hub:org/model", True),
    ("vs2:local-dir:/models/tiny", True),
    ("nope:ViT-B-32", True),
    (":ViT-B-32", True),
    ("ViT-B-32@gamma=2", True),
]


@pytest.mark.parametrize(("name", "steered"), NAMES)
def test_steered_names_are_told_from_open_clips(name, steered):
    assert is_steered(name) is steered


def test_a_folder_is_the_same_however_it_is_written():
    names = ("local-dir:a/clip", "local-dir:a/clip/", "local-dir:./a/../a/clip")
    assert {with_weights(name, "ignored") for name in names} == {"local-dir:a/clip"}
