"""The import hook that lets the stock ``clip_benchmark`` command know the steered models.

``vs2_plugin_hook.pth`` puts a few lines in place at every interpreter start, which import nothing (the first import
from disk would cost more than a millisecond): when ``clip_benchmark`` is first asked for, they call :func:`install`.
Python 3.15 and newer reads ``vs2_plugin_hook.start`` instead and calls it at once, so this module imports nothing
that is not loaded by then. It waits for a few modules of clip_benchmark to be imported, lets them be loaded as ever,
and then hands each to :mod:`vs2_plugin.harness.patches`. ``VS2_PLUGIN_DISABLE=1`` switches it off.
"""

import os
import sys

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
    """A module's own loader, and then the patch."""

    def __init__(self, inner):
        self._inner = inner

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def create_module(self, spec):
        return self._inner.create_module(spec)

    def exec_module(self, module):
        module.__loader__ = module.__spec__.loader = self._inner  # leave no trace for whoever inspects the module
        self._inner.exec_module(module)
        try:
            from vs2_plugin.harness import patches as register

            register.patch(module)
        except Exception as error:  # stock models must go on working
            _say_once(f"vs2_plugin: steered models are not available: {type(error).__name__}: {error}")

    def get_code(self, name):
        if name == COMMAND:
            return compile(_RUN_IMPORTED, "<clip_benchmark with vs2_plugin>", "exec")
        return self._inner.get_code(name)


class Finder:
    """Finds the watched modules by way of the other finders, and wraps their loaders."""

    def find_spec(self, name, path=None, target=None):
        if name not in WATCHED:
            return None
        for finder in sys.meta_path:
            find = None if isinstance(finder, Finder) else getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


_said = set()


def _say_once(message):
    if not _said:
        _said.add(message)
        print(message, file=sys.stderr)


def is_disabled():
    """Whether the environment switches the plugin off."""
    return os.environ.get(DISABLE, "") not in ("", "0")


def is_active():
    """Whether the hook is in place in this interpreter, clip_benchmark having been imported."""
    return any(isinstance(finder, Finder) for finder in sys.meta_path)


def install():
    """Put the hook in place, once, unless it is switched off."""
    if not is_disabled() and not is_active():
        sys.meta_path.insert(0, Finder())
