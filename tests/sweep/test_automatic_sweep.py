"""``auto`` in a sweep: the choices and results are those of real runs."""

import csv

import pytest
import torch

from vs2_plugin.method import Method, Option
from vs2_plugin.plugins import registry
from vs2_plugin.sweep import evaluate
from vs2_plugin.sweep.grid import read_grids

from .conftest import TINY, at, both_commands, harness, result, sweep

STRINGS = [
    f"vs2:{TINY}@alpha=0,auto,2,8",
    f"vs2:{TINY}@other@alpha=auto@gate=0.5,0.9",
    f"pass:{TINY}@alpha=auto",
    f"vs2s:{TINY}",
    f"vs2s:{TINY}@alpha=1,auto@p=2",
    f"vs2pp:{TINY}@alpha=auto@n=10,25@brake=0.3",
    f"vs2pp:{TINY}@alpha=auto@n=10@brake=0.6,1@gate=0.95",
    f"clipsteer:{TINY}@alpha=auto,1@n=10@rule=query@brake=0.5",
]
POINTS = [point.model for grid in read_grids(STRINGS) for point in grid.points]
CHOOSING = [model for model in POINTS if "auto" in model or model == f"vs2s:{TINY}"]


def forget(folder):
    """Remove the kept choices, so that they are made anew."""
    for file in folder.glob("store/checkpoints/*/*/gallery/auto/*.json"):
        file.unlink()


@pytest.fixture(scope="module")
def both(laboratory):
    """All points by both commands, each of which makes its own choices."""
    both_commands(laboratory, STRINGS, POINTS, "auto-", lambda: forget(laboratory))
    forget(laboratory)


@pytest.mark.parametrize("model", POINTS)
def test_results_equal_the_harness(both, here, model):
    found = result(f"auto-sweep/{model}.json")
    assert found == result(f"auto-harness/{model}.json")
    assert ("vs2_auto" in found["metrics"]) == (model in CHOOSING)
    if model in CHOOSING:
        assert all(
            isinstance(found["metrics"][f"vs2_{name}"], float) for name in found["metrics"]["vs2_auto"].split("+")
        )


def test_the_points_differ(both, here):
    """So that equal results are not the same thing many times."""
    accuracies = {result(f"auto-sweep/{model}.json")["metrics"]["acc1"] for model in POINTS}
    evidence = {result(f"auto-sweep/{model}.json")["metrics"].get("vs2_auto_evidence") for model in POINTS}
    assert len(accuracies) > 3 and len(evidence) > 6


def test_the_table_and_the_picture_hold_the_word(both, here):
    rows = {row["model"]: row for row in csv.DictReader(open("auto-sweep/sweep.csv", encoding="utf-8"))}
    assert set(rows) == {TINY, *POINTS}
    chosen = result(f"auto-sweep/vs2:{TINY}@alpha=auto.json")["metrics"]
    assert rows[f"vs2:{TINY}@alpha=auto"]["vs2_alpha"] == str(chosen["vs2_alpha"])
    assert rows[f"vs2:{TINY}@alpha=2"]["vs2_auto"] == ""
    assert (here / f"auto-sweep/{STRINGS[0]}.png").is_file()


def test_every_choice_is_told_once_and_kept(here, capsys):
    forget(here)
    strings = (f"vs2:{TINY}@alpha=auto,1", f"vs2pp:{TINY}@alpha=auto@n=5,10@brake=0.5")
    assert sweep(*strings, output="auto-told/{model}.json") == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vs2: ")]
    assert len(told) == 3 and sum("vs2pp:" in line for line in told) == 2
    assert len(list(here.glob("store/checkpoints/*/*/gallery/auto/*.json"))) == 3
    before = {model: result(f"auto-told/{model}.json") for model in (f"vs2:{TINY}@alpha=auto",)}
    harness(*before, output="auto-told-harness.json")  # takes the kept choice
    assert result("auto-told-harness.json") == before[f"vs2:{TINY}@alpha=auto"]
    assert len(list(here.glob("store/checkpoints/*/*/gallery/auto/*.json"))) == 3


def test_quiet_is_quiet(here, capsys):
    forget(here)
    assert sweep(f"vs2:{TINY}@alpha=auto,1", output="auto-quiet/{model}.json", words=("--quiet",)) == 0
    assert capsys.readouterr() == ("", "")
    assert result(f"auto-quiet/vs2:{TINY}@alpha=auto.json")["metrics"]["vs2_auto"] == "alpha"


THROUGH = [f"vs2pp:{TINY}@alpha=auto@n=10@brake=0.6", f"vs2:{TINY}@alpha=auto@gate=0.9", f"vs2s:{TINY}"]


@pytest.fixture(scope="module")
def through(laboratory):
    """Those by the stock command."""
    with pytest.MonkeyPatch.context() as patch:
        at(laboratory, patch)
        (laboratory / "tower-harness").mkdir()
        harness(*THROUGH, output="tower-harness/{model}.json")


@pytest.mark.parametrize("keeps", [True, False], ids=["kept", "not kept"])
def test_points_that_are_sent_through_the_tower_keep_what_they_have_seen(through, here, monkeypatch, keeps):
    """Where features differ, points steer while the plain model is evaluated, before they are evaluated themselves."""
    folders = [path.parent for path in here.glob("store/checkpoints/*/vs2.json")]
    forget(here)
    if not keeps:
        for folder in folders:
            if (folder / "auto").is_dir():
                (folder / "auto").rmdir()
            (folder / "auto").write_text("in the way")
    try:
        monkeypatch.setattr(evaluate, "finish", lambda model, site, x: x.new_zeros(len(x), 64))
        assert sweep(*THROUGH, output=f"tower-sweep-{keeps}/{{model}}.json") == 0
    finally:
        for folder in folders if not keeps else ():
            (folder / "auto").unlink()
    for model in THROUGH:
        assert result(f"tower-sweep-{keeps}/{model}.json") == result(f"tower-harness/{model}.json")


class Pull(torch.nn.Module):
    """Towards the mean, by an amount; counts its images."""

    def __init__(self, mean, amount):
        super().__init__()
        self.register_buffer("mean", mean)
        self.amount, self.seen = amount, 0

    @property
    def facts(self):
        return {"seen": self.seen}

    def reset(self):
        self.seen = 0

    def forward(self, x):
        self.seen += len(x)
        return x - self.amount * self.mean


def test_a_method_of_a_plugin(here, monkeypatch):
    def build(context, amount):
        return (lambda x: x) if amount == 0 else Pull(context.mean, amount)

    method = Method("pull", build, [Option("amount", float, 1.0, auto=[0.0, 0.25, 0.5])])
    monkeypatch.setitem(registry().methods, "pull", method)
    monkeypatch.setitem(registry().owners, "pull", "a test")
    strings = [f"pull:{TINY}@amount=auto,0.25", f"vs2:{TINY}@alpha=auto"]
    models = [point.model for grid in read_grids(strings) for point in grid.points]
    (here / "pull-harness").mkdir()
    harness(*models, output="pull-harness/{model}.json")
    forget(here)
    assert sweep(*strings, output="pull-sweep/{model}.json") == 0
    for model in models:
        assert result(f"pull-sweep/{model}.json") == result(f"pull-harness/{model}.json")


REFUSED = [
    (f"vs2:{TINY}@alpha=auto@prior=absent.json", "prior='absent.json'"),
    (f"vs2:{TINY}@alpha=auto,1@prior=absent.json", "option prior is for auto"),
    (f"vs2:{TINY}@alpha=auto,automatic", "or auto"),
    (f"vs2:{TINY}@alpha=auto@gamma=1,2", "gamma"),
    (f"vs2pp:{TINY}@alpha=1,auto", "expected @brake= beside it"),
    (f"vs2s:{TINY}@p=1:9:1", "a number from 0 to 8, or auto"),
]


@pytest.mark.parametrize(("model", "message"), REFUSED, ids=[row[0] for row in REFUSED])
def test_mistakes_are_found_before_anything_is_loaded(here, monkeypatch, capsys, model, message):
    monkeypatch.setattr(evaluate, "load_backbone", lambda *args: pytest.fail("loaded"))
    assert sweep(model, output="auto-r/{model}.json") == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("vs2: error: ") and error.count("\n") == 1


def test_blocks_before_the_end_are_refused(here, capsys):
    assert sweep(f"vs2:{TINY}@alpha=auto@blocks=1+2,3", output="auto-b/{model}.json") == 2
    assert "is chosen by activations at the end of the tower" in capsys.readouterr().err
