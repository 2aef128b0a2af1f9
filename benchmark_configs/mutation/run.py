"""Mutation testing of the mathematics: how many small changes of a module do its own tests notice?

    python benchmark_configs/mutation/run.py [MODULE …] [--sample N]

Every change (an operator, a comparison, a constant, a negated condition, a call left out) is made in a fork of this
process, which has imported all that the tests import but this package, and meets the tests in TESTS. Printed are the
changes that no test notices, and the share that one does. It runs from a clone, on Linux.
"""

import argparse
import ast
import copy
import importlib.machinery
import os
import random
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECORDER = ["the_figures_follow_from_the_logits", "equal_logits_stand_in_the_order_of_the_top_five"]
RECORDER += ["two_classes_are_enough_and_several_labels_of_an_image_are_passed_over"]
RECORDER += ["what_is_left_out_of_the_time_is_only_that"]
TESTS = {
    "sae/topk": "sae/test_topk",
    "sae/step": "sae/test_step",
    "steering/move": "steering/test_move steering/test_reference",
    "steering/selective": "steering/test_selective steering/test_reference",
    "steering/neighbours": "steering/test_neighbours steering/test_reference",
    "steering/gate": "steering/test_gate steering/test_reference",
    "steering/retriever": "steering/test_retriever",
    "strength/criterion": "strength/test_criterion",
    "strength/choice": "strength/test_choice",
    "results/statistics": "results/test_statistics",
    "harness/recorder": " ".join(f"harness/test_recorder.py::test_{name}" for name in RECORDER),
}
SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult}
SWAPS |= {ast.Pow: ast.Mult, ast.Mod: ast.FloorDiv, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}
SWAPS |= {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
SWAPS |= {ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And, ast.In: ast.NotIn, ast.NotIn: ast.In}


def mutations(node):
    """The changes of one node, each as the node that takes its place."""
    if isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in SWAPS:
        yield _with(node, op=SWAPS[type(node.op)]())
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in SWAPS:
        yield _with(node, ops=[SWAPS[type(node.ops[0])]()])
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        yield _with(node, value=not node.value if isinstance(node.value, bool) else _other(node.value))
    elif isinstance(node, (ast.If, ast.IfExp)):
        yield _with(node, test=ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield ast.Pass()
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and not _is_module(node.func.value):
        yield node.func.value  # x.clamp(0) becomes x


def _with(node, **changes):
    other = copy.copy(node)
    for name, value in changes.items():
        setattr(other, name, value)
    return other


def _other(number):
    return number + 1 if isinstance(number, int) or number == 0 else 1.5 * number


def _is_module(node):
    return isinstance(node, ast.Name) and node.id in ("torch", "np", "math", "F", "nn", "cls", "self", "time")


def skipped(tree):
    """Nodes that only people read: messages of errors, annotations, and what checks types."""
    for node in ast.walk(tree):
        unread = [node] if isinstance(node, (ast.Raise, ast.JoinedStr)) else []
        unread += [getattr(node, name, None) for name in ("annotation", "returns")]
        unread += getattr(node, "decorator_list", [])
        for part in filter(None, unread):
            yield from ast.walk(part)


def mutants(source):
    """All mutants of a module: (line, the line as it is, as it becomes, the module)."""
    tree = ast.parse(source)
    nodes, unread = list(ast.walk(tree)), {id(node) for node in skipped(tree)}
    for node in nodes:
        for name, value in ast.iter_fields(node):
            for place, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                for other in mutations(child) if isinstance(child, ast.AST) and id(child) not in unread else ():
                    ast.copy_location(other, child)
                    before = ast.unparse(child)
                    if place is None:
                        setattr(node, name, other)
                    else:
                        value[place] = other
                    yield child.lineno, before, ast.unparse(other), copy.deepcopy(tree)
                    if place is None:
                        setattr(node, name, child)
                    else:
                        value[place] = child


def tested(path, tree, tests, seconds, tell=None):
    """Whether the tests pass, in a fork, where the module at ``path`` is what ``tree`` says. None: it took too long."""
    child = os.fork()
    if child:
        started = time.monotonic()
        while not (status := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() - started > seconds:
                os.killpg(child, signal.SIGKILL)
                return os.waitpid(child, 0) and None
            time.sleep(0.02)
        return status[1] == 0
    os.setpgid(0, 0)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    known = importlib.machinery.SourceFileLoader.get_code
    importlib.machinery.SourceFileLoader.get_code = lambda loader, name: (
        compile(ast.fix_missing_locations(tree), path, "exec") if loader.path == str(path) else known(loader, name)
    )
    import pytest

    code = pytest.main(["-x", "-q", "-n", "0", "-p", "no:cacheprovider", *tests])
    if tell is not None:
        os.write(tell, "\n".join(name for name in sys.modules if name.split(".")[0] not in OWN).encode())
    os._exit(code)


OWN = {"vs2_plugin", "tests", "conftest", "__main__"}


def warm(path, tests):
    """Import what the tests import of other packages. Returns the seconds that the tests take then."""
    source, tell = os.pipe()
    tree = ast.parse(path.read_text())
    assert tested(path, tree, tests, 600, tell), f"the tests of {path} fail as it is"
    os.close(tell)
    with open(source) as names:
        for name in names.read().split():
            try:
                importlib.import_module(name)
            except Exception:
                continue
    started = time.monotonic()
    assert tested(path, tree, tests, 600), f"the tests of {path} fail in a warm process"
    return time.monotonic() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", nargs="*", choices=[*TESTS, []], metavar="MODULE")
    parser.add_argument("--sample", type=int, metavar="N", help="so many mutants of a module, at random")
    given = parser.parse_args()
    os.chdir(ROOT)
    for name in given.module or TESTS:
        path = ROOT / "vs2_plugin" / f"{name}.py"
        tests = [f"tests/{test}" if "::" in test else f"tests/{test}.py" for test in TESTS[name].split()]
        taken, found = warm(path, tests), list(mutants(path.read_text()))
        if given.sample and given.sample < len(found):
            found = sorted(random.Random(0).sample(found, given.sample), key=lambda mutant: mutant[0])
        survivors = []
        for line, before, after, tree in found:
            if tested(path, tree, tests, 10 + 5 * taken):
                survivors.append(line)
                print(f"{name}:{line}: {before}  ->  {after}", flush=True)
        print(f"## {name}: {len(found) - len(survivors)} of {len(found)} noticed ({taken:.1f} s)", flush=True)


if __name__ == "__main__":
    main()
