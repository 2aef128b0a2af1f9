"""Training: the request, the activations of the training images, the SAEs, and their checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from vs2_plugin.checkpoint.checkpoint import Checkpoint
    from vs2_plugin.data.given import GivenActivations, GivenImages

__all__ = ["train"]


def train(
    source: str | os.PathLike[str] | Iterable[Any] | np.ndarray | Tensor | None = None, /, **settings: Any
) -> Checkpoint | list[Checkpoint]:
    """Train SAEs on images, without labels, as ``vs2-train-sae`` does, and return their checkpoint.

    Args:
        source: what to train on:

            - the name of a data set or a folder of images (``photos/``), as ``--dataset`` takes it, or several;
            - images: PIL images, paths of image files, uint8 arrays ``[height, width, 3]`` or tensors as the model's
              transform makes them, in a list, a torch data set, a generator, …; each may stand in a tuple with its
              label. Activations of a list or an array are cached, and found again by the images' content; those of
              other sources are not cached;
            - activations ``[count, width]``, an array or a tensor: those of ``model`` at ``blocks`` (by default, the
              CLS token after the last block). Without images there is no gallery, which some methods need. Without
              ``model``, the SAE belongs to no CLIP model and cannot steer one.
        **settings: fields of :class:`vs2_plugin.training.request.TrainRequest`, which are the flags of the command.
            ``dataset`` names the images or activations that are given.

    Returns:
        The checkpoint; a list of checkpoints if a setting has several values, one per value (``k=(32, 64)``).
        :func:`vs2_plugin.load` accepts a checkpoint as its argument ``checkpoint``.

    Raises:
        Vs2Error: the training cannot be done; raised before any image is read, where possible.

    Example::

        checkpoint = vs2_plugin.train("cifar100", model="ViT-B-32", pretrained="openai", k=32)
        checkpoint = vs2_plugin.train(images, model="ViT-B-32", pretrained="openai", name="mine")

        >>> import tempfile
        >>> import numpy as np
        >>> import vs2_plugin
        >>> x = np.random.default_rng(0).normal(size=(100, 16))
        >>> checkpoint = vs2_plugin.train(x, k=4, samples=1000, quiet=True, store=tempfile.mkdtemp())
        >>> checkpoint.name, checkpoint.data.images, checkpoint.sites[0].training["k"]
        ('activations', 100, 4)
    """
    from vs2_plugin.errors import SettingError
    from vs2_plugin.training import run
    from vs2_plugin.training.request import TrainRequest

    names = _names(source)
    data = None if source is None or names else _given(source)
    if names:
        settings = {"dataset": names, **settings}
    elif data is not None:
        if settings.get("activations") is not None:
            raise SettingError("train() got both a source and activations=FILE; expected one of the two")
        settings = {**_usual(data), **settings}
    checkpoints = run.train(TrainRequest.of(**settings), given=data)
    return checkpoints[0] if len(checkpoints) == 1 else checkpoints


def _names(source: Any) -> list[str]:
    """Return the names of data sets that ``source`` holds; an empty list if it holds anything else."""
    words = source if isinstance(source, (list, tuple)) else [source]
    if not all(isinstance(word, (str, os.PathLike)) for word in words):
        return []
    if isinstance(source, (list, tuple)) and all(os.path.isfile(word) for word in words):
        return []  # image files
    return [word if isinstance(word, str) else os.path.join(word, "") for word in words]  # its separator marks a folder


def _given(source: Any) -> GivenImages | GivenActivations:
    """Return ``source`` as images or activations.

    Raises:
        DataError: ``source`` is neither.
    """
    import numpy as np
    from torch import Tensor

    from vs2_plugin.data.given import GivenActivations, GivenImages
    from vs2_plugin.errors import DataError

    if isinstance(source, (np.ndarray, Tensor)) and source.ndim != 4:
        return GivenActivations.of(source)
    if isinstance(source, dict) or not (hasattr(source, "__iter__") or hasattr(source, "__getitem__")):
        raise DataError(
            f"train() got {source!r:.80}; expected the name of a data set, a folder, images in a list, or activations "
            "[count, width]"
        )
    first = source[0] if isinstance(source, (list, tuple)) and source else None
    if isinstance(first, (int, float)) or (isinstance(first, list) and all(isinstance(n, (int, float)) for n in first)):
        raise DataError("train() got a list of numbers; expected activations as an array, as numpy.array() makes it")
    return GivenImages(source)


def _usual(given: GivenImages | GivenActivations) -> dict[str, Any]:
    """Return the default settings for images, or for activations."""
    from vs2_plugin.data.given import GivenImages

    if isinstance(given, GivenImages):
        return {"dataset": "images", "num_workers": 0}  # loader processes may lack what a notebook defines
    return {"dataset": "activations", "model": "", "pretrained": ""}
