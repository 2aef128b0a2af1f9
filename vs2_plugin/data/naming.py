"""Data sets, as a command names them: one of clip_benchmark's, webdataset shards, or a folder of images.

    cifar100, vtab/pets                      of clip_benchmark
    wds/mine                                 shards in clip_benchmark's layout, in --dataset_root
    shards/train-{0000..0009}.tar            listed shards: wds/shards
    photos/, ./photos, /data/photos          a folder of images, whose name is folder/photos
    folder/photos, folder                    the same, in --dataset_root

No heavy imports.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from vs2_plugin.errors import DataError, SettingError

__all__ = ["DataSet"]

_FOLDER, _SHARDS, _LISTED = "folder/", "wds/", ".tar"
#: What a name of clip_benchmark with a slash begins with.
_STOCK = ("vtab/", "tfds/", "sugar_crepe/")


@dataclass(frozen=True)
class DataSet:
    """A data set: what it is called in results, checkpoints and reports, and where it lies."""

    name: str
    """``cifar100``, ``wds/mine``, ``folder/photos``."""
    root: str
    """Its folder; for shards also a URL, or a list of them with braces. Nothing is left to be filled in."""

    @classmethod
    def of(cls, dataset: str | os.PathLike[str], dataset_root: str | os.PathLike[str] = "root") -> DataSet:
        """Return the data set that ``--dataset`` and ``--dataset_root`` name.

        Args:
            dataset: a name, or the path of a folder, which a separator tells from a name.
            dataset_root: its folder where ``dataset`` is no path; ``{dataset}`` and ``{dataset_cleaned}`` are filled
                in.

        Raises:
            SettingError: a field that cannot be filled in.
            DataError: a path that is no folder.

        >>> DataSet.of("wds/cub200", "root/{dataset}"), DataSet.of("vtab/pets", "{dataset_cleaned}").root
        (DataSet(name='wds/cub200', root='root/cub200'), 'vtab-pets')
        >>> DataSet.of("shards/train-{0000..0009}.tar").name
        'wds/shards'
        """
        path = os.fspath(dataset)
        if cls.is_path(dataset):
            path = os.path.expanduser(path.removeprefix("file:"))  # as webdataset calls a file
            if path.endswith(_LISTED):
                return cls(_SHARDS + _last(path.rpartition("/")[0]), path)
            return cls(_FOLDER + _last(path), _folder(path, "--dataset"))
        root = _filled_in(os.fspath(dataset_root), path)
        if path.startswith(_FOLDER) or path == _FOLDER.rstrip("/"):
            return _in_root(path.removeprefix(_FOLDER.rstrip("/")).strip("/"), _folder(root, "--dataset_root"))
        return cls(path, root)

    @staticmethod
    def is_path(dataset: str | os.PathLike[str]) -> bool:
        """Tell whether ``--dataset`` is the path of a folder or of shards, and no name.

        >>> [DataSet.is_path(text) for text in ("photos/", "./photos", "photos", "vtab/pets", "x-{0..9}.tar")]
        [True, True, False, False, True]
        """
        path = os.fspath(dataset)
        if path.startswith((_FOLDER, _SHARDS, *_STOCK)):
            return False
        separated = "/" in path or os.sep in path or path in (os.curdir, os.pardir)
        return separated or path.endswith(_LISTED) or isinstance(dataset, os.PathLike)

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of images."""
        return self.name.startswith(_FOLDER)

    @property
    def is_shards(self) -> bool:
        """Whether it is webdataset shards."""
        return self.name.startswith(_SHARDS)

    @property
    def is_listed(self) -> bool:
        """Whether ``root`` lists its shards, one by one or with braces."""
        return self.is_shards and self.root.endswith(_LISTED)

    @property
    def home(self) -> str:
        """The folder, as an absolute path or a URL, by which it is told from others of its name; an empty word for what
        is found by its name alone."""
        if not self.is_folder and not self.is_listed:
            return ""
        place = os.path.dirname(self.root) if self.is_listed else self.root
        return place if "://" in place else os.path.abspath(place)

    @property
    def short(self) -> str:
        """The name without what tells the kind, as clip_benchmark fills it in.

        >>> DataSet("wds/mine", "root").short, DataSet("vtab/pets", "root").short
        ('mine', 'vtab/pets')
        """
        return self.name.removeprefix(_SHARDS)

    @property
    def template(self) -> str:
        """The root as ``--dataset_root``, of which nothing is filled in."""
        return self.root.replace("{", "{{").replace("}", "}}")

    @property
    def words(self) -> list[str]:
        """What names it on a command line, beside its ``--dataset_root`` if that is needed."""
        if self.is_folder:
            return ["--dataset", self.root if self.root.endswith(os.sep) else self.root + os.sep]
        return ["--dataset", self.root if self.is_listed else self.name]


def _in_root(name: str, root: str) -> DataSet:
    """Return the folder of that name, if it has one, in a ``--dataset_root``: this itself, or one in it."""
    if name and name != _last(root):
        inner = os.path.join(root, name)
        if not os.path.isdir(inner):
            raise DataError(
                f"--dataset {_FOLDER}{name} --dataset_root {root!r}: that folder is not called {name} and holds no "
                f"folder of that name; expected the path of a folder, such as --dataset {root}/"
            )
        root = inner
    return DataSet(_FOLDER + _last(root), root)


def _filled_in(root: str, name: str) -> str:
    """Return a ``--dataset_root``, as clip_benchmark fills it in."""
    name = name.removeprefix(_SHARDS).removeprefix(_FOLDER)
    try:
        return root.format(dataset=name, dataset_cleaned=name.replace("/", "-"))
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise SettingError(
            f"--dataset_root {root!r}: only {{dataset}} and {{dataset_cleaned}} can be filled in ({error})"
        ) from None


def _folder(path: str, flag: str) -> str:
    """Return the path of a folder without separators at its end. Raises DataError if it is none."""
    if not os.path.isdir(path):
        what = "is a file" if os.path.exists(path) else "is not a folder"
        raise DataError(f"{flag} {path!r} {what}; expected a folder of images, such as photos/, or a data set's name")
    return path.rstrip("/" + os.sep) or os.sep


def _last(path: str) -> str:
    """Return the name of a folder, or of what is behind a URL, whatever way its path says it."""
    whole = path.rstrip("/") if "://" in path else os.path.abspath(path)
    return whole.rpartition("/")[2] or os.path.basename(whole) or "root"
