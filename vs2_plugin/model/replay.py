"""Replays the forward pass of a steered tower on a GPU as a CUDA graph, since launching its hundreds of small kernels
takes longer than running them."""

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
from vs2_plugin.devices import Replayed, process_wide, to_processor
from vs2_plugin.steering.batch import Batch
from vs2_plugin.steering.tally import Counted, counted
from vs2_plugin.text import sentence_of

__all__ = ["Replays", "can_replay"]

_LOG = logging.getLogger(__name__)
#: Most graphs that are kept, one for each shape of images: a data set has two, full batches and the last one.
_MOST = 4

#: After so many batches in a row whose assumptions were wrong, a shape is not replayed any more.
_REFUSED = 3

#: Types of weights that have a memory address; others, such as quantized ones, may have none.
_PLAIN = (Tensor, nn.Parameter)

#: Implementations of attention, each of which torch can switch off.
_ATTENTION = ("flash", "mem_efficient", "math", "cudnn")

#: Computes the steered embeddings ``[batch, embed_dim]`` of a batch of images.
Encode = Callable[[Batch], Tensor]


def can_replay(images: Tensor) -> bool:
    """Return whether work on ``images`` could be replayed: they are on a GPU, and nothing observes each operation."""
    if type(images) is not Tensor or not images.is_cuda or torch.is_grad_enabled() or is_in_torch_dispatch_mode():
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return False
    anywhere = (getattr(hooks_of_all, f"_global_forward_{kind}", None) for kind in ("hooks", "pre_hooks"))
    return not any(anywhere) and not torch.cuda.is_current_stream_capturing()


class Replays:
    """CUDA graphs of a tower's forward pass, one for each shape of images. A graph reads the tensors of its capture:
    replaced weights of the tower are noticed, for other tensors call :meth:`forget`. A copy starts without graphs."""

    def __init__(self) -> None:
        self._told: dict[Hashable, _Told | None] = {}
        self._parts: _Parts | None = None
        #: Stream -> memory pool of its graphs, which can share one since passes of one stream never overlap.
        self._rooms: dict[int, Any] = {}

    def __reduce__(self) -> tuple[type[Replays], tuple[()]]:
        return Replays, ()

    def forget(self) -> None:
        """Drop all graphs; they are captured anew when they are needed."""
        self._parts = None
        self._told.clear()
        self._rooms.clear()

    def __call__(self, tower: nn.Module, encode: Encode, images: Tensor) -> Tensor | None:
        """Return the embeddings that ``encode`` gives by this tower; None where the caller has to run ``encode``: the
        tower has hooks, which must run each time, is in training mode, or needs the CPU in between."""
        try:
            return self._embeddings(tower, encode, images)
        except Exception as error:  # if graphs are not the cause, the caller's encode raises it
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
            pool = self._rooms.get(stream) or torch.cuda.graph_pool_handle()
            self._rooms[stream] = pool
            self._told[key] = _Told(images, pool) if len(self._told) < _MOST else None
        graph, embeddings, useful = self._told[key], None, False
        if graph is None:
            return None
        try:
            embeddings = graph(encode, images, self._are_the_same)
            useful = graph.refused < _REFUSED
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
    """The modules and weights that a forward pass uses, held so that their memory is not given to other tensors."""

    def __init__(self, tower: nn.Module, found: list[object], tensors: list[Tensor]) -> None:
        self.tower, self._found, self._tensors = tower, found, tensors
        self._places, self._layouts = self._where(), self._laid_out()

    @classmethod
    def of(cls, tower: nn.Module) -> _Parts | None:
        """Return the parts of a tower's forward pass; None if the pass must not be replayed."""
        parts = _parts_of(tower)
        tensors = [part for part in parts or () if isinstance(part, Tensor)]
        return cls(tower, parts, tensors) if parts and all(type(tensor) in _PLAIN for tensor in tensors) else None

    def _where(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self._tensors]

    def _laid_out(self) -> list[Hashable]:
        return [(tensor.dtype, tensor.shape, tensor.stride()) for tensor in self._tensors]

    def have_moved(self) -> bool:
        """Return whether a weight has another address now; to be checked before a GPU reads the old address."""
        return self._where() != self._places

    def are_the_same(self) -> bool:
        """Return whether the tower still has these parts and may still be replayed."""
        parts = _parts_of(self.tower)
        same = parts is not None and len(parts) == len(self._found) and all(map(is_, parts, self._found))
        return same and self._laid_out() == self._layouts


def _parts_of(module: nn.Module) -> list[object] | None:
    """Return the modules under a module, with their weights and all other attribute values, to be compared by identity.
    None if any has hooks or is in training mode. Reads ``__dict__`` only, for speed, since every batch calls this."""
    own = vars(module)
    if own.get("training", True) or is_hooked(module):  # compiled modules have no entry "training"
        return None
    parts = [module, *own["_parameters"].values(), *own["_buffers"].values()]
    if not isinstance(module, Edit):  # an Edit's attributes change; is_hooked checks them
        parts += own.values()
        parts += getattr(own.get("steering"), "__dict__", {}).values()  # of a steering that is no module
    for child in own["_modules"].values():
        if child is not None:
            inner = _parts_of(child)
            if inner is None:
                return None
            parts += inner
    return parts


def _setting(images: Tensor) -> tuple[Hashable, ...]:
    """Return the settings that a graph depends on and that users change: layout of the images, autocast, precision,
    attention and determinism. Others, such as cuDNN's choice of kernels, stay as they were at the capture."""
    device = images.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    kinds = [torch.backends.cuda.matmul, getattr(torch.backends.cudnn, "conv", torch.backends.cudnn)]
    # In torch 2.9 and later, reading allow_tf32 raises where fp32_precision was set.
    precisions = [kind.fp32_precision if hasattr(kind, "fp32_precision") else kind.allow_tf32 for kind in kinds]
    attention = [getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in _ATTENTION]
    same = torch.are_deterministic_algorithms_enabled()
    return images.shape, images.stride(), images.dtype, images.device, autocast, *precisions, *attention, same


class _Told:
    """The CUDA graph of a forward pass for one shape of images."""

    def __init__(self, images: Tensor, room: Any) -> None:
        with torch.inference_mode(False):
            self._images = torch.empty_like(images)
        self._embeddings, self._sums = self._images, torch.empty(0)
        self._counted: list[Counted] = []
        #: Each function waits for the GPU and returns whether an assumption was wrong.
        self._answers: list[Callable[[], Tensor]] = []
        self._replayed, self._batches = Replayed(room), 0
        #: Number of latest batches in a row for which an assumption was wrong.
        self.refused = 0

    def _encode(self, encode: Encode) -> None:
        batch = Batch(self._images)
        batch.assume = self._assume
        device = self._images.device.type
        # Without autocast's cache, since weights that were cast before are gone when the graph is replayed.
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        with torch.autocast(device, dtype, enabled, cache_enabled=False), counted() as counts:
            self._embeddings = encode(batch)
            self._counted = counts
            totals = [total for _, sums, _ in counts for total in sums.values()]
            self._sums = torch.stack(totals) if totals else torch.empty(0)

    def _assume(self, of_images: Tensor) -> None:
        wrong, answers = of_images.any(), self._answers
        self._replayed.pause(lambda: answers.append(to_processor(wrong)))

    def __call__(self, encode: Encode, images: Tensor, same: Callable[[], bool]) -> Tensor | None:
        """Return the embeddings; None if the parts have changed or an assumption was wrong.

        ``same`` tells whether the parts are unchanged; it is called after a captured graph is launched, to save time.
        """
        # Outside of the inference mode, gradients would be recorded: hence no_grad.
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device_of(images):
            captured = self._replayed.is_told
            if not captured and not same():
                return None
            self._images.copy_(images)
            self._answers.clear()
            self._batches += 1
            with _without_waits() if self._batches == 2 else nullcontext():  # the first batch may wait
                self._replayed(partial(self._encode, encode))
            embeddings, totals = self._embeddings.clone(), self._sums.clone()  # the next batch overwrites them
            if captured and not same():
                return None
            wrong = any(answer() for answer in self._answers)  # each waits for its part of the graph only
            self.refused = self.refused + 1 if wrong else 0
            if wrong:
                return None
            numbers = iter(totals.unbind())
            for tally, sums, count in self._counted:
                tally.keep(dict(zip(sums, numbers, strict=False)), count)
            return embeddings


@contextmanager
def _without_waits() -> Iterator[None]:
    """Raise RuntimeError if the CPU waited for the GPU in a ``with`` block: a graph capture would fail there, and with
    after-effects. Waits of other threads count too, since they cannot be told apart."""
    with process_wide, warnings.catch_warnings(record=True) as raised:
        before = torch.cuda.get_sync_debug_mode()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
    if any("called a synchronizing CUDA operation" in str(warning.message) for warning in raised):
        raise RuntimeError("something in it waits for the GPU")
