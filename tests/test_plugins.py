import inspect
import os
import pickle
import re
from dataclasses import fields
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest

from vs2_plugin import hookspecs, plugins
from vs2_plugin.errors import ModelStringError, PluginError
from vs2_plugin.hookspecs import hookimpl
from vs2_plugin.method import Method
from vs2_plugin.plugins import Registry, find_plugins
from vs2_plugin.steering.context import Context

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
    ("one method, not a list", SimpleNamespace(vs2_methods=hookimpl(lambda: GOOD)),
     "vs2_methods() returned Method; expected a list of vs2_plugin.Method"),
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
    assert known.broken["dist-a 1.2 (entry point 'a')"].startswith("ImportError: No module named 'left_out' (in ")
    assert known.broken["dist-b 1.2 (entry point 'b')"].startswith("SystemExit: unsupported Python (in ")
    assert "no hook" in known.broken["dist-d 1.2 (entry point 'd')"]
    assert known.owners["good"] == "dist-c 1.2 (entry point 'c')"
    assert known.method("vs2").name == "vs2"


def test_a_plugin_cannot_take_a_built_in_name(install):
    install(("a", offering(Method("vs2", print))))
    with pytest.raises(PluginError) as error:
        find_plugins().method("vs2")
    theirs = "dist-a 1.2 (entry point 'a')"
    assert f"claimed by vs2-plugin (built in) and {theirs}; uninstall {theirs}, or leave it out" in str(error.value)


def test_a_real_entry_point_is_loaded(monkeypatch, tmp_path):
    (tmp_path / "a_real_plugin.py").write_text(
        "from vs2_plugin import Method, hookimpl\n@hookimpl\ndef vs2_methods(): return [Method('real', print)]"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [EntryPoint("mine", "a_real_plugin", group)])
    assert find_plugins().owners["real"] == "an unnamed distribution (entry point 'mine')"


PLUGIN = """
from dataclasses import dataclass
from vs2_plugin import Method, hookimpl

@dataclass
class Build:
    extra: float = 1.0
    def __call__(self, context):
        return self

@hookimpl
def vs2_methods():
    return [Method('{name}', Build())]
"""


@pytest.fixture
def name_files(tmp_path, monkeypatch):
    """A function that writes files and names them, and others, in the environment."""

    def write(*names, **files):
        for stem, text in files.items():
            (tmp_path / f"{stem}.py").write_text(text)
        paths = [*(str(tmp_path / f"{stem}.py") for stem in files), *names]
        monkeypatch.setenv("VS2_PLUGINS", os.pathsep.join(paths))
        return paths

    return write


def test_files_that_the_user_names_are_plugins_too(name_files, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    first, second = name_files(one=PLUGIN.format(name="one"), numpy=PLUGIN.format(name="two"))
    monkeypatch.setenv("VS2_PLUGINS", os.pathsep.join([first, "", "numpy.py", second, f"./{Path(first).name}"]))
    (tmp_path / "three.py").write_text(PLUGIN.format(name="three"))  # not named
    known = find_plugins()
    assert known.broken == {} and "three" not in known.methods
    assert {name: known.owners[name] for name in ("one", "two")} == {
        "one": f"{first} (VS2_PLUGINS)", "two": f"{second} (VS2_PLUGINS)"
    }  # fmt: skip
    assert pickle.loads(pickle.dumps(known.method("one").build)) == known.method("one").build
    assert type(known.method("two").build).__module__.startswith("vs2_file_numpy_")  # it takes nobody's place


@pytest.mark.parametrize(
    ("text", "problem", "line"),
    [
        ("import this_is_not_there\n", "ModuleNotFoundError: No module named 'this_is_not_there'", 1),
        ("x = 1\n\ndef f(:\n", "SyntaxError", 3),
        ("x = 1\nimport os\nos.stat('/no/such/file')\n", "FileNotFoundError", 3),
        ("def f():\n    return 1 / 0\nf()\n", "ZeroDivisionError: division by zero", 2),
        ("raise SystemExit(3)\n", "SystemExit: 3", 1),
        ("import json\njson.loads('')\n", "JSONDecodeError: Expecting value", 2),
        (PLUGIN.format(name="A B"), "method name 'A B'", 13),
        ("x = 1\n", "it implements no hook", None),
    ],
)
def test_a_file_that_cannot_be_used_is_named_once_with_its_line(name_files, text, problem, line):
    bad, good = name_files(bad=text, good=PLUGIN.format(name="fine"))
    known = find_plugins()
    told = known.broken[f"{bad} (VS2_PLUGINS)"]
    assert list(known.broken) == [f"{bad} (VS2_PLUGINS)"] and problem in told and "\n" not in told
    assert told.endswith(f" (in {bad}, line {line})") is (line is not None)
    assert known.owners["fine"] == f"{good} (VS2_PLUGINS)"


def test_what_is_no_file_of_python_is_told(name_files, tmp_path):
    (tmp_path / "text.txt").touch()
    name_files(str(tmp_path), str(tmp_path / "text.txt"), "/no/such/file.py")
    problems = find_plugins().broken
    told = {Path(label.removesuffix(" (VS2_PLUGINS)")).name: problem for label, problem in problems.items()}
    assert "is a folder; expected a file NAME.py in VS2_PLUGINS" in told[tmp_path.name]
    assert "is not called NAME.py" in told["text.txt"] and "/no/such/file.py does not exist" in told["file.py"]


def test_the_line_of_a_package_is_that_of_its_own_file(monkeypatch, tmp_path):
    (tmp_path / "a_broken_package").mkdir()
    (tmp_path / "a_broken_package/__init__.py").write_text("from . import method\n")
    (tmp_path / "a_broken_package/method.py").write_text("import json\n\njson.loads('')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [EntryPoint("mine", "a_broken_package", group)])
    [problem] = find_plugins().broken.values()
    assert problem.endswith(f" (in {tmp_path / 'a_broken_package/method.py'}, line 3)")


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
    from vs2_plugin.logits import builtin as on_logits
    from vs2_plugin.steering import builtin

    for method in (*builtin.vs2_methods(), *on_logits.vs2_methods()):
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


@pytest.mark.parametrize("name", [one.name for one in fields(Context)])
def test_every_field_of_the_context_stands_in_the_docs(name):
    table = re.search(r"\| `context\.` .*?\n\n", CHAPTER.read_text(encoding="utf-8"), re.S).group()
    assert f"`{name}`" in table


@pytest.mark.parametrize("name", ["images", "targets", "rows", "embedding", "code", "once"])
def test_what_a_batch_tells_stands_in_the_docs(name):
    from vs2_plugin.steering.batch import Batch

    assert hasattr(Batch(), name) and f"`batch.{name}" in CHAPTER.read_text(encoding="utf-8")
