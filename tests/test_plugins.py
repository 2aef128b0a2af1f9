import inspect
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest

from vs2_plugin import hookspecs, plugins
from vs2_plugin.errors import ModelStringError, PluginError
from vs2_plugin.hookspecs import hookimpl
from vs2_plugin.method import Method
from vs2_plugin.plugins import Registry, find_plugins

GOOD = Method("good", print, aliases=("good++",))


def offering(*methods):
    """A plugin that offers these methods."""
    return SimpleNamespace(vs2_methods=hookimpl(lambda: list(methods)))


def raising(error):
    def vs2_methods():
        raise error

    return SimpleNamespace(vs2_methods=hookimpl(vs2_methods))


def with_argument():
    @hookimpl
    def vs2_methods(context):
        return []

    return SimpleNamespace(vs2_methods=vs2_methods)


def half_way():
    @hookimpl
    def vs2_methods():
        yield Method("first", print)
        raise OSError("disk gone")

    return SimpleNamespace(vs2_methods=vs2_methods)


BROKEN = [
    ("raising hook", raising(RuntimeError("boom")), "RuntimeError: boom"),
    ("raising a generator's way", half_way(), "OSError: disk gone"),
    ("SystemExit", raising(SystemExit(3)), "SystemExit: 3"),
    ("one method, not a list", SimpleNamespace(vs2_methods=hookimpl(lambda: GOOD)), "TypeError"),
    (
        "names, not methods",
        SimpleNamespace(vs2_methods=hookimpl(lambda: ["vs3"])),
        "gave 'vs3'; expected vs2_plugin.Method",
    ),
    ("misspelled hook", SimpleNamespace(vs2_method=hookimpl(lambda: [GOOD])), "unknown hook 'vs2_method'"),
    ("hook with another argument", with_argument(), "context"),
    ("no hook", SimpleNamespace(), "it implements no hook; expected a function vs2_methods marked with @hookimpl"),
    ("hook without its marker", SimpleNamespace(vs2_methods=lambda: [GOOD]), "it implements no hook"),
    ("wrong declaration", SimpleNamespace(vs2_methods=hookimpl(lambda: [Method("A B", print)])), "method name 'A B'"),
]


@pytest.mark.parametrize(("plugin", "problem"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN])
def test_a_broken_plugin_is_listed_and_the_others_go_on(plugin, problem):
    known = Registry()
    known.add_plugin("bad", plugin)
    known.add_plugin("fine", offering(GOOD))
    assert problem in known.broken["bad"]
    assert known.plugins == ["bad", "fine"]
    assert known.names == ["good", "good++"]
    with pytest.raises(ModelStringError, match=r"unknown method 'nope'.*failed to load: bad \(see vs2 doctor\)"):
        known.method("nope")


def test_a_hook_that_returns_nothing_is_broken():
    known = Registry()
    known.add_plugin("bad", SimpleNamespace(vs2_methods=hookimpl(lambda: None)))
    assert "bad" in known.broken


def test_ctrl_c_in_a_plugin_is_not_swallowed():
    with pytest.raises(KeyboardInterrupt):
        Registry().add_plugin("bad", raising(KeyboardInterrupt()))


def test_methods_are_found_by_name_and_alias():
    known = Registry()
    known.add_plugin("fine", offering(GOOD, Method("other", print)))
    assert known.method("good") is known.method("good++") is GOOD
    assert known.owners == {"good": "fine", "other": "fine"}


CLASHES = [
    ("same name", [Method("a", print)], [Method("a", repr)], "a"),
    ("alias is the other's name", [Method("a", print)], [Method("b", print, aliases=("a",))], "a"),
    ("name is the other's alias", [Method("b", print, aliases=("a",))], [Method("a", print)], "a"),
    ("same alias", [Method("b", print, aliases=("x",))], [Method("c", print, aliases=("x",))], "x"),
]


@pytest.mark.parametrize(("first", "second", "name"), [row[1:] for row in CLASHES], ids=[row[0] for row in CLASHES])
def test_a_name_that_two_plugins_claim_is_an_error_that_names_both_and_others_go_on(first, second, name):
    known = Registry()
    known.add_plugin("one 1.0", offering(*first))
    known.add_plugin("two 2.0", offering(*second, GOOD))
    with pytest.raises(PluginError, match=f"method '{name}' is claimed by one 1.0 and two 2.0; uninstall one of them"):
        known.method(name)
    assert known.method("good") is GOOD
    assert known.broken == {}


def test_an_alias_that_is_claimed_twice_does_not_take_its_method_away():
    known = Registry()
    known.add_plugin("one", offering(Method("a", print, aliases=("x",))))
    known.add_plugin("two", offering(Method("b", print, aliases=("a", "x", "y"))))
    assert known.method("b") is known.method("y") and known.owners == {"a": "one", "b": "two"}
    assert known.conflicts == {"a": ["one", "two"], "x": ["one", "two"]}
    for name in ("a", "x"):
        with pytest.raises(PluginError, match=f"method '{name}' is claimed by one and two"):
            known.method(name)


@pytest.mark.parametrize(
    "methods",
    [
        [Method("a", print), Method("a", repr)],
        [Method("b", print, aliases=("a",)), Method("a", print)],
        [Method("b", print, aliases=("a",)), Method("c", print, aliases=("a",))],
    ],
)
def test_a_plugin_that_claims_a_name_twice_is_broken(methods):
    known = Registry()
    known.add_plugin("one", offering(*methods))
    assert "two of its methods are called 'a'" in known.broken["one"]
    assert known.conflicts == {} and known.names == []


def test_an_alias_may_be_the_methods_own_name():
    known = Registry()
    known.add_plugin("one", offering(Method("a", print, aliases=("a", "b"))))
    assert known.broken == {} and known.method("b").name == "a"


def test_a_third_claimant_is_named_too():
    known = Registry()
    for label in ("one", "two", "three"):
        known.add_plugin(label, offering(Method("a", print)))
    assert known.conflicts == {"a": ["one", "two", "three"]}


@pytest.fixture
def install(monkeypatch):
    """Pretend that distributions with these entry points are installed: ``[(entry point, its object or error)]``."""

    def pretend(*points):
        made = []
        for name, target in points:
            point = SimpleNamespace(name=name, dist=SimpleNamespace(name=f"dist-{name}", version="1.2"), load=None)
            point.load = lambda target=target: target() if isinstance(target, type) else target
            made.append(point)
        monkeypatch.setattr(plugins, "entry_points", lambda group: made if group == "vs2_plugin" else [])

    return pretend


class FailsToImport:
    def __init__(self):
        raise ImportError("No module named 'left_out'")


class ExitsOnImport:
    def __init__(self):
        raise SystemExit("unsupported Python")


def test_installed_plugins_are_found_and_the_broken_ones_named(install):
    install(("a", FailsToImport), ("b", ExitsOnImport), ("c", offering(GOOD)), ("d", SimpleNamespace()))
    known = find_plugins()
    assert known.broken["dist-a 1.2 (entry point 'a')"] == "ImportError: No module named 'left_out'"
    assert known.broken["dist-b 1.2 (entry point 'b')"] == "SystemExit: unsupported Python"
    assert "no hook" in known.broken["dist-d 1.2 (entry point 'd')"]
    assert known.owners["good"] == "dist-c 1.2 (entry point 'c')"
    assert known.method("vs2").name == "vs2"


def test_a_plugin_cannot_take_a_built_in_name(install):
    install(("a", offering(Method("vs2", print))))
    with pytest.raises(PluginError, match=r"claimed by vs2-plugin \(built in\) and dist-a 1.2 \(entry point 'a'\)"):
        find_plugins().method("vs2")


def test_a_real_entry_point_is_loaded(monkeypatch, tmp_path):
    (tmp_path / "a_real_plugin.py").write_text(
        "from vs2_plugin import Method, hookimpl\n@hookimpl\ndef vs2_methods(): return [Method('real', print)]"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [EntryPoint("mine", "a_real_plugin", group)])
    assert find_plugins().owners["real"] == "an unnamed distribution (entry point 'mine')"


def test_one_object_under_two_entry_points_is_named_and_its_methods_go_on(monkeypatch):
    point = EntryPoint("mine", "vs2_plugin.steering.builtin", "vs2_plugin")
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point])
    known = find_plugins()
    assert "same object as vs2-plugin (built in)" in known.broken["an unnamed distribution (entry point 'mine')"]
    assert known.method("vs2").name == "vs2"
    assert known.conflicts == {}


def test_broken_plugins_leave_nothing_behind():
    """All plugins share a manager: what a broken one had there must not make the next ones fail."""
    known = Registry()
    for label, plugin, _ in BROKEN:
        known.add_plugin(label, plugin)
    known.add_plugin("fine", offering(GOOD))
    assert list(known.broken) == [label for label, *_ in BROKEN]
    assert known.owners == {"good": "fine"}


def test_the_built_in_methods_come_by_the_hook(install):
    from vs2_plugin.logits import builtin as on_logits
    from vs2_plugin.steering import builtin

    install()
    known = find_plugins()
    by_hook = Registry()
    by_hook.add_plugin("vs2-plugin (built in)", builtin)
    by_hook.add_plugin("vs2-plugin (built in, on logits)", on_logits)
    assert known == by_hook
    assert "vs2" in known.methods
    assert known.broken == {}


def test_every_built_in_method_and_option_says_what_it_is():
    from vs2_plugin.steering import builtin

    for method in builtin.vs2_methods():
        assert method.summary, method.name
        assert all(option.help for option in method.options), method.name


CHAPTER = Path(__file__).parents[1] / "vs2_plugin/docs/plugins.md"
HOOKS = [name for name, thing in vars(hookspecs).items() if hasattr(thing, "vs2_plugin_spec")]


def test_hooks_are_found_by_their_marker():
    assert "vs2_methods" in HOOKS


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_has_a_docstring_and_a_place_in_the_docs(name):
    assert inspect.getdoc(getattr(hookspecs, name))
    assert name in CHAPTER.read_text(encoding="utf-8")
