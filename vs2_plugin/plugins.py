"""The plugins: found by their entry points, or files that the user names in ``VS2_PLUGINS``; each is asked for its
methods, and a broken one does not harm the others."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pluggy

from vs2_plugin import hookspecs
from vs2_plugin.errors import ModelStringError, PluginError
from vs2_plugin.method import Method
from vs2_plugin.plugin_faults import fault_of

__all__ = ["GROUP", "VARIABLE", "Registry", "find_plugins", "registry"]

GROUP = "vs2_plugin"
#: The environment variable that names files with methods, separated as in ``PATH``. No other file is run.
VARIABLE = "VS2_PLUGINS"
#: How the label of a built-in plugin begins.
_BUILT_IN = "vs2-plugin (built in"


def _manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager("vs2_plugin")
    manager.add_hookspecs(hookspecs)
    return manager


@dataclass
class Registry:
    """The steering methods of all plugins.

    A plugin that cannot be imported, or whose hook raises, is listed in :attr:`broken` and the others go on
    working. A name that two plugins claim is listed in :attr:`conflicts`; using it is an error that names both.
    """

    methods: dict[str, Method] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)
    """Method name -> label of the plugin that offers it."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Other spelling -> method name."""
    broken: dict[str, str] = field(default_factory=dict)
    """Label of a plugin -> the error, in words."""
    conflicts: dict[str, list[str]] = field(default_factory=dict)
    """Claimed name -> labels of the plugins that claim it."""
    plugins: list[str] = field(default_factory=list)
    """The labels of all plugins, for people: distribution, version and entry point."""
    _manager: pluggy.PluginManager = field(default_factory=_manager, init=False, repr=False, compare=False)

    def add_plugin(self, label: str, plugin: object) -> None:
        """Add a plugin (a module or object with hook implementations) and the methods that it offers."""
        self.load_plugin(label, lambda: plugin)

    def load_plugin(self, label: str, load: Callable[[], object]) -> None:
        """Add the plugin that ``load`` returns. If it raises, the plugin is broken."""
        self.plugins.append(label)
        try:
            methods = self._methods_of(label, load())
        except (Exception, SystemExit) as error:
            self.broken[label] = fault_of(error)
            if self._manager.has_plugin(label):
                self._manager.unregister(name=label)
            return
        for method in methods:
            self._claim(label, method)

    def _methods_of(self, label: str, plugin: object) -> list[Method]:
        twin = self._manager.get_name(plugin)
        if twin is not None:
            raise PluginError(f"it is the same object as {twin}; expected one entry point for each plugin")
        self._manager.register(plugin, label)
        self._manager.check_pending()  # a misspelled hook is an error, not silence
        # Called one by one: in a joint call, an exception in one hook would keep the others from running.
        hooks = [hook for hook in self._manager.hook.vs2_methods.get_hookimpls() if hook.plugin is plugin]
        if not hooks:
            raise PluginError("it implements no hook; expected a function vs2_methods marked with @hookimpl")
        answer: Any = hooks[0].function()
        if answer is None:
            raise PluginError("vs2_methods() returned nothing; expected a list of vs2_plugin.Method")
        if not isinstance(answer, Iterable):
            raise PluginError(f"vs2_methods() returned {type(answer).__name__}; expected a list of vs2_plugin.Method")
        methods: list[Method] = list(answer)
        for method in methods:
            if not isinstance(method, Method):
                raise PluginError(f"vs2_methods() gave {method!r}; expected vs2_plugin.Method")
        names = [name for method in methods for name in _names(method)]
        for name in names:
            if names.count(name) > 1:
                raise PluginError(f"two of its methods are called {name!r}; expected another name or alias for each")
        return methods

    def _claim(self, label: str, method: Method) -> None:
        for name in _names(method):
            holder = self.owners.get(self.aliases.get(name, name))
            if holder is not None:
                self.conflicts.setdefault(name, [holder]).append(label)
        if method.name not in self.conflicts:  # a conflict about an alias leaves the method itself usable
            self.methods[method.name] = method
            self.owners[method.name] = label
            own = [alias for alias in method.aliases if alias not in self.conflicts]
            self.aliases.update(dict.fromkeys(own, method.name))

    def conflict(self, name: str) -> tuple[str, str]:
        """Return, in words, who claims a name that two plugins claim, and what to do."""
        claimants = self.conflicts[name]
        others = [label for label in claimants if not label.startswith(_BUILT_IN)]
        removed = "one of them" if others == claimants else " and ".join(others)
        problem = f"method {name!r} is claimed by {' and '.join(claimants)}"
        return problem, f"uninstall {removed}, or leave it out of {VARIABLE}"

    @property
    def names(self) -> list[str]:
        """Every name that can stand before a colon, aliases included."""
        return [*self.methods, *self.aliases]

    def method(self, name: str) -> Method:
        """Return the method called ``name``.

        Raises:
            PluginError: two plugins claim the name.
            ModelStringError: no plugin claims it.
        """
        if name in self.conflicts:
            raise PluginError("; ".join(self.conflict(name)))
        method = self.methods.get(self.aliases.get(name, name))
        if method is None:
            broken = f"; plugins that failed to load: {', '.join(self.broken)} (see vs2 doctor)" if self.broken else ""
            raise ModelStringError(f"unknown method {name!r}; known methods: {', '.join(sorted(self.names))}{broken}")
        return method


def _names(method: Method) -> list[str]:
    """Return the names of a method: its own and its aliases, each once."""
    return list(dict.fromkeys((method.name, *method.aliases)))


def _named_files() -> Iterator[Path]:
    """Yield the files that ``VS2_PLUGINS`` names, each once."""
    named = filter(None, os.environ.get(VARIABLE, "").split(os.pathsep))
    yield from dict.fromkeys(Path(os.path.abspath(os.path.expanduser(name))) for name in named)


def _module_of(file: Path) -> object:
    """Run a file as a module, and return the module. It has a unique name in ``sys.modules``, so that its classes and
    functions can be pickled."""
    if not file.is_file():
        problem = "is a folder" if file.is_dir() else "does not exist"
        raise PluginError(f"{file} {problem}; expected a file NAME.py in {VARIABLE}")
    if file.suffix != ".py":
        raise PluginError(f"{file.name} is not called NAME.py; expected a file of Python code in {VARIABLE}")
    name = f"vs2_file_{file.stem}_{hashlib.sha256(os.fsencode(file)).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def find_plugins() -> Registry:
    """Return a new registry: the built-in methods, then those of every installed plugin and of every file that
    ``VS2_PLUGINS`` names."""
    from vs2_plugin.logits import builtin as on_logits
    from vs2_plugin.steering import builtin

    plugins = Registry()
    plugins.add_plugin(f"{_BUILT_IN})", builtin)
    plugins.add_plugin(f"{_BUILT_IN}, on logits)", on_logits)
    for point in sorted(entry_points(group=GROUP), key=lambda p: (p.dist.name if p.dist else "", p.name)):
        distribution = f"{point.dist.name} {point.dist.version}" if point.dist else "an unnamed distribution"
        plugins.load_plugin(f"{distribution} (entry point {point.name!r})", point.load)
    for file in _named_files():
        plugins.load_plugin(f"{file} ({VARIABLE})", functools.partial(_module_of, file))
    return plugins


@functools.cache
def registry() -> Registry:
    """Return the registry of this process, which is filled once."""
    return find_plugins()
