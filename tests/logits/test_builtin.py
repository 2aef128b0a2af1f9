"""The built-in methods on logits: their options reach their formulas, and are those of their papers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vs2_plugin.errors import ModelStringError
from vs2_plugin.logits.builtin import vs2_methods
from vs2_plugin.logits.dn import normalised
from vs2_plugin.logits.inmap import learned
from vs2_plugin.logits.stata import mixture
from vs2_plugin.logits.tda import Stream
from vs2_plugin.logits.zero import voted
from vs2_plugin.logits.zlap import propagated
from vs2_plugin.modelstring import parse
from vs2_plugin.steering.batch import Batch, call
from vs2_plugin.steering.context import Context

METHODS = {method.name: method for method in vs2_methods()}
#: What each paper recommends, but for Sinkhorn's step, which takes classes to be equally frequent.
DEFAULTS = {
    "dn": {"weight": 0.25},
    "inmap": {"steps": 2000, "rate": 10, "sure": 0.6, "sinkhorn": 0},
    "zlap": {"edges": 5, "power": 5, "damping": 0.3},
    "tda": {"positive": 2, "sharpness": 5, "negative": 0.117, "negative_sharpness": 1},
    "zero": {"keep": 0.3},
    "stata": {"anchor": 1, "density": 10, "rounds": 10},
}


def drawn(*shape, seed):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.3, dim=-1)


TEXTS, IMAGES, VIEWS = drawn(5, 8, seed=0).T.contiguous(), drawn(40, 8, seed=1), drawn(7, 6, 8, seed=2)


def read_by(name, **options):
    """A function from embeddings to the logits that a built-in method gives with these options, others by default."""
    context = Context(nn.Module(), "visual", 8, classifier=TEXTS, unlabeled=IMAGES)
    read = METHODS[name].build(context, **{**DEFAULTS[name], **options})
    return lambda x: call(read, x, Batch())


def streamed(read):
    return torch.cat([read(x[None]) for x in IMAGES])


@pytest.mark.parametrize(
    ("name", "options", "found", "expected"),
    [
        ("dn", {"weight": 0.4}, lambda read: read(IMAGES), lambda: normalised(TEXTS, IMAGES, weight=0.4)(IMAGES)),
        (
            "inmap",
            {"steps": 7, "rate": 3.0, "sure": 0.9, "sinkhorn": 2},
            lambda read: read(IMAGES),
            lambda: learned(TEXTS, IMAGES, steps=7, rate=3.0, sure=0.9, sinkhorn=2)(IMAGES),
        ),
        (
            "zlap",
            {"edges": 3, "power": 2.0, "damping": 0.6},
            lambda read: read(IMAGES),
            lambda: propagated(TEXTS, IMAGES, edges=3, power=2.0, damping=0.6)(IMAGES, Batch()),
        ),
        (
            "tda",
            {"positive": 3.0, "sharpness": 2.0, "negative": 0.7, "negative_sharpness": 4.0},
            streamed,
            lambda: streamed(Stream(TEXTS, positive=3.0, sharpness=2.0, negative=0.7, negative_sharpness=4.0)),
        ),
        ("zero", {"keep": 0.7}, lambda read: read(VIEWS), lambda: voted(TEXTS, keep=0.7)(VIEWS)),
        (
            "stata",
            {"anchor": 3.0, "density": 20.0, "rounds": 2},
            lambda read: read(IMAGES),
            lambda: mixture(TEXTS, IMAGES, anchor=3.0, density=20.0, rounds=2),
        ),
    ],
    ids=DEFAULTS,
)
def test_each_option_reaches_its_place_in_the_formula(name, options, found, expected):
    assert torch.equal(found(read_by(name, **options)), expected())
    assert not torch.equal(found(read_by(name)), expected())


def test_defaults_are_those_of_the_papers():
    assert {name: {one.name: one.default for one in method.options} for name, method in METHODS.items()} == DEFAULTS
    assert all(type(one.default) is one.type for method in METHODS.values() for one in method.options)


def test_each_sees_what_its_paper_shows_it():
    shown = {"unlabeled": ["dn", "inmap", "zlap"], "stream": ["tda"], "image": ["zero"], "transductive": ["stata"]}
    for protocol, names in shown.items():
        assert [name for name, method in METHODS.items() if method.protocol == protocol] == names
    assert [name for name, method in METHODS.items() if method.views] == ["zero"]
    assert all(method.site == "logits" for method in METHODS.values())


@pytest.mark.parametrize(
    "text",
    [
        "dn:X@weight=1.01", "dn:X@weight=-0.01", "inmap:X@steps=-1", "inmap:X@rate=-1", "inmap:X@sure=1.01",
        "inmap:X@sure=-0.01", "inmap:X@sinkhorn=-1", "zlap:X@edges=1", "zlap:X@power=-1", "zlap:X@damping=1",
        "zlap:X@damping=-0.1", "tda:X@positive=-1", "tda:X@sharpness=-1", "tda:X@negative=-1",
        "tda:X@negative_sharpness=-1", "zero:X@keep=1.01", "zero:X@keep=-0.1", "stata:X@anchor=0",
        "stata:X@density=-1", "stata:X@rounds=0",
    ],
)  # fmt: skip
def test_what_has_no_meaning_in_a_formula_is_refused(text):
    with pytest.raises(ModelStringError, match="expected"):
        parse(text)


@pytest.mark.parametrize(
    ("name", "option", "bound"),
    [
        (method.name, option.name, bound)
        for method in METHODS.values()
        for option in method.options
        for bound in (option.minimum, option.maximum)
        if bound < 1_000_000 or option.name != "steps"  # which take minutes
    ],
)
def test_up_to_their_bounds_options_give_finite_logits(name, option, bound):
    read = read_by(name, **{option: bound})
    logits = streamed(read) if name == "tda" else read(VIEWS if name == "zero" else IMAGES)
    assert logits.isfinite().all() and parse(f"{name}:X@{option}={bound}")
