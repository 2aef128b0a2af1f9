"""Finds the plugins, asks each for its methods, and keeps the broken ones from harming the rest."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

import pluggy

from vs2_plugin import hookspecs
from vs2_plugin.errors import ModelStringError, PluginError
from vs2_plugin.method import Method

__all__ = ["GROUP", "Registry", "find_plugins", "registry"]

GROUP = "vs2_plugin"


@dataclass
class Registry:
    """The steering methods of all plugins.

    A plugin that cannot be imported, or whose hook raises, is listed in :attr:`broken` and the others go on
    working. A name that two plugins claim is listed in :attr:`conflicts`; using it is an error that names both.
    """

    methods: dict[str, Method] = field(default_factory=dict)
    """Method name -> method."""
    owners: dict[str, str] = field(default_factory=dict)
    """Method name -> the plugin that offers it, in words."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Other spelling -> method name."""
    broken: dict[str, str] = field(default_factory=dict)
    """Plugin, in words -> what went wrong."""
    conflicts: dict[str, list[str]] = field(default_factory=dict)
    """Claimed name -> the plugins that claim it."""
    plugins: list[str] = field(default_factory=list)
    """All plugins found, in words."""

    def add_plugin(self, label: str, plugin: Any) -> None:
        """Ask ``plugin`` (a module or object with hook implementations) for its methods."""
        self.plugins.append(label)
        try:
            manager = pluggy.PluginManager("vs2_plugin")
            manager.add_hookspecs(hookspecs)
            manager.register(plugin, label)
            manager.check_pending()  # a misspelled hook is an error, not silence
            if not manager.hook.vs2_methods.get_hookimpls():
                raise PluginError("it implements no hook; expected a function vs2_methods marked with @hookimpl")
            answers = manager.hook.vs2_methods()
            if not answers:  # pluggy leaves out None
                raise PluginError("vs2_methods() returned nothing; expected a list of vs2_plugin.Method")
            found = [method for answer in answers for method in answer]
            for method in found:
                if not isinstance(method, Method):
                    raise PluginError(f"vs2_methods() gave {method!r}; expected vs2_plugin.Method")
        except (Exception, SystemExit) as error:
            self.broken[label] = f"{type(error).__name__}: {error}"
            return
        for method in found:
            self._claim(label, method)

    def _claim(self, label: str, method: Method) -> None:
        names = (method.name, *method.aliases)
        for name in names:
            holder = self.owners.get(self.aliases.get(name, name))
            if holder is not None:
                self.conflicts.setdefault(name, [holder]).append(label)
        if not self.conflicts.keys() & set(names):
            self.methods[method.name] = method
            self.owners[method.name] = label
            self.aliases.update(dict.fromkeys(method.aliases, method.name))

    @property
    def names(self) -> list[str]:
        """Every name that can stand before a colon, aliases included."""
        return [*self.methods, *self.aliases]

    def method(self, name: str) -> Method:
        """The method called ``name``.

        Raises:
            PluginError: two plugins claim the name.
            ModelStringError: nobody does.
        """
        if name in self.conflicts:
            claimants = " and ".join(self.conflicts[name])
            raise PluginError(f"method {name!r} is claimed by {claimants}; uninstall one of them")
        found = self.methods.get(self.aliases.get(name, name))
        if found is None:
            broken = f"; plugins that failed to load: {', '.join(self.broken)} (see vs2 doctor)" if self.broken else ""
            raise ModelStringError(f"unknown method {name!r}; known methods: {', '.join(sorted(self.names))}{broken}")
        return found


def find_plugins() -> Registry:
    """A fresh registry: the built-in methods, then every installed plugin."""
    found = Registry()
    from vs2_plugin.steering import builtin

    found.add_plugin("vs2-plugin (built in)", builtin)
    for point in sorted(entry_points(group=GROUP), key=lambda p: (p.dist.name if p.dist else "", p.name)):
        distribution = f"{point.dist.name} {point.dist.version}" if point.dist else "an unnamed distribution"
        label = f"{distribution} (entry point {point.name!r})"
        try:
            plugin = point.load()
        except (Exception, SystemExit) as error:
            found.plugins.append(label)
            found.broken[label] = f"{type(error).__name__}: {error}"
        else:
            found.add_plugin(label, plugin)
    return found


@functools.cache
def registry() -> Registry:
    """The registry of this process, filled once."""
    return find_plugins()
