"""A backbone that is loaded when something is computed with it, not before.

What identifies its vision tower, and where activations can be read in it, is kept in a small file once the backbone was
loaded, with the sizes and times of all files that this depends on. As long as those are what they were, it is known
the next time without importing open_clip and reading weights, which take longer than everything else that happens
before a training on cached activations.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from vs2_plugin import __version__
from vs2_plugin.clip.backbone import (
    Loaded,
    check_backbone,
    ignores_pretrained,
    load_backbone,
    quickgelu_mismatch,
    weights_files,
)
from vs2_plugin.clip.sites import Site, Sites
from vs2_plugin.clip.tower import Tower
from vs2_plugin.errors import TowerError
from vs2_plugin.names import LOCAL

__all__ = ["Backbone"]


@dataclass(frozen=True)
class _Facts:
    """What is known of a tower without its weights."""

    tower: Tower
    sites: Sites

    @classmethod
    def of(cls, loaded: Loaded) -> _Facts:
        return cls(Tower.of(loaded.model, loaded.transform), Sites.of(loaded.model))

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> _Facts:
        sites = [Site(**site) for site in facts["sites"]]
        return cls(Tower.from_json(facts["tower"]), Sites(tuple(sites[:-1]), sites[-1]))

    def to_json(self) -> dict[str, Any]:
        return {
            "tower": self.tower.to_json(),
            "sites": [asdict(site) for site in (*self.sites.blocks, self.sites.output)],
        }


class Backbone:
    """An open_clip model with its weights."""

    def __init__(
        self,
        name: str,
        pretrained: str,
        cache_dir: str | None = None,
        device: str = "cpu",
        *,
        seed: int = 0,
        folder: Path,
        forget: bool = False,
    ) -> None:
        """
        Args:
            name: open_clip's name of the model.
            pretrained: weights tag or file; empty for random weights.
            cache_dir: where downloaded weights are kept.
            device: where the model shall be.
            seed: of random weights.
            folder: where towers are remembered.
            forget: load it, whatever is remembered.

        Raises:
            TowerError: open_clip does not know the name or the tag.
        """
        self.name, self.pretrained = name, pretrained
        self._cache_dir, self._device, self._seed = cache_dir, device, seed
        self._file = folder / f"{self._key()}.json"
        self._remembered = None if forget else self._recall()
        if self._remembered is None:
            check_backbone(name, pretrained)

    @property
    def tower(self) -> Tower:
        """What identifies its vision tower."""
        return self._facts.tower

    @property
    def sites(self) -> Sites:
        """Where activations can be read."""
        return self._facts.sites

    @cached_property
    def loaded(self) -> Loaded:
        """The model on its device, loaded when this is first asked for.

        Raises:
            TowerError: it could not be fetched or read, or is not what it was.
        """
        started = time.time_ns()
        torch.manual_seed(self._seed)  # as clip_benchmark does before it loads a model
        loaded = load_backbone(self.name, self.pretrained, self._cache_dir, self._device, initialize=False)
        found = _Facts.of(loaded)
        if self._remembered not in (None, found):
            self._file.unlink(missing_ok=True)
            raise TowerError(
                f"the weights of {self.name} have changed since they were last read, and their files did not tell; "
                "this is known now: run the same command again"
            )
        self._remembered = found
        with suppress(OSError):  # not to remember costs seconds, and no more
            self._remember(found, started)
        return loaded

    @property
    def _facts(self) -> _Facts:
        if self._remembered is None:
            self.loaded  # noqa: B018
        return self._remembered

    def _key(self) -> str:
        """What stands for the arguments, and for all code that makes a tower of them."""
        pretrained = os.path.abspath(self.pretrained) if os.path.isfile(self.pretrained) else self.pretrained
        random = not pretrained and not ignores_pretrained(self.name)
        key = {
            "arguments": [self.name, pretrained, self._cache_dir, self._seed if random else None],
            "here": os.getcwd() if self.name.startswith(LOCAL) else None,
            "packages": [__version__, torch.__version__, _version("clip-benchmark"), _version("timm")],
            "open_clip": _stamps(_package_files("open_clip")),  # a configuration may have been edited
        }
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]

    def _recall(self) -> _Facts | None:
        try:
            kept = json.loads(self._file.read_text())
            return _Facts.from_json(kept) if kept["files"] == _stamps(file for file, *_ in kept["files"]) else None
        except (OSError, ValueError, KeyError, TypeError, IndexError):  # not there, or not ours
            return None

    def _remember(self, facts: _Facts, started: int) -> None:
        files = weights_files(self.name, self.pretrained, self._cache_dir)
        if files is None or quickgelu_mismatch(self.name, self.pretrained):  # the warning is for every run
            return
        stamps = _stamps(files)
        # Changed while, or just before, it was read, on a clock of 100 ticks a second: who knows what was read.
        if any(changed >= started - 20_000_000 for *_, changed, _ in stamps):
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**facts.to_json(), "files": stamps}, indent=1) + "\n"
        with tempfile.NamedTemporaryFile("w", dir=self._file.parent, prefix=".", delete=False) as file:
            file.write(text)
        os.chmod(file.name, 0o644)
        os.replace(file.name, self._file)


def _stamps(files: Iterable[str | Path]) -> list[list]:
    """Path, size, times of the last change of content and of status (ns), and inode of each. Raises OSError."""
    found = ((os.path.abspath(file), os.stat(file)) for file in files)
    return [[file, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino] for file, stat in found]


def _package_files(name: str) -> list[Path]:
    spec = find_spec(name)
    folders = [] if spec is None else spec.submodule_search_locations or []
    return sorted(path for folder in folders for path in Path(folder).rglob("*") if path.suffix in (".py", ".json"))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
