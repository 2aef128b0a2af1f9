"""Images and activations that Python code, or a file, has at hand: in place of a data set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from vs2_plugin.data.images import TrainingImages, subset
from vs2_plugin.data.pictures import open_picture
from vs2_plugin.errors import DataError

__all__ = ["FLOATS", "GivenActivations", "GivenImages", "Prepare", "read_activations"]

_IMAGES = (
    "expected PIL images, paths of image files, uint8 arrays [height, width, 3], or tensors as the model's transform "
    "makes them"
)
_ACTIVATIONS = "expected floating-point numbers [count, width], one row per image"
#: Types of numbers that are taken for activations: other orders of bytes, and longer numbers, torch does not have.
FLOATS = tuple(map(np.dtype, ("float16", "float32", "float64")))
_CHUNK = 1 << 16
#: What safetensors calls the types that NumPy has.
_TYPES = {"F16": np.float16, "F32": np.float32, "F64": np.float64}


@dataclass(frozen=True)
class GivenImages:
    """Images in a list, an array, a torch data set, or anything that gives one after the other."""

    items: Any
    """Images, or tuples of image and label."""

    @property
    def is_kept(self) -> bool:
        """Whether what is read of them can be found again: only where their content can be told at no cost. A data set
        would have to be decoded for it, and a generator gives its images once."""
        return isinstance(self.items, (list, tuple, np.ndarray, Tensor))

    @property
    def is_once(self) -> bool:
        """Whether they can be read a single time."""
        return not hasattr(self.items, "__getitem__") and iter(self.items) is self.items

    def open(
        self, transform: Callable[[Any], Tensor], *, max_images: int | None = None, seed: int = 0, labels: bool = False
    ) -> TrainingImages:
        """Prepare them for a tower; as :func:`vs2_plugin.data.images.open_images` does for a data set.

        Raises:
            DataError: there are none.
        """
        prepare = Prepare(transform)
        if not hasattr(self.items, "__len__") or not hasattr(self.items, "__getitem__"):
            return TrainingImages(_Stream(self.items, prepare), max_images, None, labels)
        if len(self.items) == 0:
            raise DataError(f"there are no images; {_IMAGES}")
        fingerprint = _content(self.items) if self.is_kept else None
        source, identity = subset(Prepared(self.items, prepare), fingerprint, max_images, seed)
        return TrainingImages(source, max_images, identity, labels)


class Prepare:
    """Makes an image ready for a tower. (No closure, so that loader processes can be given one.)"""

    def __init__(self, transform: Callable[[Any], Tensor]) -> None:
        self._transform = transform
        self._shape = tuple(transform(Image.new("RGB", (8, 8))).shape)

    def __call__(self, number: int, item: Any) -> Any:
        """The item with its image prepared.

        Raises:
            DataError: it is no image.
        """
        if isinstance(item, (tuple, list)) and item:
            return (self(number, item[0]), *item[1:])
        if isinstance(item, (str, Path)):
            item = open_picture(Path(item))
        if isinstance(item, np.ndarray) and item.dtype == np.uint8 and (item.ndim == 2 or item.shape[2:] == (3,)):
            item = Image.fromarray(item)
        if isinstance(item, Image.Image):
            return self._transform(item)
        if isinstance(item, (Tensor, np.ndarray)):
            tensor = torch.as_tensor(item)
            if tensor.is_floating_point() and tuple(tensor.shape) == self._shape:
                return tensor.float()
            kind = f"of shape {list(tensor.shape)} and type {str(tensor.dtype).removeprefix('torch.')}"
            raise DataError(f"image number {number} is {kind}; {_IMAGES}, {list(self._shape)}")
        raise DataError(f"image number {number} is of type {type(item).__name__}; {_IMAGES}")


class Prepared(Dataset[Any]):
    """Images by their number."""

    def __init__(self, items: Sequence[Any], prepare: Prepare) -> None:
        self._items, self._prepare = items, prepare

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, number: int) -> Any:
        return self._prepare(number, self._items[number])


class _Stream(IterableDataset[Any]):
    """Images one after the other."""

    def __init__(self, items: Iterable[Any], prepare: Prepare) -> None:
        self._items, self._prepare = items, prepare

    def __iter__(self) -> Iterator[Any]:
        return (self._prepare(number, item) for number, item in enumerate(self._items))


def _content(items: Sequence[Any]) -> str:
    """Return what tells the images from all others."""
    digest = hashlib.sha256()
    for item in items:
        _add(digest, item)
    return digest.hexdigest()


def _add(digest: Any, item: Any) -> None:
    if isinstance(item, (tuple, list)):
        digest.update(f"{len(item)} in one".encode())
        for part in item:
            _add(digest, part)
    elif isinstance(item, Image.Image):
        digest.update(f"{item.mode} {item.size} {item.getpalette()} {item.info.get('transparency')}".encode())
        digest.update(item.tobytes())
    elif isinstance(item, (Tensor, np.ndarray)):
        array = np.ascontiguousarray(torch.as_tensor(item).float() if isinstance(item, Tensor) else item)
        digest.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
    elif isinstance(item, (str, Path)) and Path(item).is_file():
        there = Path(item).stat()
        digest.update(f"{Path(item).resolve()} {there.st_size} {there.st_mtime_ns}".encode())
    else:
        digest.update(repr(item).encode())


@dataclass(frozen=True)
class GivenActivations:
    """Activations ``[count, width]`` at one site of a tower."""

    rows: np.ndarray
    """Floating-point numbers; a memory-mapped array stays on disk."""
    digest: str
    """SHA-256 that tells of their content."""

    @classmethod
    def of(cls, values: np.ndarray | Tensor) -> GivenActivations:
        """Look at all of them once.

        Raises:
            DataError: they are no matrix of finite numbers.
        """
        rows = values
        if isinstance(rows, Tensor):
            rows = rows.detach().cpu()
            rows = (rows.float() if rows.dtype == torch.bfloat16 else rows).numpy()
        if rows.ndim != 2 or rows.dtype not in FLOATS:
            tokens = "; of [count, tokens, width] the CLS token is x[:, 0]" if rows.ndim == 3 else ""
            kind = f"of shape {list(rows.shape)} and type {rows.dtype}"
            raise DataError(f"the activations are {kind}; {_ACTIVATIONS}{tokens}")
        if 0 in rows.shape:
            raise DataError(f"the activations have the shape {list(rows.shape)}, so there are none; {_ACTIVATIONS}")
        digest = hashlib.sha256(f"{rows.dtype} {rows.shape}".encode())
        for start in range(0, len(rows), _CHUNK):
            part = np.ascontiguousarray(rows[start : start + _CHUNK])
            wrong = ~np.isfinite(part).all(1)
            if wrong.any():
                raise DataError(f"row {start + int(wrong.argmax())} of the activations holds NaN or infinity")
            digest.update(part.data)
        return cls(rows, digest.hexdigest())


def read_activations(path: Path, flag: str = "--activations") -> GivenActivations:
    """Open a file of activations, memory-mapped: ``.npy``, or ``.safetensors`` with a single matrix. ``flag`` names it.

    Raises:
        DataError: there is none that can be read.
    """
    try:
        if path.suffix == ".npy":
            rows = np.load(path, mmap_mode="r")
        elif path.suffix == ".safetensors":
            rows = _safetensors(path)
        else:
            raise DataError(f"{flag} {str(path)!r}: expected a file NAME.npy or NAME.safetensors")
    except (OSError, ValueError, EOFError, LookupError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{flag} {str(path)!r} cannot be read: {reason}") from error
    return GivenActivations.of(rows)


def _safetensors(path: Path) -> np.ndarray:
    """Return the matrix of a file: eight bytes tell how long the description after them is; the numbers follow."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("it is not a safetensors file")
        tensors = {name: facts for name, facts in json.loads(file.read(length)).items() if name != "__metadata__"}
    matrices = {name: facts for name, facts in tensors.items() if len(facts["shape"]) == 2}
    if len(matrices) != 1:
        raise ValueError(f"it holds {', '.join(tensors) or 'nothing'}; expected one matrix [count, width]")
    ((name, facts),) = matrices.items()
    if facts["dtype"] not in _TYPES:
        raise ValueError(f"{name} holds {facts['dtype']}; expected {', '.join(_TYPES)}")
    start = 8 + length + facts["data_offsets"][0]
    return np.memmap(path, _TYPES[facts["dtype"]], "r", start, tuple(facts["shape"]))
