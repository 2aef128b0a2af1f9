"""The package that ``vs2 new-plugin`` writes. (No pip here: tests/harness/test_autoload.py installs a package.)"""

import os
from importlib.metadata import EntryPoint

import pytest

from vs2_plugin import plugins
from vs2_plugin.cli.main import main
from vs2_plugin.errors import PluginError
from vs2_plugin.method import Method
from vs2_plugin.new_plugin import new_plugin
from vs2_plugin.plugins import Registry, registry

tomllib = pytest.importorskip("tomllib")  # since Python 3.11


def test_what_is_written_registers_and_passes_its_test(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["new-plugin", "my_own"]) == 0
    told = capsys.readouterr().out.splitlines()
    folder = tmp_path / "vs2-my-own"
    assert told[-1] == "next: cd vs2-my-own && pip install -e '.[test]' && pytest"
    assert told[:-1] == [f"wrote {path.relative_to(tmp_path)}" for path in (
        folder / name for name in ("pyproject.toml", "vs2_my_own.py", "test_vs2_my_own.py", "README.md")
    )]  # fmt: skip
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    points = project["project"]["entry-points"][plugins.GROUP]
    assert project["project"]["name"] == "vs2-my-own" and points == {"my_own": "vs2_my_own"}
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["include"] == ["vs2_my_own.py"]
    monkeypatch.syspath_prepend(folder)
    point = EntryPoint(*points.popitem(), plugins.GROUP)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point])
    known = plugins.find_plugins()
    assert known.broken == {} and [option.name for option in known.method("my_own").options] == ["strength"]
    monkeypatch.setitem(registry().methods, "my_own", known.method("my_own"))
    names = {}
    exec((folder / "test_vs2_my_own.py").read_text(), names)
    names["test_my_own"]()
    monkeypatch.setattr(plugins, "entry_points", lambda group: [])
    monkeypatch.setenv("VS2_PLUGINS", os.fspath(folder / "vs2_my_own.py"))
    assert plugins.find_plugins().method("my_own").summary == known.method("my_own").summary


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("Mine", "'Mine': expected lower-case letters"),
        ("my-own", "'my-own': expected lower-case letters"),
        ("../x", "expected lower-case letters"),
        ("hf-hub", "expected lower-case letters"),
        ("vs2", "method name 'vs2' is taken by vs2-plugin (built in); expected another"),
    ],
)
def test_a_name_that_cannot_be_used_is_refused_and_nothing_written(name, problem, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["new-plugin", name]) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert problem in error and not list(tmp_path.iterdir())


def test_an_alias_is_taken_too(tmp_path):
    known = Registry(methods={"one": Method("one", print)}, owners={"one": "somebody"}, aliases={"two": "one"})
    with pytest.raises(PluginError, match="'two' is taken by somebody"):
        new_plugin("two", tmp_path, known)


def test_a_folder_that_holds_something_is_left_alone(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").touch()
    (tmp_path / "empty").mkdir()
    assert main(["new-plugin", "mine", str(tmp_path / "full")]) == 2
    assert "full' is not empty; expected a new or an empty folder: vs2 new-plugin mine" in capsys.readouterr().err
    assert main(["new-plugin", "mine", str(tmp_path / "full/mine.txt")]) == 2
    assert "mine.txt' is a file" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    assert main(["new-plugin", "mine", str(tmp_path / "empty")]) == 0
    assert main(["new-plugin", "mine", str(tmp_path / "a/new/one")]) == 0
