"""The store: where checkpoints and cached activations lie, and the names by which they are found.

    <store>/checkpoints/<name>/…     see checkpoint.checkpoint
    <store>/activations/<key>/…      see data.cache
    <store>/training/<key>/…         states of unfinished trainings; see sae.state

A folder whose name begins with a dot is being written, or was when a process died; see files.

The store is ``--store``, else the environment variable ``VS2_STORE``, else the platform's cache folder. No heavy
imports here: the harness looks a checkpoint up before it loads anything.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from vs2_plugin.checkpoint.checkpoint import Checkpoint
from vs2_plugin.checkpoint.manifest import MANIFEST
from vs2_plugin.documented import documented
from vs2_plugin.errors import CheckpointError, CheckpointNotFound, DataError
from vs2_plugin.files import LOCKS, LONGEST, alone, file_digest, make_shared, settle
from vs2_plugin.names import HUB, LOCAL, SCHEMES, TRANSFORMERS, library_place, repository

__all__ = ["ENVIRONMENT_VARIABLE", "Store", "checkpoint_name", "folder_size", "last_change"]

ENVIRONMENT_VARIABLE = "VS2_STORE"


def checkpoint_name(backbone: str, pretrained: str, dataset: str) -> str:
    """Return the name of the checkpoint for a backbone, its weights and a data set; weights files of one name share it.

    >>> checkpoint_name("ViT-B-32", "openai", "cifar100")
    'ViT-B-32_openai_cifar100'
    >>> checkpoint_name("local-dir:models/tiny", "openai", "wds/digits")
    'local-dir-tiny_wds-digits'
    >>> checkpoint_name("hf:openai/clip-vit-base-patch32", "", "cifar100")
    'hf-openai-clip-vit-base-patch32_cifar100'
    """
    parts, place = [], library_place(backbone)
    if backbone.startswith(LOCAL):
        parts = [f"local-dir-{Path(backbone.removeprefix(LOCAL)).name}"]
    elif isinstance(place, str):
        parts = [TRANSFORMERS + Path(place).resolve().name]
    elif place is not None or backbone.startswith(HUB):
        parts = [backbone]  # the weights come with the name
    elif backbone:
        parts = [backbone, Path(pretrained).stem if os.path.isfile(pretrained) else pretrained or "random"]
    return "_".join(re.sub(r"[^A-Za-z0-9.+-]+", "-", part.replace("_", "-")) for part in (*parts, dataset))


def _digest(weights: str) -> str:
    stat = os.stat(weights)
    return _digest_of(weights, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=8)
def _digest_of(weights: str, size: int, changed: int) -> str:
    """Return the SHA-256 of a weights file, cached as a command needs it several times."""
    return file_digest(Path(weights))


@documented
@dataclass(frozen=True)
class Store:
    """A store of checkpoints and cached activations, in a folder."""

    root: Path
    """Folder of the store; made when something is written."""

    @classmethod
    def default(cls, root: str | Path | None = None) -> Store:
        """Return the store at ``root``, else at ``$VS2_STORE``, else in the platform's cache folder."""
        chosen = root or os.environ.get(ENVIRONMENT_VARIABLE)
        if chosen:
            return cls(Path(os.path.expanduser(chosen)))
        from platformdirs import user_cache_dir

        return cls(Path(user_cache_dir("vs2-plugin", appauthor=False)))

    @property
    def words(self) -> list[str]:
        """``--store`` and the folder, for commands of this package; empty if they use this store by default."""
        is_default = os.path.abspath(self.root) == os.path.abspath(Store.default().root)
        return [] if is_default else ["--store", str(self.root)]

    @property
    def assignment(self) -> str:
        """Prefix for a command without ``--store``, such as ``clip_benchmark``: ``VS2_STORE=FOLDER``, or ''."""
        return f"{ENVIRONMENT_VARIABLE}={shlex.quote(str(self.root))} " if self.words else ""

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.root / "checkpoints"

    @property
    def activations(self) -> Path:
        """The folder of the cached activations."""
        return self.root / "activations"

    @property
    def training(self) -> Path:
        """The folder of the states of trainings."""
        return self.root / "training"

    def require_writable(self) -> None:
        """Refuse a store in which nothing can be written.

        Raises:
            DataError: the store is a file, or cannot be made or written.
        """
        another = f"name another one with --store or {ENVIRONMENT_VARIABLE}"
        if self.root.exists() and not self.root.is_dir():
            raise DataError(f"the store {self.root} is a file; expected a folder: {another}")
        try:
            for folder in (self.checkpoints, self.activations, self.training):
                make_shared(folder)
                with tempfile.TemporaryFile(dir=folder):
                    pass
        except OSError as error:
            raise DataError(f"the store {self.root} cannot be written ({error.strerror}); {another}") from error

    def unfinished(self) -> Iterator[Path]:
        """Yield the folders that interrupted runs left or running ones write, which a later run continues."""
        for folder in (self.checkpoints, self.activations):
            yield from sorted(path for path in _inside(folder, ".*") if path.name != LOCKS)
        yield from sorted(_inside(self.training, "[!.]*"))

    def names(self) -> list[str]:
        """Return the names of all checkpoints in the store."""
        self._settle()
        return sorted(
            path.parent.name for path in self.checkpoints.glob(f"*/{MANIFEST}") if not path.parent.name.startswith(".")
        )

    def _settle(self) -> None:
        """Complete replacements of checkpoints that dead writers began."""
        for left in _inside(self.checkpoints, ".*.*"):
            name, _, state = left.name.removeprefix(".").rpartition(".")
            if state in ("new", "old"):
                settle(self.checkpoints / name)

    def folder(self, name: str) -> Path:
        """Return the folder for a checkpoint called ``name``, existing or not. Raises DataError for an invalid name."""
        if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name, re.ASCII):
            raise DataError(f"checkpoint name {name!r}: expected letters, digits and any of . _ - +")
        if len(name) > LONGEST:
            raise DataError(
                f"checkpoint name {name[:40]}...: {len(name)} letters, expected at most {LONGEST}; give --name"
            )
        return self.checkpoints / name

    def find(self, name: str | Path) -> Checkpoint:
        """Return the checkpoint called ``name``, in the folder ``name``, or on a hub (``hf:owner/name[#revision]``).

        Raises:
            CheckpointNotFound: there is no such checkpoint.
            CheckpointError: the checkpoint is damaged, or the folder holds SAEs but no checkpoint.
        """
        if not isinstance(name, (str, Path)):
            raise CheckpointError(f"checkpoint {name!r:.80}: expected its name, its folder, or hf:owner/name")
        name = str(name)
        on_hub = repository(name)
        if on_hub is not None:
            return Checkpoint.from_hub(*on_hub)
        elsewhere = Path(os.path.expanduser(name))
        for folder in (self.checkpoints / name, elsewhere):
            with suppress(OSError):  # a name too long for the file system
                settle(folder)
            if _is_checkpoint(folder):
                return Checkpoint.load(folder)
        if name and os.path.isdir(elsewhere):
            _refuse_foreign(elsewhere)
        raise CheckpointNotFound(f"{self.without(name)}, and no folder of that name holds one")

    def without(self, name: str) -> str:
        """Return a message that a checkpoint is not in the store, with the names of those that are."""
        return f"no SAE checkpoint {name!r} in the store {self.root} (available: {', '.join(self.names()) or 'none'})"

    def name_for(self, backbone: str, pretrained: str, dataset: str) -> str:
        """Return the name under which the checkpoint of a model and a data set is found and written.

        It is :func:`checkpoint_name`; for a weights file, with six digits of the file's SHA-256, so that files of one
        name have different checkpoints. If there is none with the digits, one without them, as before version 0.2, is
        used unless it is known to be for another file.
        """
        before = checkpoint_name(backbone, pretrained, dataset)
        if backbone.startswith(SCHEMES) or not os.path.isfile(pretrained):
            return before
        digest = _digest(pretrained)
        name = checkpoint_name(backbone, f"{Path(pretrained).stem}-{digest[:6]}", dataset)
        if _is_checkpoint(self.checkpoints / name) or not _is_checkpoint(self.checkpoints / before):
            return name
        with suppress(CheckpointError):  # reported when the checkpoint is read
            weights = Checkpoint.load(self.checkpoints / before).pretrained
            if os.path.isfile(weights) and _digest(weights) != digest:
                return name
        return before

    def find_for(self, backbone: str, pretrained: str, dataset: str, home: str = "") -> Checkpoint:
        """Return the checkpoint that a model uses for a data set by default: see :meth:`name_for`.

        Args:
            backbone: the model's name.
            pretrained: its weights.
            dataset: the name of the data set.
            home: the data set's path, if it is a folder, since different folders may have the same name.

        Raises:
            CheckpointNotFound: there is no such checkpoint.
            CheckpointError: the checkpoint is damaged, or was trained on another folder of that name.
        """
        saved = self.find(self.name_for(backbone, pretrained, dataset))
        if home and not saved.data.is_of(home):
            of, other = " ".join(filter(None, saved.data.folders)), saved.free_name
            raise CheckpointError(
                f"checkpoint {saved.name!r} was trained on {of}, not on {home}, which has the same name; use it "
                f"anyway as vs2:{backbone}@{saved.name}, or train one on this folder with --name {other} and use that "
                f"as vs2:{backbone}@{other}"
            )
        return saved

    def cached(self) -> Iterator[Path]:
        """Yield the folders of cached activations."""
        yield from sorted(_inside(self.activations, "[!.]*"))

    def remove(self, name: str) -> int:
        """Delete a checkpoint, and return the bytes freed. Raises CheckpointNotFound if there is no such checkpoint."""
        # A folder that somebody put here by hand may have any name.
        names = [path.name for path in self.checkpoints.glob("[!.]*")]
        folder = self.checkpoints / name if name in names else self.folder(name)
        if not folder.is_dir():
            raise CheckpointNotFound(self.without(name))
        return _delete(folder)

    def remove_cache(self) -> int:
        """Delete all cached activations and what interrupted runs left, and return the bytes freed."""
        return sum(map(_delete, list(self.cached()))) + self.remove_unfinished()

    def remove_unfinished(self, days: float = 0) -> int:
        """Delete what interrupted runs left at least ``days`` days ago, but not what a running process writes, and
        return the bytes freed."""
        freed = 0
        for left in list(self.unfinished()):
            name = left.name.removeprefix(".").rpartition(".")[0] if left.name.startswith(".") else left.name
            with suppress(DataError, OSError), alone(left.with_name(name), seconds=0):
                if time.time() - last_change(left) >= days * 86_400:
                    freed += _delete(left)
        return freed


def _refuse_foreign(folder: Path) -> None:
    """Raise CheckpointError if a folder holds SAEs but is no checkpoint; the message says how to make one of it."""
    from vs2_plugin.sae.foreign import find_foreign

    libraries = find_foreign(folder)
    if not libraries:
        return
    if (folder.parent / MANIFEST).is_file():
        raise CheckpointError(f"{folder} is part of a checkpoint; name the folder that contains it: {folder.parent}")
    first, several = next(iter(libraries)), "" if len(libraries) == 1 else f" and {len(libraries) - 1} more"
    raise CheckpointError(
        f"{folder} holds an SAE by {libraries[first]}{several}, but no checkpoint; make one from it with: "
        f"{shlex.join(['vs2', 'store', 'import', str(first)])} and the --model, --pretrained and --dataset that it is "
        "for, and a --name"
    )


def _is_checkpoint(folder: Path) -> bool:
    return os.path.isfile(folder / MANIFEST)  # false also for a name that is too long for the file system


def folder_size(*folders: Path) -> int:
    """Return the bytes in the files below ``folders``, each file once, without those that vanish meanwhile."""
    return sum(links[0].st_size for links in _links(*folders))


def last_change(folder: Path) -> float:
    """Return when ``folder`` or an entry of it was last written, in seconds of :func:`time.time`."""
    latest = 0.0
    for path in (folder, *folder.iterdir()):
        with suppress(OSError):
            latest = max(latest, path.stat().st_mtime)
    return latest


def _inside(folder: Path, pattern: str) -> Iterator[Path]:
    return (path for path in folder.glob(pattern) if path.is_dir())


def _links(*folders: Path) -> Collection[list[os.stat_result]]:
    """Return the status of each hard link, by file, below ``folders``; galleries and the cache share files."""
    links: dict[tuple[int, int], list[os.stat_result]] = {}
    for folder in folders:
        with suppress(OSError):
            for path in folder.rglob("*"):
                with suppress(OSError):
                    if path.is_file() and not path.is_symlink():
                        status = path.stat()
                        links.setdefault((status.st_dev, status.st_ino), []).append(status)
    return links.values()


def _delete(folder: Path) -> int:
    freed = sum(links[0].st_size for links in _links(folder) if len(links) >= links[0].st_nlink)
    aside = folder.with_name(f".{folder.name.removeprefix('.')}.gone") if len(folder.name) <= LONGEST else folder
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)  # in one step: no half-deleted folder is found under its name
    shutil.rmtree(aside)
    return freed
