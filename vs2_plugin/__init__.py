"""SAE-steered CLIP models for clip_benchmark.

Importing this package is cheap: it is imported at every interpreter start (by the hook that makes
``clip_benchmark`` know the steered models), so each public name is loaded when it is first used.
"""

__version__ = "0.3.0"

#: Public name -> the module that defines it.
_HOME = {
    "Batch": "vs2_plugin.steering.batch",
    "Checkpoint": "vs2_plugin.checkpoint.checkpoint",
    "Context": "vs2_plugin.steering.context",
    "Method": "vs2_plugin.method",
    "Move": "vs2_plugin.steering.move",
    "Option": "vs2_plugin.method",
    "Predictions": "vs2_plugin.model.predictions",
    "SaeConfig": "vs2_plugin.sae.topk",
    "SteeredCLIP": "vs2_plugin.model.steered",
    "Store": "vs2_plugin.checkpoint.store",
    "TopKSAE": "vs2_plugin.sae.topk",
    "Vs2Error": "vs2_plugin.errors",
    "hookimpl": "vs2_plugin.hookspecs",
    "load": "vs2_plugin.harness.loader",
    "train": "vs2_plugin.training",
    "vs2_steer": "vs2_plugin.steering.move",
}
__all__ = ["__version__", *sorted(_HOME)]  # noqa: PLE0604 (all of them are strings)

TYPE_CHECKING = False  # like typing.TYPE_CHECKING, without importing typing
if TYPE_CHECKING:
    from typing import Any


def __getattr__(name: str) -> "Any":
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
