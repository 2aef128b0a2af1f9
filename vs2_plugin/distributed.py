"""Several processes that work together, started by ``torchrun``; by default, a single one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["ALONE", "Processes", "alone", "gpu_of", "joined", "mean_row", "total", "wait"]


@dataclass(frozen=True)
class Processes:
    """The number of this process, and how many work together."""

    rank: int = 0
    """The number of this process, from 0."""
    world: int = 1
    """The number of processes on all machines."""
    local_rank: int = 0
    """The number of this process on its machine."""

    @property
    def first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def block(self, count: int, unit: int = 1) -> range:
        """Return the indices that this process works on: a consecutive block of ``range(count)``, in whole units."""
        units = -(-count // unit)
        start, stop = units * self.rank // self.world, units * (self.rank + 1) // self.world
        return range(min(count, start * unit), min(count, stop * unit))


ALONE = Processes()
_JOINS = count()
#: How long a process waits for another, such as one that extracts its images more slowly; torch's own limit is ten
#: minutes (NCCL). If a process fails, torchrun ends the others.
_PATIENCE = timedelta(days=2)


@contextmanager
def joined() -> Iterator[Processes]:
    """Join the processes that ``torchrun`` started for the block, by NCCL if each has its own GPU, else by gloo."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ALONE
        return
    processes = Processes(int(os.environ["RANK"]), world, int(os.environ.get("LOCAL_RANK", "0")))
    gpu = gpu_of(processes)
    if gpu is not None:
        torch.cuda.set_device(gpu)
    # NCCL refuses two processes on one GPU.
    shared = int(os.environ.get("LOCAL_WORLD_SIZE", world)) > torch.cuda.device_count()
    device = None if gpu is None or shared else torch.device("cuda", gpu)
    dist.init_process_group(
        "gloo" if device is None else "nccl",
        device_id=device,
        timeout=_PATIENCE,
        store=_store(),
        rank=processes.rank,
        world_size=world,
    )
    try:
        yield processes
    finally:
        dist.destroy_process_group()


@cache
def _meeting_place() -> Any:
    from torch.distributed.rendezvous import rendezvous

    return next(rendezvous("env://"))[0]


def _store() -> Any:
    """Return the store through which processes exchange their addresses, with a new prefix at each call: addresses
    from an earlier call are out of date."""
    from torch.distributed.distributed_c10d import PrefixStore

    return PrefixStore(f"vs2_plugin/{next(_JOINS)}", _meeting_place())


def gpu_of(processes: Processes) -> int | None:
    """Return the number of this process's GPU, or None without a GPU; where there are fewer GPUs than processes,
    processes share them."""
    return processes.local_rank % torch.cuda.device_count() if torch.cuda.is_available() else None


def alone() -> bool:
    """Return whether this process works with no others."""
    return not (dist.is_available() and dist.is_initialized())


def total(tensor: Tensor) -> Tensor:
    """Sum ``tensor`` over all processes, in place, and return it."""
    if not alone():
        dist.all_reduce(tensor)
    return tensor


def mean_row(rows: Tensor) -> Tensor:
    """Return the mean ``[d]`` of the rows ``[count, d]`` of all processes."""
    if alone():
        return rows.mean(0)
    summed = total(torch.cat([rows.sum(0), rows.new_tensor([len(rows)])]))
    return summed[:-1] / summed[-1]


def wait() -> None:
    """Wait until all other processes have called this function too."""
    if not alone():
        dist.barrier()
