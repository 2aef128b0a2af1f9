"""The word ``auto`` in declarations of options and methods, and in model strings."""

from dataclasses import replace

import pytest

from vs2_plugin.errors import ModelStringError, PluginError
from vs2_plugin.method import AUTO, AUTOMATIC, COMMON, LABELS, NEIGHBOURS, Method, Option
from vs2_plugin.modelstring import parse
from vs2_plugin.steering.builtin import vs2_methods
from vs2_plugin.sweep.grid import outcome_key, read_grids

NUMBER = Option("x", float, 1.0, minimum=0, maximum=9, auto=(0.0, 1.0, 2.0))


def test_the_word_is_read_where_it_is_declared():
    assert NUMBER.parse("auto") == AUTO and NUMBER.parse("2") == 2.0 and NUMBER.check(AUTO) is None
    assert NUMBER.describe() == "a number from 0 to 9, or auto (default 1.0)"
    assert Option("x", float, AUTO, auto=(0, 1)).describe() == "a number, or auto (default auto)"
    for text in ("automatic", "Auto", " auto", "auto\n", ""):
        with pytest.raises(ValueError, match="^a number from 0 to 9, or auto$"):
            NUMBER.parse(text)
    with pytest.raises(ValueError, match="^a number$"):
        Option("x", float).parse("auto")
    assert Option("x", str).parse("auto") == "auto"  # an ordinary word


WRONG = [
    ({"auto": (1.0,)}, "auto is (1.0,); expected two values or more of a number"),
    ({"auto": ()}, "auto is (); expected two"),
    ({"auto": True}, "auto is True; expected two"),
    ({"auto": "01"}, "auto is '01'; expected two"),
    ({"type": bool, "auto": (False, True)}, "expected two values or more of a number"),
    ({"type": int, "auto": (0, 1)}, "expected two values or more of a number"),
    ({"file": True}, "file is for the path of a file; expected type str"),
    ({"type": str, "auto": ("a", "b")}, "expected two values or more of a number"),
    ({"auto": (0.0, 5.0), "maximum": 3}, "auto holds 5.0, which is not a number, at most 3"),
    ({"auto": (0.0, -1.0), "minimum": 0}, "auto holds -1.0"),
    ({"auto": (0.0, float("nan"))}, "auto holds nan"),
    ({"auto": (0.0, AUTO)}, "auto holds 'auto'"),
    ({"auto": (0.0, "1")}, "auto holds '1'"),
    ({"auto": (0.0, True)}, "auto holds True"),
    ({"default": AUTO}, "its default 'auto' is not a number"),
]


@pytest.mark.parametrize(("declaration", "part"), WRONG, ids=[str(row[0]) for row in WRONG])
def test_a_wrong_declaration_is_a_plugin_error(declaration, part):
    with pytest.raises(PluginError) as error:
        Option("x", **declaration)
    assert part in str(error.value) and "'x'" in str(error.value)


def test_a_list_serves_and_options_can_be_hashed():
    option = Option("x", float, auto=[0, 1])
    assert option.auto == (0, 1) and hash(option) == hash(Option("x", float, auto=(0, 1)))


@pytest.mark.parametrize(
    ("declaration", "part"),
    [
        ({"needs_checkpoint": False}, "which is chosen with the gallery of a checkpoint; set needs_checkpoint"),
        ({"options": [NUMBER, Option("prior", str)]}, "two options share a name"),
        ({"options": [replace(NUMBER, auto_needs=("y", "so"))]}, "auto of 'x' needs 'y', which is not an option"),
    ],
)
def test_a_method_with_a_wrong_one_is_a_plugin_error(declaration, part):
    with pytest.raises(PluginError, match="^method 'm'") as error:
        Method("m", print, **{"options": [NUMBER], **declaration})
    assert part in str(error.value)


def test_a_method_with_an_automatic_option_understands_the_prior():
    assert Method("m", print, [NUMBER]).all_options == (NUMBER, *AUTOMATIC, *COMMON)
    both = Method("m", print, [NUMBER, LABELS], gallery="neighbours")
    assert both.all_options == (NUMBER, LABELS, *AUTOMATIC, *NEIGHBOURS, *COMMON)
    assert Method("m", print, [NUMBER], site="output").all_options == (NUMBER, *AUTOMATIC)
    assert Method("m", print, [Option("prior", str)]).option("prior").help == ""  # without auto, a name like others


def test_classes_are_needed_where_something_is_to_be_chosen():
    method = Method("m", print, [NUMBER, Option("y", float, AUTO, auto=(0, 1))])
    chosen = [option.name for option in method.automatic(method.fill({}))]
    assert chosen == ["y"] and method.needs_classes(method.fill({}))
    assert [option.name for option in method.automatic(method.fill({"x": AUTO}))] == ["x", "y"]
    assert method.automatic(method.fill({"y": 1.0})) == () and not method.needs_classes(method.fill({"y": 1.0}))


BUILT_IN = {method.name: method for method in vs2_methods()}
CAN = {"vs2": ["alpha"], "pass": ["alpha"], "vs2s": ["p", "alpha"], "vs2pp": ["alpha"], "clipsteer": ["alpha"]}
CAN |= {"centre": ["alpha"]}


@pytest.mark.parametrize("name", BUILT_IN)
def test_which_built_in_options_can_be_chosen(name):
    options = [option for option in BUILT_IN[name].options if option.auto]
    assert [option.name for option in options] == CAN.get(name, [])
    for option in options:
        assert option.auto[0] == 0 and list(option.auto) == sorted({*option.auto})
    assert (BUILT_IN[name].option("prior") is not None) == (name in CAN)
    assert (BUILT_IN[name].option("brake") is not None) == (name in ("vs2pp", "clipsteer"))


def test_model_strings():
    found = parse("vs2:ViT-B-32@alpha=auto@prior=folder/shares.json")
    assert (found.options["alpha"], found.options["gamma"], found.options["lam"]) == (AUTO, None, None)
    assert found.options["prior"] == "folder/shares.json" and parse(str(found)) == found
    assert parse("vs2:ViT-B-32").options["alpha"] is None
    selective = parse("vs2s:ViT-B-32")
    assert (selective.options["p"], selective.options["alpha"]) == (AUTO, AUTO)
    assert parse("vs2s:ViT-B-32@alpha=0").options["p"] == AUTO
    assert parse("vs2pp:ViT-B-32@brake=0.9@alpha=auto").options["brake"] == 0.9
    assert parse("vs2pp:ViT-B-32").options["brake"] is None


MISTAKES = [
    ("vs2:X@alpha=auto@gamma=2", "gamma"),
    ("vs2:X@lam=2@alpha=auto", "lam"),
    ("vs2:X@alpha=automatic", "a number from -1000 to 1000, or auto"),
    ("vs2:X@gamma=auto", "a number from -1000 to 1000"),
    ("proto:X@alpha=auto", "a number from -1000 to 1000"),
    ("proto:X@prior=x.json", "unknown option 'prior' of proto"),
    ("amp:X@gamma=auto", "a number from -1000 to 1000"),
    ("vs2s:X@p=9", "a number from 0 to 8, or auto"),
    ("vs2s:X@alpha=2", "with alpha=2, method 'vs2s' steers whatever p is"),
    ("vs2s:X@gamma=2", "unknown option 'gamma' of vs2s"),
    ("vs2pp:X@alpha=auto", "option alpha=auto: expected @brake= beside it (a number from 0 to 1), since moving images"),
    ("clipsteer:X@n=5@alpha=auto", "option alpha=auto: expected @brake= beside it"),
    ("vs2pp:X@brake=1.1", "a number from 0 to 1"),
    ("vs2pp:X@brake=auto", "a number from 0 to 1"),
    ("vs2:X@alpha=auto@prior=", "a JSON file"),
]


@pytest.mark.parametrize(("text", "part"), MISTAKES, ids=[row[0] for row in MISTAKES])
def test_mistakes_in_a_model_string_are_named(text, part):
    with pytest.raises(ModelStringError) as error:
        parse(text)
    assert part in str(error.value)


def test_the_word_is_a_value_of_a_sweep_like_others():
    [grid] = read_grids(["vs2:X@alpha=0,auto,1"])
    assert grid.axes == {"alpha": ("0", "auto", "1")} and len(grid.points) == 3
    keys = {outcome_key(parse(text)) for text in ("vs2:X@alpha=auto", "vs2:X@alpha=0", "vs2:X@alpha=auto@prior=a.json")}
    assert len(keys) == 3
    assert outcome_key(parse("vs2:X@gamma=1")) == outcome_key(parse("vs2:X@alpha=0"))
    assert len({outcome_key(parse(f"vs2s:X@{text}")) for text in ("p=0", "p=2", "p=2@alpha=1", "p=0@alpha=1")}) == 4
