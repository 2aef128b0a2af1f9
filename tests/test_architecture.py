"""The dependencies between modules form a tree: mathematics below, commands on top."""

import ast
import inspect
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import vs2_plugin

ROOT = Path(vs2_plugin.__file__).parent
PARTS = {path.name for path in ROOT.iterdir() if (path / "__init__.py").is_file()}

#: Part -> the parts that nothing in it imports, within functions or for type checking either.
FORBIDDEN = {
    "sae": PARTS - {"sae"},
    "gallery": PARTS - {"gallery"},
    "steering": PARTS - {"steering", "gallery", "sae"},
    "strength": PARTS - {"strength"},
    "logits": PARTS - {"logits", "steering"},
    "clip": PARTS - {"clip", "sae"},
    "data": PARTS - {"data"},
    "checkpoint": PARTS - {"checkpoint", "clip", "gallery", "sae"},
    "results": PARTS - {"results"},  # reads and writes files; needs no model
    "report": PARTS - {"report", "results"},
    "training": PARTS - {"training", "checkpoint", "clip", "data", "gallery", "sae"},
    "model": PARTS - {"model", "checkpoint", "clip", "data", "gallery", "sae", "steering", "strength"},
    "harness": {"classify", "cli", "demo", "inspection", "quality", "report", "reproduce", "sweep", "training"},
    "inspection": {"classify", "cli", "demo", "quality", "reproduce", "sweep", "training"},
    "quality": {"classify", "cli", "demo", "reproduce", "sweep", "training"},
    "testing": {"classify", "cli", "inspection", "quality", "report", "reproduce", "stress", "sweep"},
    "sweep": {"classify", "cli", "demo", "inspection", "quality", "report", "reproduce", "training"},
    "stress": {"classify", "cli", "demo", "inspection", "quality", "report", "reproduce", "training"},
    # The modules at the top.
    "": {"classify", "cli", "demo", "inspection", "quality", "report", "reproduce", "stress", "sweep", "testing"},
    "reproduce": {"classify", "cli", "inspection", "quality", "sweep"},
    "classify": {"cli", "demo", "quality", "reproduce", "sweep"},
    "cli": set(),  # commands and the demo import everything, and nothing imports them
    "demo": set(),
}


@cache
def nodes_of(path):
    """The syntax tree of a file and all that is in it."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def imported_by(path):
    """The modules of this package that a file imports, wherever the statement stands."""
    found = set()
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            # A name is a module of a folder, or else something in a module.
            found |= {name if name in FILES else node.module for name in names}
    return {name for name in found if name.split(".")[0] == "vs2_plugin"}


MODULES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))
#: Dotted name -> path within the package.
FILES = {f"vs2_plugin.{path[:-3].replace('/', '.')}".removesuffix(".__init__"): path for path in MODULES}


def test_every_part_has_a_rule():
    assert {*FORBIDDEN} - {""} == PARTS
    assert len(MODULES) > 30


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_lies_below_it(module):
    part = module.partition("/")[0] if "/" in module else ""
    imported = {name.split(".")[1] for name in imported_by(ROOT / module) if "." in name}
    assert imported & FORBIDDEN[part] == set()


def test_no_module_imports_itself_by_way_of_others():
    """Imports within functions count too, and those for type checking."""
    below = {name: imported_by(ROOT / path) for name, path in FILES.items()}
    ordered, remaining = set(), set(FILES)
    while ready := {name for name in remaining if below[name] - {name} <= ordered}:
        ordered |= ready
        remaining -= ready
    # What is left is in a circle, or above one.
    while above := {name for name in remaining if not any(name in below[other] for other in remaining - {name})}:
        remaining -= above
    assert remaining == set()


#: Where flags are read, and where clip_benchmark hands its own over.
KNOW_ARGPARSE = {f"harness/{name}.py" for name in ("loader", "patches", "preflight")}


@pytest.mark.parametrize("module", MODULES)
def test_only_commands_know_argparse(module):
    nodes = nodes_of(ROOT / module)
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert "argparse" not in imported or module.startswith("cli/") or module in KNOW_ARGPARSE


@pytest.mark.parametrize("module", MODULES)
def test_functions_have_at_most_60_lines(module):
    functions = (node for node in nodes_of(ROOT / module) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
    assert [node.name for node in functions if node.end_lineno - node.lineno + 1 > 60] == []


TESTS = Path(__file__).parent
#: Tests of more than one module: the whole, commands as a person types them, pages in a browser, references.
WHOLE = {
    "": {"architecture", "docs", "faults", "strength_study", "studies"},
    "checkpoint": {"mutations"},
    "cli": {"gallery", "interruptions"},
    "demo": {"notebook"},
    "gallery": {"own_images"},
    "gpu": {"commands", "demo", "processes", "python", "quality", "search", "steering", "training"},
    "harness": {"demo", "folders", "gallery", "library", "towers"},
    "inspection": {"browser", "init"},
    "performance": {"suite"},
    "report": {"browser"},
    "reproduce": {"paper"},
    "steering": {"reference"},
    "strength": {"declarations"},
    "sweep": {"automatic_sweep", "said"},
    "training": {"resume"},
}


def complexity(function):
    """Its cyclomatic complexity, with that of functions in it."""
    one = (ast.If, ast.IfExp, ast.For, ast.While, ast.ExceptHandler, ast.Assert)
    nodes = list(ast.walk(function))
    several = sum(len(node.values) - 1 for node in nodes if isinstance(node, ast.BoolOp))
    several += sum(1 + len(node.ifs) for node in nodes if isinstance(node, ast.comprehension))
    return 1 + several + sum(isinstance(node, one) for node in nodes)


@pytest.mark.parametrize("module", MODULES)
def test_no_function_is_too_complex(module):
    functions = [node for node in nodes_of(ROOT / module) if isinstance(node, ast.FunctionDef)]
    assert {function.name: complexity(function) for function in functions if complexity(function) > 15} == {}


def test_tests_lie_where_their_modules_lie():
    whole = {f"{room}/test_{name}.py".lstrip("/") for room, names in WHOLE.items() for name in names}
    tests = {path.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py")}
    assert {test for test in tests - whole if test.replace("test_", "", 1) not in MODULES} == set()


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "py.typed").is_file()


def new_modules(statement, *options):
    """The modules that a statement adds to those of a fresh interpreter."""
    code = f"import os, sys; before = set(sys.modules); {statement}; print(*sorted(set(sys.modules) - before))"
    command = [sys.executable, *options, "-c", code]
    environment = {"PYTHONPATH": str(ROOT.parent), "PATH": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_what_runs_at_every_interpreter_start_imports_nothing_else():
    """With -S no other package's start-up code runs, so that these modules are all that the statement loads."""
    statement = "import vs2_plugin, vs2_plugin.harness.autoload as hook; hook.install(); hook.is_active()"
    assert new_modules(statement, "-S") == {"vs2_plugin", "vs2_plugin.harness", "vs2_plugin.harness.autoload"}


def test_the_package_itself_is_light():
    assert new_modules("import vs2_plugin; dir(vs2_plugin); vs2_plugin.__version__", "-S") == {"vs2_plugin"}


LIGHT = ["cli.main", "checkpoint.store", "data.splits", "errors", "hookspecs", "method", "modelstring", "names"]
LIGHT += ["plugins", "settings", "steering.builtin", "text"]


@pytest.mark.parametrize("name", LIGHT)
def test_what_is_read_before_anything_is_loaded_imports_no_torch(name):
    loaded = new_modules(f"import vs2_plugin.{name}")
    assert f"vs2_plugin.{name}" in loaded
    assert loaded & {"torch", "numpy", "open_clip", "clip_benchmark", "safetensors", "PIL"} == set()


def test_reading_a_model_string_imports_no_torch():
    loaded = new_modules(
        "from vs2_plugin.plugins import Registry; from vs2_plugin.steering import builtin; "
        "from vs2_plugin.modelstring import parse; "
        "known = Registry(); known.add_plugin('built in', builtin); parse('vs2:ViT-B-32@gamma=2', known)"
    )
    assert "vs2_plugin.modelstring" in loaded
    assert "torch" not in loaded


def test_every_public_name_resolves_and_is_documented():
    assert sorted(vs2_plugin.__all__) == dir(vs2_plugin)
    assert len(vs2_plugin.__all__) > 10
    for name in vs2_plugin.__all__:
        value = getattr(vs2_plugin, name)
        if name not in ("__version__", "hookimpl"):  # a string, and pluggy's marker
            assert inspect.getdoc(value), name
            assert value.__module__ == vs2_plugin._HOME[name], name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'vs2_plugin' has no attribute 'nope'"):
        vs2_plugin.nope  # noqa: B018


def defined_in(tree):
    """The top-level names of a module, with the node that defines or imports each."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name, node
        elif isinstance(node, ast.ImportFrom):
            yield from ((alias.asname or alias.name, node) for alias in node.names)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node
        elif isinstance(node, ast.Assign):
            names = (name for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name))
            yield from ((name.id, node) for name in names)


@pytest.mark.parametrize("module", [name for name in MODULES if name != "__init__.py"])
def test_what_a_module_lists_is_there_and_documented(module):
    defined = dict(defined_in(nodes_of(ROOT / module)[0]))
    listed = ast.literal_eval(defined["__all__"].value) if "__all__" in defined else []
    assert set(listed) <= defined.keys()
    for name in listed:
        if isinstance(defined[name], (ast.FunctionDef, ast.ClassDef)):
            assert ast.get_docstring(defined[name]), name


def test_what_is_printed_is_ascii():
    """A terminal that knows no UTF-8 would turn a help text or an error into a traceback."""
    for path in sorted(ROOT.rglob("*.py")):
        docstrings = {id(node.value) for node in nodes_of(path) if isinstance(node, ast.Expr)}
        for node in nodes_of(path):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                assert node.value.isascii(), f"{path}:{node.lineno}: {node.value!r}"
