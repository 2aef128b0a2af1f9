"""The device at hand, and what its processor is good at."""

from __future__ import annotations

import functools
import gc
import logging
import os
import platform
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
    "to_processor",
]

_LOG = logging.getLogger(__name__)

if hasattr(os, "register_at_fork"):
    # A process that is forked off, to load images say, cannot free what lies on a GPU or was pinned for one: it would
    # be aborted as soon as it collected the garbage that this one left it.
    os.register_at_fork(after_in_child=gc.freeze)


def own_device(processes: Processes = ALONE) -> str:
    """Return the device of this process: its GPU, or the CPU where there is none."""
    gpu = gpu_of(processes)
    return "cpu" if gpu is None else f"cuda:{gpu}"


def has_bfloat16_units() -> bool | None:
    """Return whether the processor has units for products of bfloat16 numbers; None if that cannot be told.

    It is asked of x86 processors (AVX512-BF16 or AMX), where torch tells it.
    """
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # absent in older torch
    if not _is_x86() or not capabilities:
        return None
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


@functools.cache
def partitions_fast() -> bool:
    """Return whether numpy partitions integers by vector instructions, some times as fast as without. It does on x86
    processors from version 2.0 on."""
    return _is_x86() and int(np.__version__.partition(".")[0]) >= 2


def emulates_bfloat16() -> bool:
    """Return whether models would run on an x86 processor that has no bfloat16 units.

    Autocast on the CPU is to bfloat16, which such a processor emulates: a ViT-B-32 takes nine times as long as in
    float32 (31.5 s and 3.5 s for 64 images, on two cores with AVX2 only).
    """
    return not torch.cuda.is_available() and has_bfloat16_units() is False


def add_at(sums: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """Add each value to the sum of its row at its place, in place, and return the sums: ``[…, n]``, from int64 and
    numbers ``[…, m]``.

    A GPU's own ``scatter_add_`` adds in whatever order its threads come by, so that the last bits change from run to
    run; this adds whole numbers there, of units of 2^-40 of the largest value, which takes a quarter of the time of
    sorting.
    """
    if not sums.is_cuda:
        return sums.scatter_add_(-1, places, values)
    norm = torch.linalg.vector_norm(values, torch.inf, dtype=torch.double)  # not finite where a value is not
    unit = norm.clamp_min(1e-200)[None] * 2.0**-40
    whole = torch.zeros_like(sums, dtype=torch.long).scatter_add_(-1, places, (values / unit).long())
    return sums.add_(whole * unit)


def to_processor(tensor: Tensor) -> Callable[[], Tensor]:
    """Begin to copy a tensor to the processor. What is returned waits for the copy, and gives it; a GPU goes on with
    what it was told meanwhile."""
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
    """Work on a GPU that is told once and replayed from then on, with the same tensors: to tell a training step, of
    fifty kernels, takes the processor longer than the step takes (H100, d 768, n 3072, batch 4096: 1.2 and 0.5 ms)."""

    #: Whether a graph could not be made in this process. Torch may not be able to make another one then.
    failed = False

    def __init__(self, room: Any = None) -> None:
        """``room`` is memory to work in, shared with others that leave nothing there: a pool of torch's."""
        self._room, self._calls, self._capturing = room, 0, False
        self._parts: list[tuple[torch.cuda.CUDAGraph, Callable[[], None]]] = []
        self._open = ExitStack()

    @property
    def is_told(self) -> bool:
        """Whether the GPU does it by itself from now on."""
        return bool(self._parts) and not self._capturing

    def __call__(self, work: Callable[[], None]) -> None:
        """Do the work, the same each time; twice as it is told, for what a library sets up at first."""
        self._calls += 1
        if not self.is_told and (self._calls < 3 or Replayed.failed or not self._capture(work)):
            return work()
        for graph, then in self._parts:
            graph.replay()
            then()
        return None

    def _capture(self, work: Callable[[], None]) -> bool:
        """Make a graph of the work, which is not done; give whether that went well."""
        before, self._capturing, made = torch.cuda.current_stream(), True, False
        try:
            with self._open:
                self._begin()
                work()
            made = True
        except Exception as error:  # if it is no matter of graphs, the work itself raises it
            Replayed.failed = True
            _LOG.info("the work is launched on the GPU anew each time: %s", sentence_of(error))
        finally:
            self._capturing = False
            torch.cuda.set_stream(before)  # where it fails, torch does not
            if not made:
                self._parts.clear()
        return made

    def _begin(self) -> None:
        self._room = self._room or torch.cuda.graph_pool_handle()
        graph, stream = torch.cuda.CUDAGraph(), _capture_stream(torch.cuda.current_device())
        # Another thread may pin memory meanwhile.
        capture = torch.cuda.graph(graph, pool=self._room, stream=stream, capture_error_mode="thread_local")
        self._open.enter_context(capture)
        self._parts.append((graph, lambda: None))

    def pause(self, then: Callable[[], None]) -> None:
        """Within the work: do ``then`` here each time, as it is told, and then the rest of the work."""
        if not self._capturing:
            return then()
        self._open.close()
        self._parts[-1] = self._parts[-1][0], then
        return self._begin()


@functools.cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """What tells a GPU of graphs. Of itself, torch tells all GPUs by a stream of the first that was asked for."""
    return torch.cuda.Stream(device)
