"""The import hook that lets the stock ``clip_benchmark`` command know the steered models.

``vs2_plugin_hook.pth`` puts a few lines in place at every interpreter start, which import nothing (the first import
from disk would cost more than a millisecond): when ``clip_benchmark`` is first asked for, they call :func:`install`.
Python 3.15 and newer reads ``vs2_plugin_hook.start`` instead and calls it at once, so this module imports nothing
that is not loaded by then. The hook waits until certain modules of clip_benchmark are imported, lets them load as
usual, and passes each to :mod:`vs2_plugin.harness.patches`. ``VS2_PLUGIN_DISABLE=1`` switches the hook off.
"""

import os
import sys

TYPE_CHECKING = False  # like typing.TYPE_CHECKING; typing is not loaded by then
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import CodeType, ModuleType
    from typing import Any

DISABLE = "VS2_PLUGIN_DISABLE"
COMMAND = "clip_benchmark.cli"
WATCHED = frozenset(
    {
        COMMAND,
        "clip_benchmark.models",
        "clip_benchmark.datasets.builder",
        "clip_benchmark.metrics.captioning",
        "clip_benchmark.metrics.image_caption_selection",
        "clip_benchmark.metrics.linear_probe",
        "clip_benchmark.metrics.zeroshot_classification",
        "clip_benchmark.metrics.zeroshot_retrieval",
    }
)
# `python -m clip_benchmark.cli` runs the module's code as __main__, where nothing can be patched. Running the
# imported module instead is the same program.
_RUN_IMPORTED = f"import sys\nfrom {COMMAND} import main\nsys.exit(main())\n"


class _Loader:
    """Loads a module by its own loader, and then patches it."""

    def __init__(self, inner: "Any") -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> "Any":
        return getattr(self._inner, name)

    def create_module(self, spec: "ModuleSpec") -> "ModuleType | None":
        module: ModuleType | None = self._inner.create_module(spec)
        return module

    def exec_module(self, module: "Any") -> None:
        module.__loader__ = module.__spec__.loader = self._inner  # leave no trace for code that inspects the module
        self._inner.exec_module(module)
        try:
            from vs2_plugin.harness import patches

            patches.patch(module)
        except Exception as error:  # stock models must go on working
            _warn_once(f"vs2_plugin: steered models are not available: {type(error).__name__}: {error}")

    def get_code(self, name: str) -> "CodeType | None":
        if name == COMMAND:
            return compile(_RUN_IMPORTED, "<clip_benchmark with vs2_plugin>", "exec")
        code: CodeType | None = self._inner.get_code(name)
        return code


class Finder:
    """Finds the watched modules by way of the other finders, and wraps their loaders."""

    def find_spec(self, name: str, path: "Any" = None, target: "Any" = None) -> "ModuleSpec | None":
        """Return the spec of the other finders, with its loader wrapped; None for a module that is not watched."""
        if name not in WATCHED:
            return None
        for finder in sys.meta_path:
            find = None if isinstance(finder, Finder) else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find(name, path, target) if find else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader)  # type: ignore[assignment]  # not of importlib.abc: see above
                return spec
        return None


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if not _warned:
        _warned.add(message)
        print(message, file=sys.stderr)


def is_disabled() -> bool:
    """Return whether the environment switches the plugin off."""
    return os.environ.get(DISABLE, "") not in ("", "0")


def is_active() -> bool:
    """Return whether the hook is installed, as it is once clip_benchmark has been imported in this interpreter."""
    return any(isinstance(finder, Finder) for finder in sys.meta_path)


def install() -> None:
    """Install the hook, once, unless it is switched off."""
    if not is_disabled() and not is_active():
        sys.meta_path.insert(0, Finder())
