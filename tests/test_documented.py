"""Fields where help() shows them."""

import dataclasses
import inspect
import pydoc
from dataclasses import dataclass

import pytest

import vs2_plugin
from vs2_plugin.checkpoint.records import SiteSAE, TrainingData
from vs2_plugin.documented import documented
from vs2_plugin.model.explanation import Explanation, Line, PlaceChange
from vs2_plugin.settings import setting
from vs2_plugin.training.request import TrainRequest

PUBLIC = [value for name in vs2_plugin.__all__ if dataclasses.is_dataclass(value := getattr(vs2_plugin, name))]


@documented
@dataclass
class Point:
    """A place."""

    x: float
    """From the left,
    in pixels."""
    y: float = 0.0
    kind: str = setting("dot", help="what is drawn")


@documented
@dataclass
class Named(Point):
    """A place with a name."""

    name: str = ""
    """What it is called."""


def test_the_texts_of_fields_stand_below_that_of_the_class():
    assert inspect.getdoc(Point) == (
        "A place.\n\nFields:\n    x: float\n        From the left, in pixels.\n    y: float\n    kind: str\n"
        "        what is drawn"
    )
    assert Named.__doc__.startswith("A place with a name.\n\nFields:\n    x: float\n        From the left")
    assert Named.__doc__.endswith("    name: str\n        What it is called.")


def test_without_a_source_the_docstring_is_what_it_was(monkeypatch):
    def gone(owner):
        raise OSError("could not get source code")

    monkeypatch.setattr(inspect, "getsource", gone)
    assert Point.__doc__.startswith("A place.\n\nFields:\n    x")


@pytest.mark.parametrize("owner", [*PUBLIC, SiteSAE, TrainingData, TrainRequest, Explanation, Line, PlaceChange])
def test_help_tells_every_field(owner):
    text = pydoc.plain(pydoc.render_doc(owner))
    for field in dataclasses.fields(owner):
        if field.init:
            assert f"    {field.name}: " in text
    assert len(PUBLIC) > 6
