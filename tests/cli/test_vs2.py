"""The vs2 command."""

import pytest

from vs2_plugin.checkpoint.store import Store
from vs2_plugin.cli.main import main
from vs2_plugin.method import Method, Option
from vs2_plugin.plugins import Registry, registry

from .test_train_sae import NAME, folder, train  # noqa: F401


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


def test_doctor_finds_a_damaged_checkpoint(folder, capsys):  # noqa: F811
    assert train() == 0
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "the hook is active" in text and f"{NAME}: 900 images" in text and "torch" in text
    file = next(Store.default().checkpoints.glob("*/*/sae.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])
    assert main(["doctor"]) == 1
    assert f"vs2 store remove {NAME}" in capsys.readouterr().out


def test_doctor_notices_the_switch(monkeypatch, capsys):
    monkeypatch.setenv("VS2_PLUGIN_DISABLE", "1")
    assert main(["doctor"]) == 1
    assert "unset VS2_PLUGIN_DISABLE" in capsys.readouterr().out


def test_store_list_and_remove(folder, capsys):  # noqa: F811
    assert main(["store", "list"]) == 0
    assert "no checkpoints" in capsys.readouterr().out
    assert train() == 0
    assert main(["store", "list"]) == 0
    text = capsys.readouterr().out
    assert NAME in text and "900 images" in text and "1 set(s)" in text
    assert main(["store", "remove", "nope"]) == 2
    assert "no SAE checkpoint 'nope'" in capsys.readouterr().err
    assert main(["store", "remove"]) == 2
    assert main(["store", "remove", NAME, "--cache"]) == 0
    assert Store.default().names() == [] and list(Store.default().cached()) == []
    assert main(["store", "remove", "../store"]) == 2


@pytest.mark.parametrize("words", [["--help"], ["demo", "--help"], ["store", "remove", "--help"], ["--version"]])
def test_help(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 0 and capsys.readouterr().out
