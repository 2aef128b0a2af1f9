"""Training: what is asked for, the activations of the training images, the SAEs, and the checkpoint of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vs2_plugin.checkpoint.checkpoint import Checkpoint

__all__ = ["train"]


def train(dataset: str | tuple[str, ...] | list[str], **settings: Any) -> Checkpoint | list[Checkpoint]:
    """Train SAEs on the training images of a data set, as ``vs2-train-sae`` does, and return their checkpoint.

    Args:
        dataset: a data set that clip_benchmark knows, or ``wds/NAME`` for webdataset shards; or several.
        **settings: fields of :class:`vs2_plugin.training.request.TrainRequest`, which are the flags of the command.

    Returns:
        The checkpoint; a list of them where a setting has several values that make one each (``k=(32, 64)``).

    Raises:
        Vs2Error: what is wrong, before any image is read where that can be told.
    """
    from vs2_plugin.training import run
    from vs2_plugin.training.request import TrainRequest

    checkpoints = run.train(TrainRequest(**{"dataset": dataset, **settings}))
    return checkpoints[0] if len(checkpoints) == 1 else checkpoints
