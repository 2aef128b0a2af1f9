import pytest
from hypothesis import given
from hypothesis import strategies as st

from vs2_plugin.errors import PluginError
from vs2_plugin.method import COMMON, LABELS, NEIGHBOURS, RESERVED, Method, Option

NUMBER = Option("x", float, minimum=-2, maximum=3)
COUNT = Option("x", int, minimum=1)
RULE = Option("x", str, choices=("majority", "query"))
FLAG = Option("x", bool)
BLOCKS = Option("x", str, pattern=(r"all|[0-9]+(\+[0-9]+)*", "all or numbers"))

ACCEPTED = [
    (NUMBER, "-2", -2.0),
    (NUMBER, "3", 3.0),
    (NUMBER, "1e-3", 0.001),
    (NUMBER, "+.5", 0.5),
    (Option("x", float), "-1e300", -1e300),
    (COUNT, "1", 1),
    (COUNT, "+12", 12),
    (RULE, "query", "query"),
    (BLOCKS, "all", "all"),
    (BLOCKS, "10+11", "10+11"),
    (Option("x", str), "any_word", "any_word"),
    (Option("x", int, choices=(10, 25)), "25", 25),
    (FLAG, "true", True),
    (FLAG, "True", True),
    (FLAG, "1", True),
    (FLAG, "false", False),
    (FLAG, "0", False),
]

REFUSED = [
    (NUMBER, "-2.001", "a number from -2 to 3"),
    (NUMBER, "3.001", "a number from -2 to 3"),
    (NUMBER, "nan", "a number from -2 to 3"),
    (NUMBER, "inf", "a number from -2 to 3"),
    (NUMBER, "-inf", "a number from -2 to 3"),
    (NUMBER, "1e999", "a number from -2 to 3"),
    (NUMBER, "1_0", "a number from -2 to 3"),
    (NUMBER, " 1", "a number from -2 to 3"),
    (NUMBER, "1\n", "a number from -2 to 3"),
    (NUMBER, "", "a number from -2 to 3"),
    (NUMBER, "one", "a number from -2 to 3"),
    (NUMBER, "0x1", "a number from -2 to 3"),
    (NUMBER, "1,5", "a number from -2 to 3"),
    (Option("x", float), "nan", "a number"),
    (Option("x", float, maximum=3), "4", "a number, at most 3"),
    (COUNT, "0", "a whole number, at least 1"),
    (COUNT, "1.0", "a whole number, at least 1"),
    (COUNT, "1_0", "a whole number, at least 1"),
    (COUNT, "true", "a whole number, at least 1"),
    (COUNT, "9" * 5000, "a whole number, at least 1"),
    (RULE, "Query", "majority or query"),
    (RULE, "", "majority or query"),
    (Option("x", str), " word", "a word"),
    (BLOCKS, "", "all or numbers"),
    (BLOCKS, "10+", "all or numbers"),
    (BLOCKS, "all+1", "all or numbers"),
    (BLOCKS, "1\n", "all or numbers"),
    (Option("x", int, choices=(10, 25)), "11", "10 or 25"),
    (FLAG, "yes", "true or false"),
    (FLAG, "", "true or false"),
    (FLAG, "2", "true or false"),
]


@pytest.mark.parametrize(("option", "text", "value"), ACCEPTED)
def test_accepted_texts(option, text, value):
    found = option.parse(text)
    assert found == value
    assert type(found) is option.type


@pytest.mark.parametrize(("option", "text", "expected"), REFUSED)
def test_refused_texts_say_what_was_expected(option, text, expected):
    with pytest.raises(ValueError) as error:
        option.parse(text)
    assert str(error.value) == expected


def test_a_huge_whole_number_is_read_or_refused():
    assert Option("x", int, maximum=10).check(10**400) == "a whole number, at most 10"


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_round_trip(value):
    assert Option("x", float).parse(str(value)) == value


@pytest.mark.parametrize("value", [True, False, "1", None, float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [float, int])
def test_values_that_are_no_numbers_fail_the_check(kind, value):
    assert Option("x", kind).check(value) is not None


BAD_OPTIONS = [
    ({"name": ""}, "option name ''"),
    ({"name": "Gamma"}, "option name 'Gamma'"),
    ({"name": "a-b"}, "option name 'a-b'"),
    ({"name": "2k"}, "option name '2k'"),
    ({"name": "k\n"}, r"option name 'k\n'"),
    ({"name": "x", "type": complex}, "has type <class 'complex'>; expected float, int, str or bool"),
    ({"name": "x", "type": "float"}, "has type 'float'"),
    ({"name": "x", "default": 5, "maximum": 3}, "its default 5 is not a number, at most 3"),
    ({"name": "x", "default": float("nan")}, "its default nan is not a number"),
    ({"name": "x", "default": True}, "its default True is not a number"),
    ({"name": "x", "default": "1"}, "its default '1' is not a number"),
    ({"name": "x", "type": str, "default": "c", "choices": ("a", "b")}, "its default 'c' is not a or b"),
]
NOT_REFUSED_YET = [
    ({"name": "x", "type": int, "default": 1.5}, "its default 1.5"),
    ({"name": "x", "type": str, "default": 5}, "its default 5"),
    ({"name": "x", "type": bool, "default": "maybe"}, "its default 'maybe'"),
]


@pytest.mark.parametrize(
    ("declaration", "part"),
    [
        *BAD_OPTIONS,
        *(pytest.param(*row) for row in NOT_REFUSED_YET),
    ],
)
def test_a_wrong_option_is_a_plugin_error(declaration, part):
    with pytest.raises(PluginError) as error:
        Option(**declaration)
    assert part in str(error.value)


BAD_METHODS = [
    *({"name": name} for name in ("", "VS2", "a-b", "a:b", "a b", "2a", "a\n", *sorted(RESERVED))),
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


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (Option("x", float, 1.5, minimum=0), "a number, at least 0 (default 1.5)"),
        (Option("x", int, maximum=9), "a whole number, at most 9 (not set)"),
        (Option("x", bool, False), "true or false (default False)"),
        (Option("x", str, "a", choices=("a", "b")), "a or b (default a)"),
    ],
)
def test_an_option_describes_itself(option, words):
    assert option.describe() == words
