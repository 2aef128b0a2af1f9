"""Writes a package for a new method, which can be installed, registers a method with an option and passes its test."""

from __future__ import annotations

from pathlib import Path
from string import Template

from vs2_plugin.errors import DataError, PluginError
from vs2_plugin.method import Method
from vs2_plugin.plugins import GROUP, Registry, registry

__all__ = ["new_plugin"]

#: File name -> template. $name is the method's name, $module and $package are those of its module and package.
_FILES = {
    "pyproject.toml": """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "$package"
version = "0.1.0"
description = "$name: a method for vs2-plugin"
readme = "README.md"
requires-python = ">=3.10"
dependencies = ["vs2-plugin"]

[project.optional-dependencies]
test = ["pytest"]

[project.entry-points.$group]
$name = "$module"

[tool.hatch.build.targets.wheel]
include = ["$module.py"]
""",
    "$module.py": '''\
"""$name: moves each image away from the mean activation of unlabeled images. Put your own method here."""

from vs2_plugin import Method, Option, hookimpl


def build(context, strength):
    mean = context.mean  # [d], over the unlabeled training images

    def steer(x):  # [batch, d], float32, at the site of the checkpoint
        return x + strength * (x - mean)

    return steer


@hookimpl
def vs2_methods():
    options = [Option("strength", float, 0.5, minimum=0, maximum=10, help="how far")]
    return [Method("$name", build, options, summary="away from the mean activation")]
''',
    "test_$module.py": """\
from vs2_plugin.testing import check


def test_$name():
    check("$name")
""",
    "README.md": """\
# $package

`$name` for vs2-plugin: what it does, and where that comes from.

    pip install -e ".[test]" && pytest
    vs2 methods
    clip_benchmark eval --model $name:ViT-B-32@strength=0.5 --pretrained openai --dataset cifar100 --dataset_root root

While you write it, no installation is needed: `VS2_PLUGINS=$module.py vs2 methods --check $name`.
""",
}


def new_plugin(name: str, folder: Path | None = None, known: Registry | None = None) -> list[Path]:
    """Write a package for a new method into a new or empty folder, and return the paths of its files.

    Args:
        name: the method's name: lower-case letters, digits and ``_``.
        folder: by default ``vs2-NAME``.
        known: the registry of the methods whose names are taken; by default this process's.

    Raises:
        PluginError: the name is invalid or taken.
        DataError: the folder is not empty, or is a file.
    """
    method = Method(name, print, needs_checkpoint=False)  # raises PluginError for an invalid name
    known = known or registry()
    if name in known.names:
        owner = known.owners[known.aliases.get(name, name)]
        raise PluginError(f"method name {name!r} is taken by {owner}; expected another")
    names = {"name": method.name, "module": f"vs2_{name}", "package": f"vs2-{name.replace('_', '-')}", "group": GROUP}
    folder = Path(names["package"]) if folder is None else folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        problem = "is not empty" if folder.is_dir() else "is a file"
        raise DataError(f"{str(folder)!r} {problem}; expected a new or an empty folder: vs2 new-plugin {name} FOLDER")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for file, text in _FILES.items():
        path = folder / Template(file).substitute(names)
        path.write_text(Template(text).substitute(names), encoding="utf-8")
        paths.append(path)
    return paths
