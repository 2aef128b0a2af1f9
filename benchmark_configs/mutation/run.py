"""Mutation testing of mathematics and tables: how many small changes of a module do its own tests notice?

    python benchmark_configs/mutation/run.py [MODULE …] [--sample N]

Every change (an operator, a comparison, a constant, a negated condition, a call left out) is made in a fork of this
process, which has imported all that the tests import but this package, and meets the tests in TESTS. Printed are the
changes that no test notices, and the share that one does. It runs from a clone, on Linux.
"""

import argparse
import ast
import importlib.machinery
import os
import random
import shlex
import signal
import sys
import tempfile
import time
from contextlib import suppress
from itertools import count
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the package is this clone's, wherever one is installed
TESTS = {
    "selection": "test_selection.py",
    "arrays": "test_arrays.py",
    "sae/topk": "sae/test_topk.py",
    "sae/step": "sae/test_step.py",
    **{f"sae/{name}": f"sae/test_{name}.py" for name in ("adopt", "foreign")},
    **{f"steering/{x}": f"steering/test_{x}.py steering/test_reference.py" for x in ("move", "gate", "neighbours")},
    **{f"steering/{name}": f"steering/test_{name}.py" for name in ("batch", "selective", "retriever", "tally")},
    "gallery/search": "gallery/test_search.py",
    **{f"strength/{name}": f"strength/test_{name}.py" for name in ("criterion", "choice")},
    **{f"logits/{name}": f"logits/test_{name}.py" for name in ("dn", "inmap", "stata", "tda", "zero", "zlap")},
    **{f"quality/{x}": f"quality/test_{x}.py" for x in ("codes", "dictionary", "meaning", "measure", "recovered")},
    **{f"stress/{x}": f"stress/test_{x}.py" for x in ("subsets", "run")},
    "reproduce/table": "reproduce/test_table.py reproduce/test_page.py",
    "reproduce/cells": "reproduce/test_cells.py reproduce/test_reading.py reproduce/test_table.py",
    **{f"data/{x}": f"data/test_{x}.py" for x in ("shards", "splits")},
    "settings": "test_settings.py",
    "steering/builtin": "steering/test_reference.py steering/test_by_hand.py model/test_attribution.py",
    "classify/table": "classify/test_table.py",
    "training/plan": "training/test_plan.py",
    **{f"inspection/{x}": f"inspection/test_{x}.py" for x in ("latents", "survey")},
    **{f"model/{x}": f"model/test_{x}.py" for x in ("attribution", "candidates", "predictions", "words")},
    "model/explanation": "model/test_explanation.py inspection/test_findings.py",
    "inspection/findings": "inspection/test_findings.py",
    "results/statistics": "results/test_statistics.py",
    "results/runs": "results/test_runs.py report/test_summary.py",
    **{f"report/{name}": f"report/test_{name}.py report/test_summary.py" for name in ("rows", "summary", "verdict")},
    **{f"sweep/{name}": f"sweep/test_{name}.py" for name in ("grid", "figures")},
    "harness/recorder": "harness/test_recorder.py -k 'logits or left_out or of_the_system'",
}
SWAPS = {ast.Add: ast.Sub, ast.Mult: ast.Div, ast.Lt: ast.LtE, ast.Gt: ast.GtE, ast.Eq: ast.NotEq, ast.Is: ast.IsNot}
SWAPS |= {ast.And: ast.Or, ast.In: ast.NotIn}
SWAPS |= {other: one for one, other in SWAPS.items()} | {ast.FloorDiv: ast.Mult, ast.Pow: ast.Mult}
SWAPS |= {ast.Mod: ast.Add, ast.BitAnd: ast.BitOr}
MODULES = ("torch", "np", "math", "F", "nn", "cls", "self", "time")


def changes(node):
    """What may take the place of a node."""
    if isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in SWAPS:
        yield _with(node, op=SWAPS[type(node.op)]())
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        yield _with(node, ops=[SWAPS[type(node.ops[0])](), *node.ops[1:]])
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        other = 1.5 * node.value if isinstance(node.value, float) and node.value else node.value + 1
        yield _with(node, value=not node.value if isinstance(node.value, bool) else other)
    elif isinstance(node, (ast.If, ast.IfExp)):
        yield _with(node, test=ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield ast.Pass()
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if not (isinstance(node.func.value, ast.Name) and node.func.value.id in MODULES):
            yield node.func.value  # x.clamp(0) becomes x


def _with(node, **fields):
    return type(node)(**{**dict(ast.iter_fields(node)), **fields})


class Change(ast.NodeTransformer):
    """Makes the change of that number, and tells which it was: (line, the piece as it was, as it is)."""

    def __init__(self, number):
        self.left, self.told = number, None

    def visit(self, node):
        unread = isinstance(node, (ast.Raise, ast.JoinedStr)) or ast.unparse(node).startswith("dataclass(")
        for other in () if unread else changes(node):
            self.left -= 1
            if self.left == -1:
                self.told = node.lineno, ast.unparse(node), ast.unparse(other)
                return ast.copy_location(other, node)
        return node if unread else self.generic_visit(node)


def mutants(source):
    """All mutants of a module: (line, the piece as it was, as it is, the module)."""
    for number in count():
        change = Change(number)
        tree = ast.fix_missing_locations(change.visit(ast.parse(source)))
        if change.told is None:
            return
        yield *change.told, tree


def passes(path, tree, tests, seconds, tell=None):
    """Whether the tests pass, in a fork, where the module at ``path`` is what ``tree`` says."""
    child = os.fork()
    if child:
        ends = time.monotonic() + seconds
        while not (status := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > ends:
                os.killpg(child, signal.SIGKILL)
            time.sleep(0.02)
        return status[1] == 0
    os.setpgid(0, 0)
    for stream in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDWR), stream)
    loader = importlib.machinery.SourceFileLoader
    compiled, code_of = compile(tree, path, "exec"), loader.get_code
    loader.get_code = lambda self, name: compiled if self.path == str(path) else code_of(self, name)
    import pytest

    code = pytest.main(["-x", "-q", "-n", "0", "-p", "no:cacheprovider", *tests])
    if tell is not None:
        own = ("vs2_plugin", "tests", "__main__", "clip_benchmark")  # the last one, when imported, imports the first
        foreign = (name for name in sys.modules if name.split(".")[0] not in own)
        tell.write_text("\n".join(foreign))
    os._exit(code)


def warm(path, tests):
    """Import what the tests import of other packages. Returns the seconds that the tests take then."""
    tree = ast.parse(path.read_text())
    with tempfile.TemporaryDirectory() as folder:
        tell = Path(folder, "imported")
        assert passes(path, tree, tests, 600, tell), f"the tests of {path} fail as it is"
        for name in tell.read_text().split():
            with suppress(Exception):
                importlib.import_module(name)
    assert "vs2_plugin" not in sys.modules, "what is imported already cannot be changed"
    started = time.monotonic()
    assert passes(path, tree, tests, 600), f"the tests of {path} fail in a warm process"
    return time.monotonic() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", nargs="*", choices=[*TESTS, []], metavar="MODULE")
    parser.add_argument("--sample", type=int, metavar="N", help="so many mutants of a module, at random")
    given = parser.parse_args()
    os.chdir(ROOT)
    for name in given.module or TESTS:
        path, words = ROOT / "vs2_plugin" / f"{name}.py", shlex.split(TESTS[name])
        tests = [f"tests/{word}" if word.endswith(".py") else word for word in words]
        taken, found = warm(path, tests), list(mutants(path.read_text()))
        found = random.Random(0).sample(found, min(given.sample or len(found), len(found)))
        left = 0
        for line, before, after, tree in sorted(found, key=lambda mutant: mutant[0]):
            if passes(path, tree, tests, 10 + 5 * taken):
                left += 1
                print(f"{name}:{line}: {before}  ->  {after}", flush=True)
        print(f"## {name}: {len(found) - left} of {len(found)} noticed ({taken:.1f} s)", flush=True)


if __name__ == "__main__":
    main()
