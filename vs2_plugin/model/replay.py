"""The forward pass of a steered tower on a GPU as a CUDA graph: its hundreds of small kernels take longer to tell than
to do."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from vs2_plugin.clip.edits import Edit, is_hooked
from vs2_plugin.devices import Replayed, to_processor
from vs2_plugin.steering.batch import Batch
from vs2_plugin.steering.tally import Counted, counted
from vs2_plugin.text import sentence_of

__all__ = ["Replays", "can_replay"]

_LOG = logging.getLogger(__name__)
#: Shapes of images that are told apart: a data set has two, its batches and the last one.
_MOST = 4

#: After so many batches in a row that have to be asked of the steering itself, all are.
_REFUSED = 3

#: What weights are; others, quantized ones say, may lie nowhere.
_PLAIN = (Tensor, nn.Parameter)

#: Ways to compute attention, each of which may be switched off.
_ATTENTION = ("flash", "mem_efficient", "math", "cudnn")

#: Gives steered embeddings ``[batch, embed_dim]`` of the images at hand.
Encode = Callable[[Batch], Tensor]


def can_replay(images: Tensor) -> bool:
    """Whether what is done to a tensor could be replayed: on a GPU, where nothing looks at each operation."""
    if type(images) is not Tensor or not images.is_cuda or torch.is_grad_enabled() or is_in_torch_dispatch_mode():
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return False
    anywhere = (getattr(hooks_of_all, f"_global_forward_{kind}", None) for kind in ("hooks", "pre_hooks"))
    return not any(anywhere) and not torch.cuda.is_current_stream_capturing()


class Replays:
    """A tower's forward pass, as it was told for each shape of images. It goes on with the tensors that it was told:
    other weights of the tower it finds by itself, for others :meth:`forget`. A copy of it has been told nothing."""

    def __init__(self) -> None:
        self._told: dict[Hashable, _Told | None] = {}
        self._parts: _Parts | None = None
        #: Memory to work in, by stream: no two passes of one stream are made at a time.
        self._rooms: dict[int, Any] = {}

    def __reduce__(self) -> tuple[type[Replays], tuple[()]]:
        return Replays, ()

    def forget(self) -> None:
        """Be told anew."""
        self._parts = None
        self._told.clear()
        self._rooms.clear()

    def __call__(self, tower: nn.Module, encode: Encode, images: Tensor) -> Tensor | None:
        """What ``encode`` gives of images, by way of this tower. None where that has to be asked of ``encode`` itself:
        it has hooks, which are to be called each time, trains, or asks more than a GPU knows."""
        try:
            return self._embeddings(tower, encode, images)
        except Exception as error:  # if it is no matter of graphs, encoding itself will raise it
            _LOG.info("the model is launched on the GPU anew for each batch: %s", sentence_of(error))
            return None

    def _embeddings(self, tower: nn.Module, encode: Encode, images: Tensor) -> Tensor | None:
        if self._parts is None or self._parts.tower is not tower or self._parts.have_moved():
            self.forget()
            self._parts = _Parts.of(tower)
            if self._parts is None:
                return None
        stream = torch.cuda.current_stream(images.device).cuda_stream
        key = stream, _setting(images)
        if key not in self._told:
            room = self._rooms.get(stream) or torch.cuda.graph_pool_handle()
            self._rooms[stream] = room
            self._told[key] = _Told(images, room) if len(self._told) < _MOST else None
        told, embeddings, useful = self._told[key], None, False
        if told is None:
            return None
        try:
            embeddings = told(encode, images, self._are_the_same)
            useful = told.refused < _REFUSED
        finally:
            if not useful and key in self._told:
                self._told[key] = None
        return embeddings

    def _are_the_same(self) -> bool:
        same = self._parts is not None and self._parts.are_the_same()
        if not same:
            self.forget()
        return same


class _Parts:
    """What a forward pass is of: modules, and their weights, which stay where they are as long as this does."""

    def __init__(self, tower: nn.Module, found: list[object], tensors: list[Tensor]) -> None:
        self.tower, self._found, self._tensors = tower, found, tensors
        self._places = self._where()

    @classmethod
    def of(cls, tower: nn.Module) -> _Parts | None:
        """What a pass through a tower is of; None if it is to be made each time."""
        found = _parts_of(tower)
        tensors = [part for part in found or () if isinstance(part, Tensor)]
        return cls(tower, found, tensors) if found and all(type(one) in _PLAIN for one in tensors) else None

    def _where(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self._tensors]

    def have_moved(self) -> bool:
        """Whether weights are elsewhere now: to be asked before a GPU looks for them."""
        return self._where() != self._places

    def are_the_same(self) -> bool:
        """Whether it would be the same forward pass now, and none that is to be made each time."""
        found = _parts_of(self.tower)
        return found is not None and len(found) == len(self._found) and all(map(is_, found, self._found))


def _parts_of(module: nn.Module) -> list[object] | None:
    """Modules, their weights, and all else that is an attribute of theirs, which is compared by identity. None where
    others' hooks are called in it, or it is one of training. It is looked up for every batch, hence by dictionaries."""
    own = vars(module)
    if own.get("training", True) or is_hooked(module):  # compiled modules have no such entry
        return None
    parts = [module, *own["_parameters"].values(), *own["_buffers"].values()]
    if not isinstance(module, Edit):  # which keeps what changes, and is asked by is_hooked
        parts += own.values()
        parts += getattr(own.get("steering"), "__dict__", {}).values()  # one that is no module
    for child in own["_modules"].values():
        if child is not None:
            inner = _parts_of(child)
            if inner is None:
                return None
            parts += inner
    return parts


def _setting(images: Tensor) -> tuple[Hashable, ...]:
    """What decides which kernels run."""
    device = images.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    kinds = [torch.backends.cuda.matmul, getattr(torch.backends.cudnn, "conv", torch.backends.cudnn)]
    # Of torch 2.9 and later the second raises where the first was set.
    precisions = [kind.fp32_precision if hasattr(kind, "fp32_precision") else kind.allow_tf32 for kind in kinds]
    attention = [getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in _ATTENTION]
    same = torch.are_deterministic_algorithms_enabled()
    return images.shape, images.stride(), images.dtype, images.device, autocast, *precisions, *attention, same


class _Told:
    """The same for one shape."""

    def __init__(self, images: Tensor, room: Any) -> None:
        with torch.inference_mode(False):
            self._images = torch.empty_like(images)
        self._embeddings, self._sums = self._images, torch.empty(0)
        self._counted: list[Counted] = []
        #: Each waits for, and gives, whether what was assumed is wrong.
        self._answers: list[Callable[[], Tensor]] = []
        self._replayed, self._batches = Replayed(room), 0
        #: Batches in a row of which something that was assumed was wrong.
        self.refused = 0

    def _encode(self, encode: Encode) -> None:
        batch = Batch(self._images)
        batch.assume = self._assume
        device = self._images.device.type
        # Weights that autocast has cast before are not there when the graph is replayed.
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        with torch.autocast(device, dtype, enabled, cache_enabled=False), counted() as told:
            self._embeddings = encode(batch)
            self._counted = told
            totals = [total for _, sums, _ in told for total in sums.values()]
            self._sums = torch.stack(totals) if totals else torch.empty(0)

    def _assume(self, of_images: Tensor) -> None:
        wrong, answers = of_images.any(), self._answers
        self._replayed.pause(lambda: answers.append(to_processor(wrong)))

    def __call__(self, encode: Encode, images: Tensor, same: Callable[[], bool]) -> Tensor | None:
        """``same``: whether it still is what it was told; a GPU that works by itself is not kept waiting for that."""
        # To leave the inference mode asks for gradients.
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device_of(images):
            works_by_itself = self._replayed.is_told
            if not works_by_itself and not same():
                return None
            self._images.copy_(images)
            self._answers.clear()
            self._batches += 1
            with _without_waits() if self._batches == 2 else nullcontext():  # at first, things are set up
                self._replayed(partial(self._encode, encode))
            embeddings, totals = self._embeddings.clone(), self._sums.clone()  # the next batch overwrites them
            if works_by_itself and not same():
                return None
            wrong = any(answer() for answer in self._answers)  # asked in between, they wait for no more than that
            self.refused = self.refused + 1 if wrong else 0
            if wrong:
                return None
            numbers = iter(totals.unbind())
            for tally, sums, count in self._counted:
                tally.keep(dict(zip(sums, numbers, strict=False)), count)
            return embeddings


@contextmanager
def _without_waits() -> Iterator[None]:
    """Raise RuntimeError if the processor waited for the GPU in the block: as a graph that fails, and not without
    traces. Waits of other threads count too, as nobody can tell."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
    if any("called a synchronizing CUDA operation" in str(one.message) for one in said):
        raise RuntimeError("something in it waits for the GPU")
