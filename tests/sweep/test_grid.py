"""The grammar of ranges and lists, and which points come to the same."""

import subprocess
import sys
from decimal import Decimal
from fractions import Fraction
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vs2_plugin.errors import ModelStringError
from vs2_plugin.modelstring import parse
from vs2_plugin.sweep.grid import CHECKPOINT, as_number, outcome_key, read_grids

ACCEPTED = [
    ("vs2:X", {}, ["vs2:X"]),
    ("vs2:X@gamma=2", {}, ["vs2:X@gamma=2"]),
    ("vs2:X@gamma=1:2:0.5", {"gamma": ("1", "1.5", "2")}, ["vs2:X@gamma=1", "vs2:X@gamma=1.5", "vs2:X@gamma=2"]),
    ("vs2:X@alpha=-1:1:1", {"alpha": ("-1", "0", "1")}, ["vs2:X@alpha=-1", "vs2:X@alpha=0", "vs2:X@alpha=1"]),
    ("vs2:X@lam=0:1:.4", {"lam": ("0", "0.4", "0.8")}, ["vs2:X@lam=0", "vs2:X@lam=0.4", "vs2:X@lam=0.8"]),
    ("vs2:X@lam=1e-3:2e-3:1e-3", {"lam": ("0.001", "0.002")}, ["vs2:X@lam=0.001", "vs2:X@lam=0.002"]),
    ("vs2:X@lam=3:3:1", {}, ["vs2:X@lam=3"]),
    ("vs2pp:X@n=10,25", {"n": ("10", "25")}, ["vs2pp:X@n=10", "vs2pp:X@n=25"]),
    ("vs2pp:X@n=10:30:20", {"n": ("10", "30")}, ["vs2pp:X@n=10", "vs2pp:X@n=30"]),
    ("vs2:X@blocks=10,10+11", {"blocks": ("10", "10+11")}, ["vs2:X@blocks=10", "vs2:X@blocks=10+11"]),
    ("vs2:X@a,b", {CHECKPOINT: ("a", "b")}, ["vs2:X@a", "vs2:X@b"]),
    ("vs2:X@hf:o/a,hf:o/b#v1", {CHECKPOINT: ("hf:o/a", "hf:o/b#v1")}, ["vs2:X@hf:o/a", "vs2:X@hf:o/b#v1"]),
    ("vs2:X@some/folder@gate=0.9", {}, ["vs2:X@some/folder@gate=0.9"]),
    ("vs2:hf-hub:o/m@lam=1,2", {"lam": ("1", "2")}, ["vs2:hf-hub:o/m@lam=1", "vs2:hf-hub:o/m@lam=2"]),
]

REFUSED = [
    ("vs2:X@gamma=1:3", "expected three numbers START:STOP:STEP, or a list such as a,b,c"),
    ("vs2:X@gamma=1:2:3:4", "expected three numbers START:STOP:STEP"),
    ("vs2:X@gamma=1:x:1", "option gamma='1:x:1': expected three numbers"),
    ("vs2:X@gamma=1:inf:1", "expected three numbers"),
    ("vs2:X@gamma=1:1_0:1", "expected three numbers"),
    ("vs2:X@gamma=::", "expected three numbers"),
    ("vs2:X@gamma=3:1:0.5", "a STOP of at least START and a STEP above 0"),
    ("vs2:X@gamma=1:3:0", "a STOP of at least START and a STEP above 0"),
    ("vs2:X@gamma=1:3:-1", "a STOP of at least START and a STEP above 0"),
    ("vs2:X@gamma=1:2:1e-9", "1000000001 values; expected at most 10000; take a larger step"),
    ("vs2:X@gamma=1:2:1e-400", "option gamma='1:2:1e-400': too many values; expected at most 10000"),
    ("vs2:X@gamma=0:1:0.001@lam=0:1:0.001", "1002001 points; expected at most 10000"),
    ("vs2:X@gamma=1,,2", "nothing beside a comma"),
    ("vs2:X@gamma=1,", "nothing beside a comma"),
    ("vs2:X@a,", "checkpoint 'a,': nothing beside a comma"),
    ("vs2:X@gamma=1,1", "a value is given twice"),
    ("vs2:X@gama=1:2:1", "unknown option 'gama' of vs2; did you mean 'gamma'?"),
    ("vs2:X@lam=-1:1:1", "option lam='-1': expected a number from 0 to 1000"),
    ("vs2pp:X@n=1:2:0.5", "option n='1.5': expected a whole number"),
    ("vs2pp:X@rule=majority,best", "option rule='best': expected majority or query"),
    ("vs2:X@alpha=1,2@gamma=1,2", "'alpha' and 'gamma' exclude each other"),
    ("vs2:X,Y@gamma=1,2", "backbone 'X,Y' is not the name of a model"),
    ("vs2:X@gamma=1,2@a,b", "a checkpoint name comes first"),
]


@pytest.mark.parametrize(("text", "axes", "models"), ACCEPTED)
def test_accepted_strings(text, axes, models):
    [grid] = read_grids([text])
    assert grid.axes == axes and [point.model for point in grid.points] == models
    assert all(str(point.spec) == str(parse(point.model)) for point in grid.points)


@pytest.mark.parametrize(("text", "message"), REFUSED)
def test_refused_strings(text, message):
    with pytest.raises(ModelStringError) as caught:
        read_grids([text])
    assert message in str(caught.value)


def test_decimals_are_those_of_the_text():
    [grid] = read_grids(["vs2:X@gamma=1:3:0.1"])
    assert grid.axes["gamma"] == tuple(f"{tenths / 10:g}" for tenths in range(10, 31))


def test_places_are_values_on_the_axes():
    [grid] = read_grids(["vs2:X@a,b@gate=0.9@lam=0:1:1"])
    assert [point.place for point in grid.points] == [("a", "0"), ("a", "1"), ("b", "0"), ("b", "1")]


def test_one_point_of_each_however_written():
    first, second, third = read_grids(["vs2:X@gamma=1.0@lam=2", "vs2:X@lam=2,3@gamma=1", "vs2:X"])
    assert second.points[0].model == first.points[0].model == "vs2:X@gamma=1.0@lam=2"
    assert second.points[0].place == ("2",) and second.points[1].model == "vs2:X@lam=3@gamma=1"
    assert third.points[0].model == "vs2:X"


def test_plain_models_are_no_grids():
    assert read_grids(["ViT-B-32", "hf-hub:o/m"]) == []


def test_points_of_one_alpha_come_to_the_same():
    [grid] = read_grids(["vs2:X@gamma=1:3:0.1@lam=0:10:0.5"])
    assert len(grid.points) == 441
    assert len({outcome_key(point.spec) for point in grid.points}) == len({i * j for i in range(21) for j in range(21)})


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("vs2:X@gamma=1.2@lam=1", "vs2:X@gamma=1.1@lam=2", True),  # not the same alpha in double precision
        ("vs2:X", "vs2:X@alpha=1.05", True),
        ("vs2:X", "vs2:X@gamma=1.5", True),
        ("vs2:X@lam=0", "vs2:X@gamma=1", True),
        ("vs2:X", "vs2:X@alpha=1.06", False),
        ("vs2:X", "pass:X", False),
        ("vs2:X", "vs2:Y", False),
        ("vs2:X", "vs2:X@a", False),
        ("vs2:X", "vs2:X@gate=0.9", False),
        ("dn:vs2:X@weight=0.1@gamma=1.5", "dn:vs2:X@weight=0.1", True),
        ("dn:vs2:X@weight=0.1", "dn:vs2:X@weight=0.2", False),
        ("vs2:X", "vs2:X@blocks=3", False),
        ("vs2pp:X@rule=query", "vs2pp:X", False),
        ("amp:X@gamma=1", "amp:X@gamma=2", False),
    ],
)
def test_what_comes_to_the_same(one, other, same):
    assert (outcome_key(parse(one)) == outcome_key(parse(other))) is same


def test_numbers_and_words():
    assert [as_number(text) for text in ("1e-3", "-2", "10+11", "all")] == [0.001, -2.0, None, None]


@st.composite
def ranges(draw):
    """A range that ``lam`` accepts, and its values as fractions."""
    places, start, step = draw(st.integers(2, 9)), draw(st.integers(0, 3000)), draw(st.integers(1, 500))
    count, beyond = draw(st.integers(1, 40)), draw(st.integers(0, step - 1))
    ends = start, start + (count - 1) * step + beyond, step
    forms = [draw(st.sampled_from("fe+")) for _ in ends]
    numbers = [Decimal(number).scaleb(-places) for number in ends]
    texts = [f"{'+' if form == '+' else ''}{number:{form.strip('+')}}" for number, form in zip(numbers, forms)]
    return ":".join(texts), [Fraction(start + index * step, 10**places) for index in range(count)]


@given(ranges())
@settings(max_examples=10 * settings.default.max_examples)
def test_a_range_holds_exact_multiples_of_its_step(case):
    text, expected = case
    [grid] = read_grids([f"vs2:X@lam={text}"])
    values = [point.model.partition("lam=")[2] for point in grid.points]
    assert [Fraction(value) for value in values] == expected
    assert not any("e" in value.lower() or (value.endswith("0") and "." in value) for value in values)
    assert [point.spec.given["lam"] for point in grid.points] == [float(value) for value in expected]


PIECES = ["vs2:X", "vs2pp:X", "vs2s:X", "knn:X", "ViT", "@lam=", "@alpha=", "@n=", "@rule=", "@gate=", "@blocks="]
PIECES += ["@a", "@", ",", ":", "0", "1", "2", "0.5", ".25", "1e-1", "1e-999", "9" * 20, "auto", "majority,query"]
PIECES += ["10+11", "a,b", "-", "0:1:0.5", "1:3:1", "0,1", "0.9,0.99", "\u0661", "=", " ", "\n"]


@given(
    st.lists(st.sampled_from(PIECES), max_size=9).map("".join)
    | st.lists(st.sampled_from(["@lam=0:1:0.5", "@gamma=1,2", "@gate=0.9,0.5", "@a,b", "@alpha=1,auto"]), max_size=4)
    .map(lambda words: "".join(["vs2:X", *words]))
)  # fmt: skip
@settings(max_examples=10 * settings.default.max_examples)
def test_any_text_is_a_grid_of_all_combinations_or_refused(text):
    try:
        grids = read_grids([text, text])
    except ModelStringError:
        return
    for grid in grids:
        assert [point.place for point in grid.points] == list(product(*grid.axes.values()))
        assert all(parse(point.model) == point.spec for point in grid.points)
        assert [read_grids([point.model])[0].points[0].model for point in grid.points] == [p.model for p in grid.points]


def test_reading_a_grid_loads_nothing_heavy():
    code = "import sys; from vs2_plugin.sweep.grid import read_grids; read_grids(['vs2:X@gamma=1:2:0.1'])"
    code += "; print(*({'torch', 'numpy', 'matplotlib', 'clip_benchmark'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
