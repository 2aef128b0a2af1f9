"""The hooks that a plugin can implement. A plugin is any installed package with an entry point in the
group ``vs2_plugin`` that leads to a module (or object) holding ``@hookimpl`` functions, or such a module in a file that
the environment variable ``VS2_PLUGINS`` names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from vs2_plugin.method import Method

__all__ = ["hookimpl", "hookspec", "vs2_methods"]

hookspec = pluggy.HookspecMarker("vs2_plugin")
hookimpl = pluggy.HookimplMarker("vs2_plugin")


@hookspec
def vs2_methods() -> Iterable[Method]:  # type: ignore[empty-body]
    """Return the steering methods that this plugin offers."""
