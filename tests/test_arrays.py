import numpy as np
import pytest
import torch

from vs2_plugin.arrays import Column, Stack, digest_of, stack

# ---- a column


@pytest.mark.parametrize("sizes", [[], [3], [2, 0, 5], [1] * 40])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_column_grows_into_a_plain_npy_file(dtype, sizes, tmp_path):
    rows = np.random.default_rng(0).random((sum(sizes), 5))
    column = Column(tmp_path / "x.npy", 5, dtype)
    for part in np.split(rows, np.cumsum(sizes)[:-1]) if sizes else []:
        column.append(part)
    column.close()
    column.close()  # a second time does nothing
    found = np.load(tmp_path / "x.npy", allow_pickle=False)
    assert (found.shape, found.dtype) == ((sum(sizes), 5), dtype)
    assert np.array_equal(found, rows.astype(dtype))


def test_a_column_that_was_not_closed_reads_as_empty(tmp_path):
    column = Column(tmp_path / "x.npy", 2, np.float32)
    column.append(np.ones((100_000, 2), np.float32))
    assert np.load(tmp_path / "x.npy").shape == (0, 2)
    column.close()
    assert np.load(tmp_path / "x.npy").shape == (100_000, 2)


# ---- a stack


@pytest.mark.parametrize(
    "rows", [0, 6, slice(1, 6), slice(None), np.array([0, 2, 3, 6]), np.array([5, 1, 1]), np.array([], int)]
)
def test_stacked_arrays_read_as_one(rows):
    parts = [
        np.arange(8, dtype=np.float16).reshape(4, 2),
        np.empty((0, 2), np.float16),
        np.arange(50, 56, dtype=np.float16).reshape(3, 2),
    ]
    stacked, whole = stack(parts), np.concatenate(parts)
    assert stacked.shape == whole.shape and len(stacked) == 7
    assert np.array_equal(stacked[rows], whole[rows]) and stacked[rows].dtype == np.float16


def test_one_array_is_not_wrapped():
    array = np.zeros((3, 2))
    assert stack([array]) is array


def test_a_stack_tells_its_shape_and_stays_on_disk(tmp_path):
    parts = []
    for number, count in enumerate((3, 5)):
        np.save(tmp_path / f"{number}.npy", np.full((count, 4), number, np.float16))
        parts.append(np.load(tmp_path / f"{number}.npy", mmap_mode="r"))
    stacked = stack(parts)
    assert isinstance(stacked, Stack) and (stacked.shape, stacked.dtype) == ((8, 4), np.float16)
    found = stacked[2:5]
    assert found[:, 0].tolist() == [0, 1, 1] and not isinstance(found, np.memmap)
    with pytest.raises(IndexError):
        stacked[8]


# ---- the digest of tensors

X = {"a": torch.arange(6.0), "b": torch.ones(2, dtype=torch.int64)}
OTHERS = {
    "a value": {**X, "a": torch.arange(6.0) + 1},
    "a sign": {**X, "a": -torch.arange(6.0)},
    "a shape": {**X, "a": torch.arange(6.0).view(2, 3)},
    "a dtype": {**X, "b": torch.ones(4, dtype=torch.int32)},
    "a name": {"a": X["a"], "c": X["b"]},
    "one less": {"a": X["a"]},
}


@pytest.mark.parametrize("change", OTHERS)
def test_the_digest_changes_with_the_tensors(change):
    assert digest_of(OTHERS[change]) != digest_of(X)


def test_the_digest_does_not_depend_on_order_or_layout():
    other = {"b": X["b"], "a": torch.arange(12.0).div(2)[::2].requires_grad_()}
    assert torch.equal(other["a"], X["a"]) and digest_of(other) == digest_of(X)
