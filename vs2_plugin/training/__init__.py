"""Training: what is asked for, the activations of the training images, the SAEs, and the checkpoint of them."""

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
              label. What is read of a list or an array is cached, and found again by its content; what is read of
              anything else is not;
            - activations ``[count, width]``, an array or a tensor: what ``model`` has where ``blocks`` says (by
              default, the CLS token after the last block). There are no images then, and no gallery of them for the
              methods that look into one. Without ``model``, the SAE is of no CLIP, and steers none.
        **settings: fields of :class:`vs2_plugin.training.request.TrainRequest`, which are the flags of the command.
            ``dataset`` is what images or activations are called.

    Returns:
        The checkpoint; a list of them where a setting has several values that make one each (``k=(32, 64)``).
        :func:`vs2_plugin.load` takes it as its ``checkpoint``.

    Raises:
        Vs2Error: what is wrong, before any image is read where that can be told.

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
    from vs2_plugin.training import run
    from vs2_plugin.training.request import TrainRequest

    named = _names(source)
    given = None if source is None or named else _given(source)
    if named:
        settings = {"dataset": named, **settings}
    elif given is not None:
        settings = {**_usual(given), **settings}
    checkpoints = run.train(TrainRequest.of(**settings), given=given)
    return checkpoints[0] if len(checkpoints) == 1 else checkpoints


def _names(source: Any) -> list[str]:
    """Return the data sets that are named; none if it is no name of any."""
    given = source if isinstance(source, (list, tuple)) else [source]
    if not all(isinstance(one, (str, os.PathLike)) for one in given):
        return []
    if isinstance(source, (list, tuple)) and all(os.path.isfile(one) for one in given):
        return []  # image files
    return [one if isinstance(one, str) else os.path.join(one, "") for one in given]  # a separator tells a folder


def _given(source: Any) -> GivenImages | GivenActivations:
    """Return images or activations.

    Raises:
        DataError: it is neither.
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
    """Return the settings that are usual of what is given."""
    from vs2_plugin.data.given import GivenImages

    if isinstance(given, GivenImages):
        return {"dataset": "images", "num_workers": 0}  # what a notebook defines, other processes may not have
    return {"dataset": "activations", "model": "", "pretrained": ""}
