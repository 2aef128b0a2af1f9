import hashlib
import os
from itertools import pairwise

import numpy as np
import pytest
import torch

from vs2_plugin import arrays
from vs2_plugin.arrays import (
    ROWS,
    Column,
    Stack,
    ask_for,
    check,
    check_all,
    digest_of,
    on_disk,
    spread,
    stack,
    sums_of,
    trust_all,
    whole_rows,
)


def test_rows_are_spread_evenly_from_the_first_to_the_last():
    for count in (0, 1, 5):
        assert spread(count, 5).tolist() == list(range(count))
    found = spread(1000, 7).tolist()
    assert (len(found), found[0], found[-1]) == (7, 0, 999) and {b - a for a, b in pairwise(found)} == {166, 167}


# ---- a column


@pytest.mark.parametrize("sizes", [[], [3], [2, 0, 5], [1] * 40, [ROWS], [ROWS - 1, 2, 3 * ROWS]])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("width", [None, 5])
def test_a_column_grows_into_a_plain_npy_file(width, dtype, sizes, tmp_path):
    rows = np.random.default_rng(0).random((sum(sizes), width) if width else sum(sizes))
    column = Column(tmp_path / "x.npy", width, dtype)
    for part in np.split(rows, np.cumsum(sizes)[:-1]) if sizes else []:
        column.append(part)
    content = column.complete()
    column.close()  # a second time does nothing
    found = np.load(tmp_path / "x.npy", allow_pickle=False)
    assert (found.shape, found.dtype) == (rows.shape, dtype)
    assert np.array_equal(found, rows.astype(dtype))
    check(tmp_path / "x.npy", content)
    lines = sums_of(tmp_path / "x.npy").read_text().split()
    assert len(lines) == -(-len(rows) // ROWS) + 1
    assert lines[:1] == [hashlib.sha256(found[:ROWS].tobytes()).hexdigest()] or not len(rows)


def test_a_column_that_was_not_completed_reads_as_empty(tmp_path):
    column = Column(tmp_path / "x.npy", 2, np.float32)
    column.append(np.ones((100_000, 2), np.float32))
    assert np.load(tmp_path / "x.npy").shape == (0, 2)
    column.complete()
    assert np.load(tmp_path / "x.npy").shape == (100_000, 2)


def started(path, count, width=3):
    column = Column(path, width, np.float16)
    column.append(np.arange(count * width, dtype=np.float32).reshape(count, width) % 1000)
    column.close()


@pytest.mark.parametrize("width", [None, 3])
def test_a_rest_that_was_completed_is_no_whole_chunk(width, tmp_path):
    column = Column(tmp_path / "x.npy", width, np.float16)
    column.append(np.ones((ROWS + 10, 3) if width else ROWS + 10))
    column.complete()
    assert whole_rows(tmp_path / "x.npy", width, np.float16) == ROWS


@pytest.mark.parametrize(("count", "whole"), [(0, 0), (ROWS - 1, 0), (ROWS, ROWS), (2 * ROWS + 5, 2 * ROWS)])
def test_a_column_goes_on_after_its_whole_chunks(count, whole, tmp_path):
    path, rows = tmp_path / "x.npy", np.arange(3 * ROWS * 3, dtype=np.float32).reshape(-1, 3) % 1000
    started(path, count)
    assert whole_rows(path, 3, np.float16) == whole
    column = Column(path, 3, np.float16, whole)
    assert column.count == whole
    column.append(rows[whole:])
    content = column.complete()
    other = Column(tmp_path / "y.npy", 3, np.float16)
    other.append(rows)
    assert other.complete() == content
    assert path.read_bytes() == (tmp_path / "y.npy").read_bytes()


def test_going_on_writes_nothing_anew_of_what_is_kept(tmp_path):
    """So that it is there whenever that is interrupted: a process that dies in the middle leaves what it found."""
    path = tmp_path / "x.npy"
    started(path, 2 * ROWS + 5)
    before = path.read_bytes(), sums_of(path).read_bytes()
    column = Column(path, 3, np.float16, 2 * ROWS)  # and no more: it is not closed
    assert path.read_bytes() == before[0][: 128 + 2 * ROWS * 6] and sums_of(path).read_bytes() == before[1][: 2 * 65]
    assert whole_rows(path, 3, np.float16) == 2 * ROWS
    column.close()


def test_what_was_damaged_since_is_written_again(tmp_path):
    path = tmp_path / "x.npy"
    started(path, 3 * ROWS)
    raw = bytearray(path.read_bytes())
    raw[128 + ROWS * 6 + 7] ^= 1  # in the second chunk
    path.write_bytes(raw)
    assert whole_rows(path, 3, np.float16) == ROWS
    sums_of(path).write_bytes(b"\xff" + sums_of(path).read_bytes()[1:])
    assert whole_rows(path, 3, np.float16) == 0
    path.write_bytes(raw[: 128 + ROWS * 6 - 1])
    assert whole_rows(path, 3, np.float16) == 0
    assert whole_rows(tmp_path / "none.npy", 3, np.float16) == 0


# ---- whether it is whole


@pytest.fixture
def written(tmp_path):
    column = Column(tmp_path / "x.npy", 2, np.float16)
    column.append(np.arange(2 * (ROWS + 3)).reshape(-1, 2) % 999)
    return tmp_path / "x.npy", column.complete()


@pytest.mark.parametrize(
    ("place", "named"),
    [
        (0, "its header"), (9, "its header"), (20, "its header"), (100, "its header"), (128, "its rows 0 to 1023"),
        (128 + 4 * ROWS - 1, "its rows 0 to 1023"), (-1, "its rows 1024 to 1026"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("bit", [1, 128])
def test_a_flipped_bit_is_refused_with_its_place(place, named, bit, written):
    path, content = written
    raw = bytearray(path.read_bytes())
    raw[place] ^= bit
    path.write_bytes(raw)
    with pytest.raises(ValueError) as error:
        check_all(path.parent, {"x.npy": content})
    assert named in str(error.value) and str(path) in str(error.value)


def test_every_flipped_byte_is_noticed(written):
    path, content = written
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        raw = bytearray(whole)
        raw[place] ^= 0x10
        path.write_bytes(raw)
        with pytest.raises(ValueError):
            check_all(path.parent, {"x.npy": content})
    path.write_bytes(whole)
    check_all(path.parent, {"x.npy": content})


@pytest.mark.parametrize("change", [lambda raw: raw[:-1], lambda raw: raw + b"\0", lambda raw: b"", lambda raw: b"x"])
def test_another_length_is_refused(change, written):
    path, content = written
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError):
        check_all(path.parent, {"x.npy": content})


def test_changed_digests_are_refused(written):
    path, content = written
    sums_of(path).write_text(sums_of(path).read_text().replace("a", "b"))
    with pytest.raises(ValueError, match=r"x\.npy\.sha256 is not the file that was written"):
        check_all(path.parent, {"x.npy": content})


def test_what_was_compared_is_not_read_again_until_it_is_touched(written, monkeypatch):
    path, content = written
    read = []
    monkeypatch.setattr(arrays, "check", lambda *args: read.append(args))
    check_all(path.parent, {"x.npy": content})
    check_all(path.parent, {"x.npy": content})
    assert len(read) == 1
    check_all(path.parent, {"x.npy": content}, thorough=True)
    assert len(read) == 2
    check_all(path.parent, {"x.npy": "other"})
    assert len(read) == 3
    before = path.stat()
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as if it had not been
    check_all(path.parent, {"x.npy": content})
    assert len(read) == 4
    trust_all(path.parent, {"x.npy": content})
    check_all(path.parent, {"x.npy": content})
    assert len(read) == 4


@pytest.mark.parametrize("memory", ["", "[]", "7", '{"x": 3}', "\0"])
def test_a_damaged_memory_is_none(memory, written):
    path, content = written
    (path.parent / "verified.json").write_text(memory)
    check_all(path.parent, {"x.npy": content})
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    (path.parent / "verified.json").write_text(memory)
    with pytest.raises(ValueError):
        check_all(path.parent, {"x.npy": content})


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


def test_rows_are_asked_for_where_they_lie_in_their_files(tmp_path, monkeypatch):
    whole = np.random.default_rng(0).random((30, 7)).astype(np.float16)
    for name, part in (("a", whole[:10]), ("b", whole[10:])):
        np.save(tmp_path / f"{name}.npy", part)
    mapped = [np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in "ab"]
    found = []

    def advise(file, start, size, advice):
        assert advice == os.POSIX_FADV_WILLNEED
        found.append(np.frombuffer(os.pread(file, size, start), np.float16))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    rows = np.array([0, 9, 10, 11, 29], np.int32)
    ask_for(stack(mapped), rows)
    assert np.array_equal(found, whole[rows])
    found.clear()
    for other in (whole, mapped[0][2:]):  # not in a file, and a view that does not tell where it lies
        ask_for(other, rows)
    assert not found


def test_only_large_files_count_as_on_disk(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", np.zeros((6, 4), np.float16))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert not on_disk(mapped)
    monkeypatch.setattr(arrays, "_LARGE", mapped.nbytes)
    assert on_disk(mapped) and on_disk(stack([mapped, mapped]))
    assert not on_disk(np.array(mapped)) and not on_disk(mapped[:5])


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
