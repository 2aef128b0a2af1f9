"""Running a command: why it failed, and what surrounds it."""

import os
from pathlib import Path

from vs2_plugin.reproduce.command import _reason, run_command, surroundings


def test_reasons_are_cut_between_words():
    words = " ".join(["connection"] * 100)
    assert set(_reason(words, 1).partition(": ")[2].split()) == {"connection", "..."}
    assert _reason("some\nvs2: error: no luck\n", 2) == "no luck"
    assert _reason(" \n", 3) == "clip_benchmark ended with exit code 3: it printed nothing"


def test_a_command_that_is_not_there(tmp_path):
    problem = run_command(["no-such-command"], tmp_path / "log", quiet=True, look=lambda: None)
    assert "the command no-such-command is not installed" in problem


def test_surroundings_are_left_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setenv("ONE", "1")
    before = Path.cwd()
    with surroundings(tmp_path, {"ONE": "2", "TWO": "2"}):
        assert (Path.cwd(), os.environ["ONE"], os.environ["TWO"]) == (tmp_path, "2", "2")
    assert (Path.cwd(), os.environ["ONE"], os.environ.get("TWO")) == (before, "1", None)
