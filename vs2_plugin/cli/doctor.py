"""``vs2 doctor``: what is installed, whether the hook is in place, what the store holds; exit code 1 for a problem."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from vs2_plugin import __version__
from vs2_plugin.checkpoint.checkpoint import Checkpoint
from vs2_plugin.checkpoint.store import Store
from vs2_plugin.errors import Vs2Error
from vs2_plugin.harness import autoload
from vs2_plugin.plugins import registry

__all__ = ["doctor"]


def doctor(store: Store) -> int:
    """Print the findings. Returns the exit code."""
    problems: list[str] = []

    def line(good: bool, text: str, mend: str = "") -> None:
        print(f"  {'ok' if good else '!!'}  {text}")
        if not good:
            problems.append(f"{text}{'; ' + mend if mend else ''}")

    print(f"vs2-plugin {__version__}, Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    print("packages")
    for name in (
        "torch",
        "torchvision",
        "open_clip_torch",
        "clip-benchmark",
        "webdataset",
        "numpy",
        "pluggy",
        "safetensors",
    ):
        try:
            found = version(name)
        except PackageNotFoundError:
            line(False, f"{name} is not installed", f"pip install {name}")
            continue
        fits = name != "clip-benchmark" or found.startswith("1.6")
        fits = fits and (name != "numpy" or tuple(map(int, found.split(".")[:2])) < (2, 4))
        line(fits, f"{name} {found}", "pip install --force-reinstall vs2-plugin")

    print("harness")
    if autoload.is_disabled():
        line(False, f"the hook is switched off by {autoload.DISABLE}", f"unset {autoload.DISABLE}")
    else:
        try:
            import clip_benchmark.cli
            import clip_benchmark.models
        except Exception as error:
            line(
                False,
                f"clip_benchmark cannot be imported: {type(error).__name__}: {error}",
                "pip install --force-reinstall vs2-plugin",
            )
        else:
            line(
                autoload.is_active(),
                f"the hook is {'active' if autoload.is_active() else 'not active'} in this interpreter",
                "pip install --force-reinstall vs2-plugin",
            )
            patched = (
                hasattr(clip_benchmark.cli.main_eval, "__wrapped__") and "vs2" in clip_benchmark.models.MODEL_TYPES
            )
            line(patched, f"clip_benchmark {'knows' if patched else 'does not know'} the steered models")

    known = registry()
    print("plugins and methods")
    for plugin in known.plugins:
        names = [name for name, owner in known.owners.items() if owner == plugin]
        line(
            plugin not in known.broken,
            f"{plugin}: {', '.join(names) or 'no methods'}"
            + (f" ({known.broken[plugin]})" if plugin in known.broken else ""),
        )
    for name, claimants in known.conflicts.items():
        line(False, f"method {name!r} is claimed by {' and '.join(claimants)}", "uninstall one of them")

    print(f"store {store.root}")
    folders = sorted(path for path in store.checkpoints.glob("*") if path.is_dir() and not path.name.startswith("."))
    for folder in folders:
        try:
            checkpoint = Checkpoint.open(folder)
            checkpoint.verify()
        except Vs2Error as error:
            line(False, f"{folder.name}: {error}", f"vs2 store remove {folder.name}")
        else:
            sites = ", ".join(f"{site.folder} FVU {site.fvu:.4f}" for site in checkpoint.sites)
            line(True, f"{folder.name}: {checkpoint.data.images:,} images, {sites}")
    if not folders:
        print("      no checkpoints yet; train one with vs2-train-sae")

    if problems:
        print(f"\n{len(problems)} problem(s):")
        for problem in problems:
            print(f"  - {problem}")
    return 1 if problems else 0
