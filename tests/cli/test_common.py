"""What the commands share."""

import argparse
import signal
import sys
from dataclasses import dataclass

import pytest

from vs2_plugin.cli.common import Command, add_flags, end_well, load_torch
from vs2_plugin.errors import DataError, SettingError
from vs2_plugin.paths import listed
from vs2_plugin.settings import setting


def test_an_error_of_ours_is_one_line_and_anybody_elses_goes_on(capsys):
    def fail(error):
        raise error

    assert end_well("vs2 x", lambda: fail(DataError("no\n  luck"))) == 2
    assert capsys.readouterr() == ("", "vs2 x: error: no luck\n")
    assert end_well("vs2 x", lambda: fail(DataError("no \x1b[2J\u202eluck"))) == 2
    assert capsys.readouterr() == ("", "vs2 x: error: no \\x1b[2J\\u202eluck\n")
    with pytest.raises(KeyError):
        end_well("vs2 x", lambda: fail(KeyError("a")))
    assert [end_well("vs2 x", lambda code=code: code) for code in (None, 0, 3)] == [0, 0, 3]
    assert listed.get() is None and end_well("vs2 x", lambda: len(listed.get())) == 0  # folders are listed once


def test_a_closed_pipe_ends_a_command_as_any_other(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stderr", open(tmp_path / "stderr", "w"))

    def fail():
        raise BrokenPipeError

    assert end_well("vs2 x", fail) == 141
    assert sys.stderr.closed  # or Python would complain of the pipe when it ends


@pytest.mark.parametrize(
    ("words", "said"),
    [(["dog"], "dog"), (["--modle", "1", "a.png"], "--modle; did you mean --model?"), (["--xyz=1", "b"], "--xyz")],
)
def test_flags_are_to_blame_for_words_too_many(words, said):
    command = Command(prog="x")
    command.add_argument("--model")
    command.add_argument("--dataset")
    with pytest.raises(SettingError) as told:
        command.parse_args(words)
    assert str(told.value) == f"unrecognized arguments: {said}; see: x --help"


def test_an_interruption_while_torch_is_loaded_comes_afterwards(monkeypatch):
    import builtins

    original, imported = builtins.__import__, []

    def interrupting(name, *args, **kwargs):
        if name == "torch":
            signal.raise_signal(signal.SIGINT)
            imported.append(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", interrupting)
    with pytest.raises(KeyboardInterrupt):
        load_torch()
    assert imported == ["torch"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    # Where somebody else handles it, it is theirs.
    seen = []
    before = signal.signal(signal.SIGINT, lambda *which: seen.append(which[0]))
    try:
        load_torch()
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIGINT]


@dataclass
class Asked:
    what: str = setting(help="a thing")
    sizes: tuple[int, ...] = setting((1, 2), help="some sizes")
    rate: float = setting(0.5, help="a rate")
    loud: bool = setting(True, help="be silent")
    kind: str = setting("a", choices=("a", "b"), help="a kind")


@pytest.fixture
def parser():
    command = argparse.ArgumentParser(prog="x", argument_default=argparse.SUPPRESS)
    add_flags(command, Asked, {"rate": ("numbers", "all of them")})
    return command


def test_flags_are_the_settings(parser):
    assert vars(parser.parse_args(["--what", "w"])) == {"what": "w"}
    words = ["--what", "w", "--sizes", "3", "4", "--rate", "2", "--no_loud", "--kind", "b"]
    found = Asked(**vars(parser.parse_args(words)))
    assert (found.what, tuple(found.sizes), found.rate, found.loud, found.kind) == ("w", (3, 4), 2.0, False, "b")


@pytest.mark.parametrize("words", [[], ["--what", "w", "--kind", "c"], ["--what", "w", "--rate", "x"]])
def test_what_no_setting_takes_is_refused(parser, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(words)
    assert stop.value.code == 2 and "usage: x" in capsys.readouterr().err


def test_help_tells_defaults_and_groups(parser):
    text = " ".join(parser.format_help().split())
    for words in ("a thing --", "some sizes (default: 1 2)", "a rate (default: 0.5)", "a kind (default: a)"):
        assert words in text
    assert text.index("some sizes") < text.index("numbers: all of them") < text.index("a rate")
