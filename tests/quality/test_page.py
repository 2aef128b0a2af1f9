"""Lines, JSON and the page."""

import json

import pytest

from vs2_plugin.checkpoint.store import Store
from vs2_plugin.errors import DataError
from vs2_plugin.quality.measure import measure, stability
from vs2_plugin.quality.notes import NOTES
from vs2_plugin.quality.page import Quality, write_page
from vs2_plugin.quality.subject import open_subject

from .test_measure import trained  # noqa: F401


@pytest.fixture
def quality(trained):  # noqa: F811
    saes = [measure(open_subject(name, Store(trained), activations=trained / "X.npy")) for name in ("s0", "s1")]
    return Quality(saes, *stability(saes))


def test_the_page_tells_every_figure_with_what_it_means(quality, tmp_path):
    page, figures = write_page(quality, tmp_path / "out")
    text = page.read_text()
    for note in NOTES.values():
        assert note.title in text and note.usual.split(";")[0].split("'")[0] in text
    assert "not measured: it needs classes" not in text and text.count("<svg") == 5
    assert json.loads(figures.read_text()) == json.loads(quality.json())
    (tmp_path / "out" / "index.html").write_text("mine")
    with pytest.raises(DataError, match="vs2 sae did not write it"):
        write_page(quality, tmp_path / "out")


def test_lines_say_what_is_there_and_what_is_not(quality):
    lines = list(quality.lines())
    assert lines[0].startswith("all: 64 latents of width 16, 4 active, at activations; 400 activations of X.npy, those")
    assert any(line.startswith("  Explained variance, in domain: ") for line in lines)
    assert any(line.startswith("not measured: Class detected by one latent (AUC): it needs labels") for line in lines)


def test_a_figure_that_one_of_several_lacks_is_a_question_mark(trained):  # noqa: F811
    store = Store(trained)
    saes = [measure(open_subject("s0", store, activations=trained / "X.npy")), measure(open_subject("s1", store))]
    lines = list(Quality(saes, *stability(saes)).lines())
    [line] = [line for line in lines if line.startswith("  Monosemanticity (MS): ")]
    assert line.partition("  (")[0].endswith(", ?") and "figures of s0, s1:" in lines
    assert line.endswith(", ?)")  # what it is compared with, in the same order
    [told] = [line for line in lines if ": Monosemanticity (MS): " in line and line.startswith("not measured")]
    assert told.startswith("not measured for s1: ") and "name a file of them with --activations" in told


def test_the_page_says_what_one_of_several_lacks(trained, tmp_path):  # noqa: F811
    store = Store(trained)
    saes = [measure(open_subject("s0", store, activations=trained / "X.npy")), measure(open_subject("s1", store))]
    text = write_page(Quality(saes, *stability(saes)), tmp_path / "page")[0].read_text()
    assert "?<small>not measured: the checkpoint keeps no activations" in text


def test_json_holds_values_and_reasons(quality):
    told = json.loads(quality.json())
    assert [one["checkpoint"] for one in told["saes"]] == ["s0", "s1"] and told["saes"][0]["looked_at"] == 400
    figures = told["saes"][0]["figures"]
    assert 0 < figures["explained_variance"]["value"] < 1 and figures["probe_1"]["value"] is None
    assert told["together"]["stability"]["value"] == pytest.approx(told["pairs"][0]["stability"])
