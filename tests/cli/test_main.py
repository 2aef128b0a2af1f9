"""The vs2 command."""

from itertools import pairwise

import pytest

from vs2_plugin.cli.main import main
from vs2_plugin.method import Method, Option
from vs2_plugin.plugins import Registry, registry


def test_methods_lists_options_with_types_ranges_and_defaults(capsys):
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    assert "vs2:" in text and "built in" in text
    assert "@gamma=float" in text and "a number from -1000 to 1000 (default 1.5)" in text
    assert "@lam=float" in text and "(default 2.1)" in text


@pytest.fixture
def fresh_registry():
    """The registry is filled once per process: empty it before and after."""
    registry.cache_clear()
    yield
    registry.cache_clear()


def test_broken_and_clashing_plugins_are_named(capsys, monkeypatch, fresh_registry):
    from vs2_plugin.hookspecs import hookimpl
    from vs2_plugin.steering import builtin

    class Clash:
        @hookimpl
        def vs2_methods(self):
            return [Method("vs2", print), Method("fine", print, [Option("n", int, 1)])]

    class Broken:
        @hookimpl
        def vs2_methods(self):
            raise RuntimeError("no luck")

    known = Registry()
    for label, plugin in (("ours", builtin), ("theirs 1.0", Clash()), ("another 2.0", Broken())):
        known.add_plugin(label, plugin)
    monkeypatch.setattr("vs2_plugin.plugins.find_plugins", lambda: known)
    assert main(["methods"]) == 1
    captured = capsys.readouterr()
    assert "claimed by ours and theirs 1.0" in captured.err
    assert "another 2.0" in captured.err and "no luck" in captured.err
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "claimed by ours and theirs 1.0" in text and "no luck" in text


@pytest.mark.parametrize("words", [["--help"], ["demo", "--help"], ["store", "remove", "--help"], ["--version"]])
def test_help(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 0 and capsys.readouterr().out


def test_words_too_many_are_told_with_the_help_of_their_command(capsys):
    assert main(["classify", "photos", "--model", "vs2:ViT-B-32", "--classes", "cat", "dog"]) == 2
    assert capsys.readouterr().err == "vs2: error: unrecognized arguments: dog; see: vs2 classify --help\n"
    assert main(["report", "results", "--output", "page"]) == 2
    said = capsys.readouterr().err
    assert said == "vs2: error: unrecognized arguments: --output; did you mean --out?; see: vs2 report --help\n"
    assert main(["store", "list", "--all"]) == 2
    assert capsys.readouterr().err == "vs2: error: unrecognized arguments: --all; see: vs2 store list --help\n"


def test_methods_tell_which_labels_they_use(capsys):
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    used = {}
    for line, following in pairwise(lines):
        if "labels used: " in following:
            used[line.partition(":")[0]] = following.partition("labels used: ")[2].partition(";")[0]
    assert used["vs2"] == used["tda"] == "none" and used["proto"] == "oracle"
    assert used["pass"] == "those that its SAE was trained with"
    assert used["vs2pp"] == used["rag"] == "none, or oracle with @labels=oracle"
