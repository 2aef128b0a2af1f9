"""``vs2 reproduce``: its flags, what it says at the end, its exit code. Nothing is run."""

from types import SimpleNamespace

import pytest

from vs2_plugin.cli.main import main
from vs2_plugin.reproduce import run

TABLE = """\
title: A title
backbone: "local-dir:tiny-clip,"
dataset: wds/digits
columns: {A: {}}
rows: {plain: {model: "{backbone}"}, VS2: {model: "vs2:{backbone}"}}
published: {plain: [58]}
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with a table; a run does what ``act`` does, and every number is 50."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.yaml").write_text(TABLE)
    known = SimpleNamespace(act=lambda self: self.out.mkdir(exist_ok=True), out=tmp_path / "out")
    monkeypatch.setattr(run.Reproduction, "run", lambda self: known.act(self))
    monkeypatch.setattr(run.Reproduction, "_value", lambda self, cell, seed: 50.0)
    return known


def test_all_measured_is_success(work, capsys):
    assert main(["reproduce", "table.yaml", "--out", "out"]) == 0
    output, error = capsys.readouterr()
    assert error == "" and output.startswith("export VS2_PER_IMAGE=1\n")
    table = (work.out / "table.md").read_text()
    assert f"\n{table}" in output and " 58.00 |" in table and " -8.00 |" in table
    assert output.endswith("\nThe tables are in out, as .md and .json and on one page, index.html\n")


def test_quiet_prints_the_tables_alone(work, capsys):
    assert main(["reproduce", "table.yaml", "--out", "out", "--quiet"]) == 0
    assert capsys.readouterr().out == "\n" + (work.out / "table.md").read_text()


def test_what_is_not_run_is_not_called_kept(work, capsys):
    (work.out.parent / "table.yaml").write_text(TABLE.replace("rows: {", "rows: {theirs: {model: null}, "))

    def act(self):
        self.out.mkdir(exist_ok=True)
        self.problems |= {run: ("no luck",) for cell in self.cells for run in cell.evaluations(0)}

    work.act = act
    assert main(["reproduce", "table.yaml", "--out", "out"]) == 1
    assert "vs2: 2 of 2 cells could not be measured (the reasons are above); no number" in capsys.readouterr().err


@pytest.mark.parametrize(("missing", "words"), [(1, "the others are kept"), (2, "no number was found")])
def test_what_is_missing_is_counted(work, capsys, missing, words):
    def act(self):
        self.out.mkdir(exist_ok=True)
        runs = [run for cell in self.cells for run in cell.evaluations(0)]
        self.problems |= dict.fromkeys(list(dict.fromkeys(runs))[-missing:], ("no luck",))

    work.act = act
    assert main(["reproduce", "table.yaml", "--out", "out"]) == 1
    output, error = capsys.readouterr()
    assert f"vs2: {missing} of 2 cells could not be measured (the reasons are above); {words}" in error
    assert "no luck" in output


def test_an_interruption_says_what_is_kept(work, capsys):
    def act(self):
        raise KeyboardInterrupt

    work.act = act
    assert main(["reproduce", "table.yaml", "--out", "out"]) == 130
    output, error = capsys.readouterr()
    assert "interrupted; finished work is kept in out and in the store: run the same command to continue" in error
    assert "|" not in output


def test_a_dry_run_prints_commands_and_writes_nothing(work, capsys):
    work.act = lambda self: pytest.fail("run")
    assert main(["reproduce", "table.yaml", "--out", "out", "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["export", "#", "mkdir", "vs2-train-sae", "clip_benchmark"]
    assert lines[1].startswith("# missing: no folder root/digits of wds/digits; clip_benchmark does not fetch")
    assert not work.out.exists()


@pytest.mark.parametrize("words", [[], ["--stand_in", "digits"]])
def test_a_folder_that_cannot_be_made_is_named(words, work, capsys):
    (work.out.parent / "file").touch()
    assert main(["reproduce", "table.yaml", "--out", "file", *words]) == 2
    assert "vs2: error: --out 'file' cannot be made: File exists; name another folder\n" in capsys.readouterr().err


def test_a_root_that_cannot_be_filled_in_is_refused(work, capsys):
    assert main(["reproduce", "table.yaml", "--dataset_root", "{data}"]) == 2
    assert "--dataset_root '{data}': only {dataset} and {dataset_cleaned}" in capsys.readouterr().err


def test_a_list_and_a_dry_run_exclude_each_other(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["reproduce", "table.yaml", "--list", "--dry_run"])
    assert stop.value.code == 2 and "not allowed with argument" in capsys.readouterr().err
