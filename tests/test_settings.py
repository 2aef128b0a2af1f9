"""A setting: what it accepts and says; and what is derived from a dataclass of settings."""

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vs2_plugin.errors import PluginError, SettingError
from vs2_plugin.method import Option
from vs2_plugin.settings import Setting, flags_of, like, read, setting, settings_of, validate, words_of

#: An option of a model string is a setting and has to behave as one.
KINDS = pytest.mark.parametrize("kind", [Setting, Option])


def as_kind(kind, declared):
    """The same declaration as a Setting or an Option."""
    return kind(**{one.name: getattr(declared, one.name) for one in fields(Setting)})


NUMBER = Setting("x", float, minimum=-2, maximum=3)
COUNT = Setting("x", int, minimum=1)
RULE = Setting("x", str, choices=("majority", "query"))
FLAG = Setting("x", bool)
BLOCKS = Setting("x", str, pattern=(r"all|[0-9]+(\+[0-9]+)*", "all or numbers"))

ACCEPTED = [
    (NUMBER, "-2", -2.0),
    (NUMBER, "3", 3.0),
    (NUMBER, "1e-3", 0.001),
    (NUMBER, "+.5", 0.5),
    (Setting("x", float), "-1e300", -1e300),
    (COUNT, "1", 1),
    (COUNT, "+12", 12),
    (RULE, "query", "query"),
    (BLOCKS, "all", "all"),
    (BLOCKS, "10+11", "10+11"),
    (Setting("x", str), "any_word", "any_word"),
    (Setting("x", int, choices=(10, 25)), "25", 25),
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
    (Setting("x", float), "nan", "a number"),
    (Setting("x", float, maximum=3), "4", "a number, at most 3"),
    (COUNT, "0", "a whole number, at least 1"),
    (COUNT, "1.0", "a whole number, at least 1"),
    (COUNT, "1_0", "a whole number, at least 1"),
    (COUNT, "true", "a whole number, at least 1"),
    (COUNT, "9" * 5000, "a whole number, at least 1"),
    (RULE, "Query", "majority or query"),
    (RULE, "", "majority or query"),
    (Setting("x", str), " word", "a word"),
    (BLOCKS, "", "all or numbers"),
    (BLOCKS, "10+", "all or numbers"),
    (BLOCKS, "all+1", "all or numbers"),
    (BLOCKS, "1\n", "all or numbers"),
    (Setting("x", int, choices=(10, 25)), "11", "10 or 25"),
    (FLAG, "yes", "true or false"),
    (FLAG, "", "true or false"),
    (FLAG, "2", "true or false"),
]


@KINDS
@pytest.mark.parametrize(("declared", "text", "value"), ACCEPTED)
def test_accepted_texts(declared, text, value, kind):
    found = as_kind(kind, declared).parse(text)
    assert found == value
    assert type(found) is declared.type


@KINDS
@pytest.mark.parametrize(("declared", "text", "expected"), REFUSED)
def test_refused_texts_say_what_was_expected(declared, text, expected, kind):
    with pytest.raises(ValueError) as error:
        as_kind(kind, declared).parse(text)
    assert str(error.value) == expected


@KINDS
def test_a_huge_whole_number_is_read_or_refused(kind):
    assert kind("x", int, maximum=10).check(10**400) == "a whole number, at most 10"


@KINDS
@given(value=st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_round_trip(kind, value):
    assert kind("x", float).parse(str(value)) == value


@pytest.mark.parametrize("value", [True, False, "1", None, float("nan"), float("inf")])
@pytest.mark.parametrize("number", [float, int])
@KINDS
def test_values_that_are_no_numbers_fail_the_check(number, value, kind):
    assert kind("x", number).check(value) is not None


BAD_SETTINGS = [
    ({"name": ""}, "setting name ''"),
    ({"name": "Gamma"}, "setting name 'Gamma'"),
    ({"name": "a-b"}, "setting name 'a-b'"),
    ({"name": "2k"}, "setting name '2k'"),
    ({"name": "k\n"}, r"setting name 'k\n'"),
    ({"name": "x", "type": complex}, "has type <class 'complex'>; expected float, int, str or bool"),
    ({"name": "x", "type": "float"}, "has type 'float'"),
    ({"name": "x", "default": 5, "maximum": 3}, "its default 5 is not a number, at most 3"),
    ({"name": "x", "default": float("nan")}, "its default nan is not a number"),
    ({"name": "x", "default": True}, "its default True is not a number"),
    ({"name": "x", "default": "1"}, "its default '1' is not a number"),
    ({"name": "x", "type": str, "default": "c", "choices": ("a", "b")}, "its default 'c' is not a or b"),
    ({"name": "x", "type": int, "default": 1.5}, "its default 1.5"),
    ({"name": "x", "type": str, "default": 5}, "its default 5"),
    ({"name": "x", "type": bool, "default": "maybe"}, "its default 'maybe'"),
]


@KINDS
@pytest.mark.parametrize(("declaration", "part"), BAD_SETTINGS)
def test_a_wrong_setting_is_a_plugin_error(declaration, part, kind):
    with pytest.raises(PluginError) as error:
        kind(**declaration)
    assert part.replace("setting", kind.__name__.lower()) in str(error.value)


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        (Setting("x", float, 1.5, minimum=0), "a number, at least 0 (default 1.5)"),
        (Setting("x", int, maximum=9), "a whole number, at most 9 (not set)"),
        (Setting("x", bool, False), "true or false (default False)"),
        (Setting("x", str, "a", choices=("a", "b")), "a or b (default a)"),
    ],
)
@KINDS
def test_a_setting_describes_itself(declared, words, kind):
    assert as_kind(kind, declared).describe() == words


# ---- dataclasses of settings


@dataclass(frozen=True)
class Fit:
    """As :class:`vs2_plugin.sae.config.TrainConfig`."""

    rate: float = setting(0.5, minimum=0, maximum=1, help="how fast")
    k: int = setting(8, minimum=1)

    def __post_init__(self):
        validate(self)


@dataclass(frozen=True, kw_only=True)
class Request:
    """As :class:`vs2_plugin.training.request.TrainRequest`."""

    data: tuple[str, ...] = setting(help="data sets")
    root: str | None = setting(None)
    rate: float | None = like(Fit, "rate")
    k: tuple[int, ...] | None = like(Fit, "k", default=None, help="several")
    keep: bool = setting(True)
    again: bool = setting(False)
    fast: bool | None = setting(None)
    blocks: tuple[str, ...] = setting(("last",), pattern=(r"last|\d+", "last, or numbers"))

    def __post_init__(self):
        validate(self)


def test_a_field_is_a_setting_of_its_name_and_type():
    found = settings_of(Request)
    assert found["root"] == Setting("root", str)
    assert found["rate"] == Setting("rate", float, 0.5, minimum=0, maximum=1, help="how fast")
    assert found["k"] == Setting("k", int, minimum=1, help="several", several=True)
    assert found["fast"].type is bool and found["data"].several and not found["keep"].several


def test_an_object_holds_values_as_they_are_declared():
    request = Request(data="cifar100", k=[3, 4], blocks=9, root=Path("root"), rate=1)
    assert (request.data, request.k, request.blocks) == (("cifar100",), (3, 4), ("9",))
    assert (request.root, request.rate, request.keep) == ("root", 1, True)
    assert Request(data=("a", "b"), rate=None).rate is None


def test_numbers_of_numpy_become_those_of_python():
    request = Request(data="a", k=[np.int64(3), 4], rate=np.float32(0.5), fast=np.bool_(True), keep=np.bool_(True))
    assert repr((request.k, request.rate, request.fast, request.keep)) == "((3, 4), 0.5, True, True)"
    assert Request(data="a", k=np.array([3, 4])).k == (3, 4) and type(Fit(k=np.int64(8)).k) is int


WRONG = [
    ({"rate": 2}, "rate is 2; expected a number from 0 to 1"),
    ({"rate": "fast"}, "rate is 'fast'; expected a number from 0 to 1"),
    ({"k": [3, 0]}, "k is 0; expected a whole number, at least 1"),
    ({"k": []}, r"k is \[\]; expected a whole number, at least 1"),
    ({"keep": "no"}, "keep is 'no'; expected true or false"),
    ({"blocks": ["last", "first"]}, "blocks is 'first'; expected last, or numbers"),
    ({"data": True}, "data is True; expected a word"),
]


@pytest.mark.parametrize(("given", "message"), WRONG, ids=lambda value: str(value))
def test_what_is_not_accepted_is_named(given, message):
    with pytest.raises(SettingError, match=f"^{message}$"):
        Request(**{"data": "a", **given})


def test_a_setting_that_has_to_be_there_is_not_none():
    with pytest.raises(SettingError, match="rate is None; expected a number from 0 to 1"):
        Fit(rate=None)


def test_flags_change_the_default():
    flags = flags_of(Request)
    assert list(flags) == ["data", "root", "rate", "k", "no_keep", "again", "fast", "no_fast", "blocks"]
    assert [flags[name].value for name in ("no_keep", "again", "fast", "no_fast", "k")] == [
        False, True, True, False, None
    ]  # fmt: skip


def test_flags_of_a_file_are_read_as_settings():
    given = {"data": ["a", "b"], "k": 3, "rate": None, "no_keep": True, "again": False, "no_fast": True, "blocks": [9]}
    found = read(Request, given)
    assert found == {"data": ("a", "b"), "k": (3,), "keep": False, "fast": False, "blocks": ("9",)}
    assert Request(**found).fast is False
    with pytest.raises(SettingError, match="unknown key 'keep'; expected data, root, rate"):
        read(Request, {"keep": True})
    with pytest.raises(SettingError, match="again is 1; expected true or false"):
        read(Request, {"again": 1})
    with pytest.raises(SettingError, match="k is 'many'; expected a whole number"):
        read(Request, {"k": "many"})


def test_words_are_what_differs_from_the_defaults():
    assert words_of(Request(data=("a", "b"))) == ["--data", "a", "b"]
    request = Request(data="a", k=(3, 4), rate=0.001, keep=False, fast=True, blocks=(1, "last"))
    assert words_of(request) == [
        "--data", "a", "--rate", "0.001", "--k", "3", "4", "--no_keep", "--fast", "--blocks", "1", "last"
    ]  # fmt: skip
    assert words_of(Request(data="a", fast=False)) == ["--data", "a", "--no_fast"]
