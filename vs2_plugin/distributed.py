"""Several processes that work together, as ``torchrun`` starts them; by default, this one alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ALONE", "Processes", "joined", "mean_row", "total", "wait"]


@dataclass(frozen=True)
class Processes:
    """This process among its like."""

    rank: int = 0
    """Its number, from 0."""
    world: int = 1
    """How many there are, on all machines."""
    local_rank: int = 0
    """Its number on this machine, which is that of its GPU."""

    @property
    def first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def block(self, count: int, unit: int = 1) -> range:
        """This process's block of ``count`` things, in whole units but for the last: blocks follow each other."""
        units = -(-count // unit)
        start, stop = units * self.rank // self.world, units * (self.rank + 1) // self.world
        return range(min(count, start * unit), min(count, stop * unit))


ALONE = Processes()


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes that ``torchrun`` started, joined (NCCL where there are GPUs, else gloo) within the block."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ALONE
        return
    import torch
    import torch.distributed as dist

    found = Processes(int(os.environ["RANK"]), world, int(os.environ.get("LOCAL_RANK", "0")))
    if torch.cuda.is_available():
        torch.cuda.set_device(found.local_rank)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield found
    finally:
        dist.destroy_process_group()


def _alone() -> bool:
    import torch.distributed as dist

    return not (dist.is_available() and dist.is_initialized())


def total(tensor: Tensor) -> Tensor:
    """The sum of ``tensor`` over all processes, in its place; the tensor itself where this process is alone."""
    if not _alone():
        import torch.distributed as dist

        dist.all_reduce(tensor)
    return tensor


def mean_row(rows: Tensor) -> Tensor:
    """The mean ``[d]`` of the rows ``[count, d]`` of all processes."""
    if _alone():
        return rows.mean(0)
    import torch

    summed = total(torch.cat([rows.sum(0), rows.new_tensor([len(rows)])]))
    return summed[:-1] / summed[-1]


def wait() -> None:
    """Wait until all processes have come here."""
    if not _alone():
        import torch.distributed as dist

        dist.barrier()
