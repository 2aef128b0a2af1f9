"""Images and activations that Python code or a file supplies in place of a data set."""

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
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from vs2_plugin.data.images import TrainingImages, subset
from vs2_plugin.data.pictures import as_rgb, open_picture
from vs2_plugin.errors import DataError

__all__ = ["FLOATS", "GivenActivations", "GivenImages", "Prepare", "read_activations"]

_IMAGES = (
    "expected PIL images, paths of image files, uint8 arrays [height, width, 3], or tensors as the model's transform "
    "makes them"
)
_ACTIVATIONS = "expected floating-point numbers [count, width], one row per image"
#: Accepted types of activations; torch supports no other byte order and no wider floating-point numbers.
FLOATS = tuple(map(np.dtype, ("float16", "float32", "float64")))
_CHUNK = 1 << 16
#: Name of a type in safetensors -> NumPy's type.
_TYPES = {"F16": np.float16, "F32": np.float32, "F64": np.float64}


@dataclass(frozen=True)
class GivenImages:
    """Images in a list, an array, a torch data set, or any iterable."""

    items: Any
    """Images, or tuples of image and label."""

    @property
    def is_kept(self) -> bool:
        """Whether activations of the images can be cached: only if a digest of the images costs little. A data set
        would have to be decoded for the digest, and a generator yields its images once."""
        return isinstance(self.items, (list, tuple, np.ndarray, Tensor))

    @property
    def is_once(self) -> bool:
        """Whether the images can be read only once."""
        return not hasattr(self.items, "__getitem__") and iter(self.items) is self.items

    def open(
        self, transform: Callable[[Any], Tensor], *, max_images: int | None = None, labels: bool = False
    ) -> TrainingImages:
        """Prepare the images for a tower, as :func:`vs2_plugin.data.images.open_images` does for a data set.

        Raises:
            DataError: there are no images.
        """
        prepare = Prepare(transform)
        if not hasattr(self.items, "__len__") or not hasattr(self.items, "__getitem__"):
            return TrainingImages(_Stream(self.items, prepare), max_images, None, labels)
        if len(self.items) == 0:
            raise DataError(f"there are no images; {_IMAGES}")
        fingerprint = _content(self.items) if self.is_kept else None
        source, identity = subset(Prepared(self.items, prepare), fingerprint, max_images)
        return TrainingImages(source, max_images, identity, labels)


class Prepare:
    """Prepares an image for a tower. (A class, since a closure could not be passed to loader processes.)"""

    def __init__(self, transform: Callable[[Any], Tensor]) -> None:
        self._transform = transform
        self._shape = tuple(transform(Image.new("RGB", (8, 8))).shape)

    def __call__(self, number: int, item: Any) -> Any:
        """Return an image, or a tuple that begins with an image, with the image as :meth:`image` prepares it."""
        if isinstance(item, (tuple, list)) and item:
            return (self.image(number, item[0]), *item[1:])
        return self.image(number, item)

    def image(self, number: int, item: Any) -> Tensor:
        """Return an image as a tensor ``[3, height, width]``; ``number`` names the image in messages.

        Raises:
            DataError: the item is not an image.
        """
        named = f"image number {number}"
        if isinstance(item, (str, Path)):
            item = open_picture(Path(item))
        if isinstance(item, np.ndarray) and item.dtype == np.uint8 and (item.ndim == 2 or item.shape[2:] == (3,)):
            item = Image.fromarray(item)
        if isinstance(item, Image.Image):
            return self._transform(as_rgb(item, named))
        if isinstance(item, (Tensor, np.ndarray)):
            array = _array(item, named)
            if array.dtype.kind == "f" and array.shape == self._shape:
                return torch.from_numpy(np.array(array, np.float32))
            kind = f"of shape {list(array.shape)} and type {array.dtype}"
            raise DataError(f"{named} is {kind}; {_IMAGES}, {list(self._shape)}")
        raise DataError(f"{named} is of type {type(item).__name__}; {_IMAGES}")


class Prepared(Dataset[Any]):
    """Prepared images, read by number."""

    def __init__(self, items: Sequence[Any], prepare: Prepare) -> None:
        self._items, self._prepare = items, prepare

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, number: int) -> Any:
        return self._prepare(number, self._items[number])


class _Stream(IterableDataset[Any]):
    """A stream of prepared images."""

    def __init__(self, items: Iterable[Any], prepare: Prepare) -> None:
        self._items, self._prepare = items, prepare

    def __iter__(self) -> Iterator[Any]:
        return (self._prepare(number, item) for number, item in enumerate(self._items))


def _content(items: Sequence[Any]) -> str:
    """Return a SHA-256 digest of the images' content."""
    digest = hashlib.sha256()
    for number, item in enumerate(items):
        _add(digest, item, f"image number {number}")
    return digest.hexdigest()


def _array(values: Tensor | np.ndarray, named: str) -> np.ndarray:
    """Return a tensor as an array, of float32 where NumPy lacks the tensor's type. Raises DataError for a tensor that
    holds no plain numbers."""
    if isinstance(values, np.ndarray):
        return values
    try:
        tensor = values.detach().cpu().resolve_conj().resolve_neg()
        lacking = tensor.is_floating_point() and tensor.dtype not in (torch.float16, torch.float32, torch.float64)
        return np.asarray(tensor.float() if lacking else tensor)
    except Exception as error:  # sparse, nested, quantised and meta tensors raise about everything
        raise DataError(f"{named} cannot be read as an array; expected a dense tensor that holds numbers") from error


def _add(digest: Any, item: Any, named: str) -> None:
    if isinstance(item, (tuple, list)):
        digest.update(f"{len(item)} in one".encode())
        for part in item:
            _add(digest, part, named)
    elif isinstance(item, Image.Image):
        picture = as_rgb(item, named)
        digest.update(f"{picture.mode} {picture.size}".encode() + picture.tobytes())
    elif isinstance(item, (Tensor, np.ndarray)):
        array = np.ascontiguousarray(_array(item, named))
        digest.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
    elif isinstance(item, (str, Path)) and Path(item).is_file():
        status = Path(item).stat()
        digest.update(f"{Path(item).resolve()} {status.st_size} {status.st_mtime_ns}".encode())
    else:
        digest.update(repr(item).encode())


@dataclass(frozen=True)
class GivenActivations:
    """Activations ``[count, width]`` at one site of a tower."""

    rows: np.ndarray
    """Activations as floating-point numbers; a memory-mapped array stays on disk."""
    digest: str
    """SHA-256 over type, shape and content of the activations."""

    @classmethod
    def of(cls, values: np.ndarray | Tensor) -> GivenActivations:
        """Return the activations of a matrix, after reading all of it once for checks and digest.

        Raises:
            DataError: ``values`` is not a matrix of finite floating-point numbers, or is empty.
        """
        rows = _array(values, "the tensor of activations")
        if rows.ndim != 2 or rows.dtype not in FLOATS:
            tokens = "; of [count, tokens, width] the CLS token is x[:, 0]" if rows.ndim == 3 else ""
            kind = f"of shape {list(rows.shape)} and type {rows.dtype}"
            raise DataError(f"the activations are {kind}; {_ACTIVATIONS}{tokens}")
        if 0 in rows.shape:
            raise DataError(f"the activations have the shape {list(rows.shape)}, so there are none; {_ACTIVATIONS}")
        digest = hashlib.sha256(f"{rows.dtype} {rows.shape}".encode())
        for start in range(0, len(rows), _CHUNK):
            part = np.ascontiguousarray(rows[start : start + _CHUNK])
            with np.errstate(over="ignore"):
                wrong = ~np.isfinite(part.astype(np.float32, copy=False)).all(1)
            if wrong.any():
                row = start + int(wrong.argmax())
                raise DataError(f"row {row} of the activations holds NaN or infinity, as float32; {_ACTIVATIONS}")
            digest.update(part.data)
        return cls(rows, digest.hexdigest())


def read_activations(path: Path, flag: str = "--activations") -> GivenActivations:
    """Open a file of activations, memory-mapped: ``.npy``, or ``.safetensors`` with a single matrix.

    Raises:
        DataError: the file cannot be read; ``flag`` is the command-line flag that the message names.
    """
    named = f"{flag} {str(path)!r}"
    if path.suffix not in (".npy", ".safetensors"):
        raise DataError(f"{named}: expected a file NAME.npy or NAME.safetensors")
    try:
        rows = _npy(path) if path.suffix == ".npy" else _safetensors(path)
    except DataError as error:
        raise DataError(f"{named} cannot be read: {error}") from error
    except Exception as error:  # NumPy raises about everything for a damaged header
        reason = getattr(error, "strerror", None) or f"it is not a {path.suffix[1:]} file, or damaged"
        raise DataError(f"{named} cannot be read: {reason}; {_ACTIVATIONS}") from error
    return GivenActivations.of(rows)


def _npy(path: Path) -> np.ndarray:
    """Return the array of a file; unlike ``numpy.load``, this reads no other format."""
    rows: np.ndarray = np.lib.format.open_memmap(path, mode="r")  # type: ignore[no-untyped-call]
    return rows


def _safetensors(path: Path) -> np.ndarray:
    """Return the single matrix of a file: 8 bytes with the length of the JSON header, the header, then the numbers."""
    with open(path, "rb") as file, safe_open(path, "numpy"):  # the latter raises for a header that does not fit
        length = int.from_bytes(file.read(8), "little")
        tensors = {name: facts for name, facts in json.loads(file.read(length)).items() if name != "__metadata__"}
    matrices = {name: facts for name, facts in tensors.items() if len(facts["shape"]) == 2}
    if len(matrices) != 1:
        raise DataError(f"it holds {', '.join(tensors) or 'nothing'}; expected one matrix [count, width]")
    ((name, facts),) = matrices.items()
    if facts["dtype"] not in _TYPES:
        raise DataError(f"{name} holds {facts['dtype']}; expected {', '.join(_TYPES)}")
    start = 8 + length + facts["data_offsets"][0]
    return np.memmap(path, _TYPES[facts["dtype"]], "r", start, tuple(facts["shape"]))
