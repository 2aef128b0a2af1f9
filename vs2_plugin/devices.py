"""The device of this process, what its processor is fast at, and GPU work that is captured and replayed."""

from __future__ import annotations

import functools
import gc
import logging
import os
import platform
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vs2_plugin.distributed import ALONE, Processes, gpu_of
from vs2_plugin.text import sentence_of

__all__ = [
    "Replayed",
    "add_at",
    "emulates_bfloat16",
    "has_bfloat16_units",
    "own_device",
    "partitions_fast",
    "process_wide",
    "to_processor",
]

_LOG = logging.getLogger(__name__)
#: Held by the thread that captures a graph, or watches for waits: either changes what all threads share.
process_wide = threading.RLock()

if hasattr(os, "register_at_fork"):
    # A forked process, such as a loader of images, cannot free memory on a GPU or pinned for one: it would be aborted
    # when it collected garbage that it inherited from this process.
    os.register_at_fork(after_in_child=gc.freeze)


def own_device(processes: Processes = ALONE) -> str:
    """Return the device of this process: its GPU, or the CPU where there is none."""
    gpu = gpu_of(processes)
    return "cpu" if gpu is None else f"cuda:{gpu}"


def has_bfloat16_units() -> bool | None:
    """Return whether the processor has units for products of bfloat16 numbers; None if that is unknown.

    It is known only for x86 processors (AVX512-BF16 or AMX) whose capabilities torch reports.
    """
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # absent in older torch
    if not _is_x86() or not capabilities:
        return None
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


@functools.cache
def partitions_fast() -> bool:
    """Return whether numpy partitions integers by vector instructions, which is several times as fast as without: on
    x86 processors, from numpy 2.0 on."""
    return _is_x86() and int(np.__version__.partition(".")[0]) >= 2


def emulates_bfloat16() -> bool:
    """Return whether models would run on an x86 processor that has no bfloat16 units.

    Autocast on the CPU is to bfloat16, which such a processor emulates: a ViT-B-32 takes nine times as long as in
    float32 (31.5 s and 3.5 s for 64 images, on two cores with AVX2 only).
    """
    return not torch.cuda.is_available() and has_bfloat16_units() is False


def add_at(sums: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """Add ``values`` ``[…, m]`` to ``sums`` ``[…, n]`` at the indices ``places`` (int64 ``[…, m]``), in place, and
    return ``sums``.

    On a GPU, ``scatter_add_`` adds in the order in which threads happen to run, so that the last bits change from run
    to run. There, this function adds whole multiples of 2^-40 of the largest value instead, in a quarter of the time
    that sorting takes.
    """
    if not sums.is_cuda:
        return sums.scatter_add_(-1, places, values)
    norm = torch.linalg.vector_norm(values, torch.inf, dtype=torch.double)  # not finite if a value is not
    unit = norm.clamp_min(1e-200)[None] * 2.0**-40
    whole = torch.zeros_like(sums, dtype=torch.long).scatter_add_(-1, places, (values / unit).long())
    return sums.add_(whole * unit)


def to_processor(tensor: Tensor) -> Callable[[], Tensor]:
    """Start to copy a tensor to the CPU, and return a function that waits for the copy and returns it; a GPU goes on
    with its queued work meanwhile."""
    copy = tensor.to("cpu", non_blocking=tensor.is_cuda)
    if not tensor.is_cuda:
        return lambda: copy
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(tensor.device))

    def waited() -> Tensor:
        done.synchronize()
        return copy

    return waited


class Replayed:
    """Work on a GPU that is captured once, in CUDA graphs, and replayed from then on with the same tensors.

    To launch the fifty kernels of a training step takes the CPU longer than the GPU takes to run them (H100, d 768,
    n 3072, batch 4096: 1.2 and 0.5 ms)."""

    #: Whether a capture has failed in this process; torch may then be unable to capture another graph.
    failed = False

    def __init__(self, room: Any = None) -> None:
        """Take ``room``, torch's handle of a memory pool, which works that leave nothing in the pool may share."""
        self._room, self._calls, self._capturing = room, 0, False
        self._parts: list[tuple[torch.cuda.CUDAGraph, Callable[[], None]]] = []
        self._open = ExitStack()

    @property
    def is_told(self) -> bool:
        """Whether the work has been captured, so that the GPU replays it from now on."""
        return bool(self._parts) and not self._capturing

    def __call__(self, work: Callable[[], None]) -> None:
        """Do ``work``, the same at each call: launch it twice, while libraries set themselves up, then replay it."""
        self._calls += 1
        if not self.is_told and (self._calls < 3 or Replayed.failed or not self._capture(work)):
            return work()
        for graph, then in self._parts:
            graph.replay()
            then()
        return None

    def _capture(self, work: Callable[[], None]) -> bool:
        """Capture ``work`` in graphs without running it, and return whether that succeeded."""
        stream, self._capturing, captured = torch.cuda.current_stream(), True, False
        try:
            with process_wide, self._open:
                self._begin()
                work()
            captured = True
        except Exception as error:  # an error of the work itself is raised again when it is launched
            Replayed.failed = True
            _LOG.info("the work is launched on the GPU anew each time: %s", sentence_of(error))
        finally:
            self._capturing = False
            torch.cuda.set_stream(stream)  # torch does not restore it after a failure
            if not captured:
                self._parts.clear()
        return captured

    def _begin(self) -> None:
        self._room = self._room or torch.cuda.graph_pool_handle()
        graph, stream = torch.cuda.CUDAGraph(), _capture_stream(torch.cuda.current_device())
        # thread_local, since another thread may pin memory during the capture.
        capture = torch.cuda.graph(graph, pool=self._room, stream=stream, capture_error_mode="thread_local")
        self._open.enter_context(capture)
        self._parts.append((graph, lambda: None))

    def pause(self, then: Callable[[], None]) -> None:
        """Call ``then`` at this point of the work, at each replay too: one graph ends here, and the next begins."""
        if not self._capturing:
            return then()
        self._open.close()
        self._parts[-1] = self._parts[-1][0], then
        return self._begin()


@functools.cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """Return the stream for captures on a GPU; torch's own default is a stream of the first GPU used, for all."""
    return torch.cuda.Stream(device)
