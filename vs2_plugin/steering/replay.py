"""Steerings on a GPU as CUDA graphs: their forty small kernels (VS2++ 120) take longer to tell than to do."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from functools import partial

import torch
from torch import Tensor

from vs2_plugin.devices import Replayed, to_processor
from vs2_plugin.steering.batch import Batch
from vs2_plugin.steering.tally import Counted, counted
from vs2_plugin.text import sentence_of

__all__ = ["Replays", "can_replay"]

_LOG = logging.getLogger(__name__)
#: Shapes of activations that are told apart: a data set has two, its batches and the last one.
_MOST = 4

#: Gives steered activations, float32 ``[batch, d]``, of such and of the images at hand.
Steer = Callable[[Tensor, Batch], Tensor]


def can_replay(x: Tensor) -> bool:
    """Whether what is done to a tensor could be replayed."""
    if not x.is_cuda or torch.compiler.is_compiling():
        return False
    return not (torch.is_grad_enabled() or torch.cuda.is_current_stream_capturing())


class Replays:
    """One steering, as it was told for each shape of activations. It goes on with the tensors that it was told:
    :meth:`forget` when others take their place. A copy of it has been told nothing."""

    def __init__(self) -> None:
        self._told: dict[Hashable, _Told | None] = {}

    def __reduce__(self) -> tuple[type[Replays], tuple[()]]:
        return Replays, ()

    def forget(self) -> None:
        """Be told anew."""
        self._told.clear()

    def __call__(self, steer: Steer, x: Tensor) -> Tensor | None:
        """What ``steer`` gives for ``[batch, d]``, in the dtype of x; the next call overwrites it. None where that has
        to be asked of ``steer`` itself."""
        stream, tf32 = torch.cuda.current_stream(x.device), torch.backends.cuda.matmul.allow_tf32
        key = x.shape, x.dtype, x.device, stream.cuda_stream, tf32
        if key not in self._told:
            self._told[key] = _Told(steer, x) if len(self._told) < _MOST else None
        told = self._told[key]
        try:
            return None if told is None else told(x)
        except Exception as error:  # if it is no matter of graphs, the steering itself will raise it
            _LOG.info("steering is told to the GPU anew for each batch: %s", sentence_of(error))
            self._told[key] = None
            return None


class _Told:
    """The same for one shape."""

    def __init__(self, steer: Steer, x: Tensor) -> None:
        with torch.inference_mode(False):
            self._given = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        self._steered, self._sums = self._given, torch.empty(0)
        self._counted: list[Counted] = []
        #: Each waits for, and gives, whether what was assumed is wrong.
        self._answers: list[Callable[[], Tensor]] = []
        self._replayed = Replayed(partial(self._steer, steer))

    def _steer(self, steer: Steer) -> None:
        batch = Batch()
        batch.assume = self._assume
        with torch.autocast(self._given.device.type, enabled=False), counted() as told:
            self._steered = steer(self._given.float(), batch).to(self._given.dtype)
            self._counted = told
            totals = [total for _, sums, _ in told for total in sums.values()]
            self._sums = torch.stack(totals) if totals else torch.empty(0)

    def _assume(self, of_images: Tensor) -> None:
        wrong = of_images.any()
        self._replayed.pause(lambda: self._answers.append(to_processor(wrong)))

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor | None:
        with torch.inference_mode(False):
            self._given.copy_(x)
            self._answers.clear()
            self._replayed()
            if any(answer() for answer in self._answers):  # asked in between, they wait for no more than that
                return None
            numbers = iter(self._sums.clone().unbind())
            for tally, sums, count in self._counted:
                tally.keep(dict(zip(sums, numbers, strict=False)), count)
            return self._steered
