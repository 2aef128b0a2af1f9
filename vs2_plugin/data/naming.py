"""Names of data sets on the command line: one of clip_benchmark's, webdataset shards, or a folder of images.

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
#: Prefixes of clip_benchmark's own names with a slash.
_STOCK = ("vtab/", "tfds/", "sugar_crepe/")


@dataclass(frozen=True)
class DataSet:
    """A data set: its name in results, checkpoints and reports, and its location."""

    name: str
    """``cifar100``, ``wds/mine``, ``folder/photos``."""
    root: str
    """Folder of the data set; for shards also a URL, or a list with braces. No ``{dataset}`` is left to fill in."""

    @classmethod
    def of(cls, dataset: str | os.PathLike[str], dataset_root: str | os.PathLike[str] = "root") -> DataSet:
        """Return the data set that ``--dataset`` and ``--dataset_root`` name.

        Args:
            dataset: a name, or the path of a folder, which a separator tells from a name.
            dataset_root: folder of the data set if ``dataset`` is a name; ``{dataset}`` and ``{dataset_cleaned}`` are
                filled in.

        Raises:
            SettingError: ``dataset_root`` has another field in braces.
            DataError: the path is not a folder, or ``dataset`` is neither a name nor a path.

        >>> DataSet.of("wds/cub200", "root/{dataset}"), DataSet.of("vtab/pets", "{dataset_cleaned}").root
        (DataSet(name='wds/cub200', root='root/cub200'), 'vtab-pets')
        >>> DataSet.of("shards/train-{0000..0009}.tar").name
        'wds/shards'
        """
        if not isinstance(dataset, (str, os.PathLike)):
            raise DataError(f"the data set is {dataset!r:.80}; expected its name, or the path of a folder")
        path = os.fspath(dataset)
        if cls.is_path(dataset):
            path = os.path.expanduser(path.removeprefix("file:"))  # webdataset's prefix of local files
            if path.endswith(_LISTED):
                return cls(_SHARDS + _last(path.rpartition("/")[0]), path)
            return cls(_FOLDER + _last(path), _folder(path, "--dataset"))
        root = _filled_in(os.fspath(dataset_root), path)
        if path.startswith(_FOLDER) or path == _FOLDER.rstrip("/"):
            return _in_root(path.removeprefix(_FOLDER.rstrip("/")).strip("/"), _folder(root, "--dataset_root"))
        return cls(path, root)

    @staticmethod
    def is_path(dataset: str | os.PathLike[str]) -> bool:
        """Tell whether ``--dataset`` is the path of a folder or of shards, not a name.

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
        """Whether the data set is a folder of images."""
        return self.name.startswith(_FOLDER)

    @property
    def is_shards(self) -> bool:
        """Whether the data set consists of webdataset shards."""
        return self.name.startswith(_SHARDS)

    @property
    def is_listed(self) -> bool:
        """Whether ``root`` is a list of shards: a single one, or several with braces."""
        return self.is_shards and self.root.endswith(_LISTED)

    @property
    def home(self) -> str:
        """Folder, as an absolute path or a URL, that tells this data set from others of its name; empty for a data set
        that is found by name."""
        if not self.is_folder and not self.is_listed:
            return ""
        place = os.path.dirname(self.root) if self.is_listed else self.root
        return place if "://" in place else os.path.abspath(place)

    @property
    def template(self) -> str:
        """Root with doubled braces: a ``--dataset_root`` in which clip_benchmark fills in nothing."""
        return self.root.replace("{", "{{").replace("}", "}}")

    @property
    def words(self) -> list[str]:
        """Arguments that name the data set on a command line, where needed together with its ``--dataset_root``."""
        if self.is_folder:
            return ["--dataset", self.root if self.root.endswith(os.sep) else self.root + os.sep]
        return ["--dataset", self.root if self.is_listed else self.name]


def _in_root(name: str, root: str) -> DataSet:
    """Return the data set ``folder/NAME`` of a ``--dataset_root``: the root itself, or its sub-folder of that name."""
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
    """Return a ``--dataset_root`` with its fields filled in as clip_benchmark does."""
    name = name.removeprefix(_SHARDS).removeprefix(_FOLDER)
    try:
        return root.format(dataset=name, dataset_cleaned=name.replace("/", "-"))
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        raise SettingError(
            f"--dataset_root {root!r}: only {{dataset}} and {{dataset_cleaned}} can be filled in ({error})"
        ) from None


def _folder(path: str, flag: str) -> str:
    """Return the path of a folder without separators at its end. Raises DataError if it is not a folder."""
    if not os.path.isdir(path):
        what = "is a file" if os.path.exists(path) else "is not a folder"
        raise DataError(f"{flag} {path!r} {what}; expected a folder of images, such as photos/, or a data set's name")
    return path.rstrip("/" + os.sep) or os.sep


def _last(path: str) -> str:
    """Return the last component of a path, which may be relative (``.``, ``..``), or of a URL."""
    whole = path.rstrip("/") if "://" in path else os.path.abspath(path)
    return whole.rpartition("/")[2] or os.path.basename(whole) or "root"
