"""Loaders that fail let their processes go."""

import gc
import multiprocessing

import pytest
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vs2_plugin.data.loading import leave_interruptions, read


class Failing(IterableDataset):
    """One of its two workers has nothing to give."""

    def __iter__(self):
        if get_worker_info().id == 1:
            raise ValueError("no samples")
        yield from range(3)


def test_where_a_loader_fails_its_processes_end_at_once():
    loader = DataLoader(Failing(), batch_size=None, num_workers=2, worker_init_fn=leave_interruptions)
    gc.disable()  # nobody else ends them
    try:
        with pytest.raises(ValueError, match="no samples"):
            list(read(loader))
        assert multiprocessing.active_children() == []
    finally:
        gc.enable()


def test_what_it_gives_is_given():
    loader = DataLoader(range(5), batch_size=2, num_workers=1)
    assert [batch.tolist() for batch in read(loader)] == [[0, 1], [2, 3], [4]]
    assert list(read([1, 2])) == [1, 2]
