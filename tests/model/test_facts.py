"""What a method may say of itself in the results."""

import json

import numpy as np
import pytest
import torch

from vs2_plugin.model.facts import facts_of


class Says:
    def __init__(self, facts):
        self.facts = facts


class Raises:
    @property
    def facts(self):
        return {"mean": 1 / 0}


class Unprintable:
    def __repr__(self):
        raise RuntimeError("no repr")


GOOD = {"a": 1, "b2_c": 0.5, "word": "any text", "yes": True, "less": -(2**62), "numpys": np.float64(0.5), "none": ""}
ODD = [
    ({"a": float("nan")}, "the fact 'a' = nan; expected a finite number, a line of text, True or False"),
    ({"a": float("inf")}, "the fact 'a' = inf"), ({"a": 10**400}, "the fact 'a' = 1000"),
    ({"a": None}, "the fact 'a' = None"), ({"a": [1, 2]}, "the fact 'a' = [1, 2]"), ({"a": {}}, "the fact 'a' = {}"),
    ({"a": torch.ones(3)}, "the fact 'a' = tensor("), ({"a": np.float32(1)}, "the fact 'a' = "),
    ({"a": 1j}, "the fact 'a' = 1j"), ({"a": b"x"}, "the fact 'a' = b'x'"), ({"a": "x" * 10**6}, "the fact 'a' = 'xxx"),
    ({"a": "two\nlines"}, "the fact 'a' = 'two"), ({"a": "\ud800"}, "the fact 'a' = "),
    ({"a": Unprintable()}, "the fact 'a' = <Unprintable instance"),
    ({1: 1}, "a fact named 1; expected lower-case letters"), ({"A b": 1}, "a fact named 'A b'"),
    ({"": 1}, "a fact named ''"), ({"x" * 1000: 1}, "a fact named 'xxx"), ({("a",): 1}, "a fact named ('a',)"),
    ({"method": "mine"}, "a fact named 'method', a name that is used for every method; expected another name"),
    ({"coverage": 0.5}, "a fact named 'coverage'"), ({"ece_before_bins": 0.5}, "a fact named 'ece_before_bins'"),
    ({"results_digest": "00"}, "a fact named 'results_digest'"),
    (7, "facts that cannot be read (TypeError: "), ("abc", "facts that cannot be read (ValueError: "),
    (None, "facts that cannot be read (TypeError: "),
]  # fmt: skip


def test_flat_values_under_plain_names_are_taken():
    assert facts_of(Says(GOOD)) == (GOOD, [])
    assert facts_of(lambda x: x) == ({}, [])
    json.dumps(facts_of(Says(GOOD))[0], allow_nan=False)


@pytest.mark.parametrize(("facts", "problem"), ODD, ids=lambda value: str(type(value)))
def test_odd_ones_are_left_out_and_named_and_the_others_stay(facts, problem):
    told = {**facts, "fine": 1} if isinstance(facts, dict) else facts
    found, [said] = facts_of(Says(told))
    assert said.startswith(problem) and len(said) < 200
    assert found == ({"fine": 1} if isinstance(facts, dict) else {})


def test_facts_that_raise_are_named():
    assert facts_of(Raises()) == (
        {}, ["facts that cannot be read (ZeroDivisionError: division by zero); expected a mapping of names to values"]
    )  # fmt: skip
