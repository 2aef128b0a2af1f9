"""``vs2 doctor``: checks packages, the hook, plugins and the store; the exit code is 1 if there is a problem."""

from __future__ import annotations

import platform
import re
import shlex
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from vs2_plugin import __version__
from vs2_plugin.checkpoint.checkpoint import Checkpoint
from vs2_plugin.checkpoint.store import Store
from vs2_plugin.errors import Vs2Error
from vs2_plugin.harness import autoload
from vs2_plugin.harness.patches import SUPPORTED
from vs2_plugin.messages import say
from vs2_plugin.plugins import registry
from vs2_plugin.text import reason_of

__all__ = ["Finding", "doctor"]

_PACKAGES = (
    "torch", "torchvision", "open_clip_torch", "transformers", "clip-benchmark", "webdataset", "numpy", "pluggy",
    "safetensors",
)  # fmt: skip
_REINSTALL = "pip install --force-reinstall vs2-plugin"


class Finding(NamedTuple):
    """The result of one check."""

    text: str
    good: bool = True
    """False for a problem."""
    mend: str = ""
    """The command that solves the problem, if there is one."""


def doctor(store: Store) -> int:
    """Print the findings of all checks, and return the exit code."""
    sections = {
        "packages": _packages(),
        "harness": _harness(),
        "plugins and methods": _plugins(),
        f"store {store.root}": _checkpoints(store),
    }
    problems = []
    say(f"vs2-plugin {__version__}, Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    for title, findings in sections.items():
        say(title)
        for finding in findings:
            say(f"  {'ok' if finding.good else '!!'}  {finding.text}")
            if not finding.good:
                problems.append("; ".join(filter(None, (finding.text, finding.mend))))
    if not _folders(store):
        say(f"      no checkpoints yet; train one with {shlex.join(['vs2-train-sae', *store.words])}")
    if problems:
        for line in ("", f"{len(problems)} problem(s):", *(f"  - {problem}" for problem in problems)):
            say(line)
    return 1 if problems else 0


def _packages() -> Iterator[Finding]:
    for name in _PACKAGES:
        try:
            installed = version(name)
        except PackageNotFoundError:
            yield Finding(f"{name} is not installed", False, f"pip install {name}")
            continue
        fits = name != "clip-benchmark" or installed.startswith(SUPPORTED)
        fits = fits and (name != "numpy" or tuple(map(int, re.findall(r"\d+", installed)[:2])) < (2, 4))
        yield Finding(f"{name} {installed}", fits, _REINSTALL)


def _harness() -> Iterator[Finding]:
    if autoload.is_disabled():
        yield Finding(f"the hook is switched off by {autoload.DISABLE}", False, f"unset {autoload.DISABLE}")
        return
    try:
        import clip_benchmark.cli
        import clip_benchmark.models
    except Exception as error:
        yield Finding(f"clip_benchmark cannot be imported: {reason_of(error)}", False, _REINSTALL)
        return
    active = autoload.is_active()
    yield Finding(f"the hook is {'active' if active else 'not active'} in this interpreter", active, _REINSTALL)
    patched = hasattr(clip_benchmark.cli.main_eval, "__wrapped__") and "vs2" in clip_benchmark.models.MODEL_TYPES
    yield Finding(f"clip_benchmark {'knows' if patched else 'does not know'} the steered models", patched)


def _plugins() -> Iterator[Finding]:
    plugins = registry()
    for plugin in plugins.plugins:
        names = ", ".join(name for name, owner in plugins.owners.items() if owner == plugin) or "no usable method"
        problem = plugins.broken.get(plugin)
        yield Finding(f"{plugin}: {names}" + (f" ({problem})" if problem else ""), problem is None)
    for name in plugins.conflicts:
        problem, mend = plugins.conflict(name)
        yield Finding(problem, False, mend)


def _folders(store: Store) -> list[Path]:
    """Return the folders of all checkpoints in the store, damaged ones included."""
    return sorted(path for path in store.checkpoints.glob("[!.]*") if path.is_dir())


def _checkpoints(store: Store) -> Iterator[Finding]:
    for folder in _folders(store):
        try:
            checkpoint = Checkpoint.load(folder)
            checkpoint.verify()
        except Vs2Error as error:
            mend = shlex.join(["vs2", "store", *store.words, "remove", folder.name])
            yield Finding(f"{folder.name}: {error}", False, mend)
        else:
            sites = ", ".join(f"{site.folder} FVU {site.fvu:.4f}" for site in checkpoint.sites)
            yield Finding(f"{folder.name}: {checkpoint.data.images:,} images, {sites}")
            for site in (site for site in checkpoint.sites if site.warning):
                yield Finding(f"{folder.name}: the SAE at {site.folder} is useless: {site.warning}", False, site.advice)
