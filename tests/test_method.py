import pytest

from vs2_plugin.errors import PluginError
from vs2_plugin.method import COMMON, LABELS, NEIGHBOURS, RESERVED, Method, Option

BAD_METHODS = [
    *({"name": name} for name in ("", "VS2", "a-b", "a:b", "a b", "2a", "a\n", *sorted(RESERVED))),
    {"name": "m", "aliases": "abc"},
    *({"name": "m", "aliases": (name,)} for name in ("", "M", "a:b", "a@b", "a b", *sorted(RESERVED))),
    {"name": "m", "build": "print"},
    {"name": "m", "labels": "some"},
    {"name": "m", "options": [Option("a"), Option("a")]},
    *({"name": "m", "options": [Option(option.name)]} for option in COMMON),
    *({"name": "m", "gallery": "neighbours", "options": [Option(option.name)]} for option in NEIGHBOURS),
    {"name": "m", "sae": "other"},
    {"name": "m", "gallery": "some"},
    {"name": "m", "gallery": "images", "needs_checkpoint": False},
    {"name": "m", "site": "input"},
    {"name": "m", "protocol": "all"},
    {"name": "m", "protocol": "image"},
    {"name": "m", "protocol": "stream"},
    {"name": "m", "protocol": "transductive"},
    {"name": "m", "views": True},
    {"name": "m", "site": "logits", "gallery": "neighbours"},
    {"name": "m", "site": "logits", "options": [Option("a", float, 1.0, auto=(0.0, 1.0))]},
    {"name": "m", "site": "logits", "protocol": "stream", "options": [Option("order")]},
    {"name": "m", "options": [Option("protocol")]},
    {"name": "m", "options": Option("a")},
    {"name": "m", "options": {"a": 1.0}},
    {"name": "m", "options": ["a"]},
    {"name": "m", "options": [Option("checkpoint")]},
]


@pytest.mark.parametrize("declaration", BAD_METHODS, ids=str)
def test_a_wrong_method_is_a_plugin_error(declaration):
    with pytest.raises(PluginError, match=r"^method (name )?'"):
        Method(**{"build": print, **declaration})


def test_fill_gives_every_option_and_unsets_the_excluded():
    options = [Option("a", float, 1.0), Option("b", float, 2.0), Option("c", excludes=("a",))]
    method = Method("m", print, options, needs_checkpoint=False)
    assert method.fill({}) == {"a": 1.0, "b": 2.0, "c": None}
    assert method.fill({"b": 5.0}) == {"a": 1.0, "b": 5.0, "c": None}
    assert method.fill({"c": 3.0}) == {"a": None, "b": 2.0, "c": 3.0}


def test_a_method_with_a_checkpoint_has_the_common_options_beside_its_own():
    own = [Option("a", float, 1.0)]
    assert Method("m", print, own).all_options == (*own, *COMMON)
    assert Method("m", print, own, needs_checkpoint=False).all_options == tuple(own)
    assert Method("m", print, own).fill({}) == {"a": 1.0, **{option.name: option.default for option in COMMON}}
    assert Method("m", print, own, needs_checkpoint=False).option(COMMON[0].name) is None


def test_a_method_has_the_options_of_what_it_uses():
    own = (Option("a", float, 1.0),)
    assert Method("m", print, own, gallery="neighbours").all_options == (*own, *NEIGHBOURS, *COMMON)
    assert Method("m", print, own, gallery="images").all_options == (*own, *COMMON)
    assert Method("m", print, own, gallery="neighbours", site="output").all_options == (*own, *NEIGHBOURS)
    assert Method("m", print, [Option("n", int, 3)], gallery="images").fill({})["n"] == 3


@pytest.mark.parametrize("always", ["none", "train", "oracle"])
def test_an_oracle_is_known_by_its_option(always):
    method = Method("m", print, [LABELS], gallery="neighbours", labels=always)
    assert method.labels_used(method.fill({})) == always
    assert method.labels_used(method.fill({"labels": "oracle"})) == "oracle"
    assert Method("m", print, labels=always).labels_used({}) == always


def test_pseudo_labels_need_classes_and_true_ones_do_not():
    method = Method("m", print, [LABELS], gallery="neighbours")
    assert method.needs_classes(method.fill({})) and not method.needs_classes(method.fill({"labels": "oracle"}))
    assert Method("m", print, classes=True).needs_classes({}) and not Method("m", print).needs_classes({})
