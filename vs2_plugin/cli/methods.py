"""``vs2 methods``: lists every method with its options, or checks one method."""

from __future__ import annotations

import argparse

from vs2_plugin.cli.common import Commands, load_torch
from vs2_plugin.messages import complain, say
from vs2_plugin.method import AUTOMATIC, COMMON, LABELS, NEIGHBOURS, STREAM, UNLABELED, VIEWS, Method, Option
from vs2_plugin.plugins import registry

__all__ = ["add_methods"]


def add_methods(commands: Commands) -> None:
    """Add ``vs2 methods``."""
    command = commands.add_parser(
        "methods", help="list every method with its options, or (--check) test a method of your own",
        epilog="examples: vs2 methods | less; vs2 methods --check centre",
    )  # fmt: skip
    command.add_argument(
        "--check", metavar="METHOD",
        help="check that method instead, as its author should: centre, or with options centre@alpha=1",
    )  # fmt: skip
    command.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    return _list_methods() if args.check is None else _check(args.check)


def _check(method: str) -> int:
    load_torch()
    from vs2_plugin.testing import findings

    checks = findings(method)
    for name, about, problem, skipped in checks:
        state = "!!" if problem else "--" if skipped else "ok"
        say(f"  {state}  {name}: {problem or (f'not checked, {skipped}' if skipped else about)}")
    failed = sum(finding.problem is not None for finding in checks)
    say(f"{method}: {failed} of {len(checks)} checks failed" if failed else f"{method}: no check failed")
    return 1 if failed else 0


def _labels(method: Method) -> str:
    """Return in words which labels a method uses."""
    if method.sae == "pass":
        return "those that its SAE was trained with"
    return method.labels + (f", or oracle with @{LABELS.name}=oracle" if method.option(LABELS.name) else "")


def _list_methods() -> int:
    def show(option: Option) -> None:
        excludes = f", not with {' or '.join(option.excludes)}" if option.excludes else ""
        say(f"    @{option.name}={option.type.__name__:<6} {option.describe()}{excludes}. {option.help}")

    def needs(method: Method) -> str:
        if method.site == "logits":
            return "reads embeddings as classes" + (", needs a checkpoint's gallery" if method.needs_checkpoint else "")
        where = "steers the output embedding" if method.site == "output" else "steers at the sites of a checkpoint"
        looks = {"none": "", "images": ", looks into its gallery", "neighbours": ", along an image's neighbours"}
        return where + looks[method.gallery] if method.needs_checkpoint else "needs no checkpoint"

    plugins = registry()
    for name, method in plugins.methods.items():
        aliases = f" (also {', '.join(method.aliases)})" if method.aliases else ""
        say(f"{name}:{aliases}  {method.summary}")
        sees = f"labels used: {_labels(method)}; protocol: {method.protocol}"
        say(f"    from {plugins.owners[name]}; {sees}; {needs(method)}")
        for option in method.options:
            show(option)
    groups = (
        (COMMON, "steers at the sites of a checkpoint"),
        (NEIGHBOURS, "steers along an image's neighbours"),
        (AUTOMATIC, "has an option that can be auto"),
        (UNLABELED, "reads embeddings as classes, and learns from unlabeled images"),
        (STREAM, "reads embeddings as classes, and sees a stream of images"),
        (VIEWS, "reads embeddings as classes, and sees views of each image"),
    )
    for group, which in groups:
        say(f"every method that {which} has:")
        for option in group:
            show(option)
    for name in plugins.conflicts:
        complain(f"vs2: error: {'; '.join(plugins.conflict(name))}")
    for plugin, problem in plugins.broken.items():
        complain(f"vs2: error: plugin {plugin} failed to load: {problem}")
    return 1 if plugins.conflicts or plugins.broken else 0
