"""Exact search against brute force, and FAISS against exact search."""

import os

import numpy as np
import pytest
import torch

from vs2_plugin.arrays import Stack
from vs2_plugin.errors import SettingError
from vs2_plugin.gallery import search
from vs2_plugin.gallery.search import ExactSearch, FaissSearch, blocks, open_search


def unit(rows):
    rows = np.asarray(rows, np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def brute_force(embeddings, queries, n):
    """Cosines and rows, best first, of float64 numbers."""
    cosines = unit(queries) @ unit(embeddings).T
    rows = np.argsort(-cosines, axis=1, kind="stable")[:, :n]
    return np.take_along_axis(cosines, rows, 1), rows


def as_array(rows, folder):
    return rows


def as_memory_map(rows, folder):
    np.save(folder / "rows.npy", rows)
    return np.load(folder / "rows.npy", mmap_mode="r")


def as_stack(rows, folder):
    return Stack([rows[:10], rows[10:10], as_memory_map(rows[10:], folder)])


@pytest.fixture(scope="module")
def rows():
    """100 embeddings of several lengths, in half precision."""
    rng = np.random.default_rng(0)
    return (rng.normal(size=(100, 16)) * rng.uniform(0.1, 9, size=(100, 1))).astype(np.float16)


@pytest.fixture(scope="module")
def queries():
    found = torch.randn(7, 16, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.normalize(found, dim=-1)


@pytest.mark.parametrize("resident", [True, False], ids=["in memory", "from disk"])
@pytest.mark.parametrize("store", [as_array, as_memory_map, as_stack])
@pytest.mark.parametrize(("block", "n"), [(1 << 16, 5), (1 << 16, 100), (32, 5), (32, 50), (7, 20), (1, 3), (50, 100)])
def test_the_nearest_are_those_of_brute_force(block, n, store, resident, rows, queries, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "_BLOCK", block)
    if not resident:
        monkeypatch.setattr(search, "_RESIDENT", 4 * rows.size - 1)
    find = ExactSearch(store(rows, tmp_path), "cpu")
    for _ in range(2):  # a second batch finds the same
        cosines, found = find(queries, n)
        expected, where = brute_force(rows, queries, n)
        assert np.array_equal(found.numpy(), where)
        assert np.abs(cosines.numpy() - expected).max() < 1e-6


def test_what_does_not_fit_is_read_again_for_every_batch(rows, queries, monkeypatch):
    read = []
    monkeypatch.setattr(search, "blocks", lambda *given: read.append(1) or blocks(*given))
    ExactSearch(rows, "cpu")(queries, 3)
    assert len(read) == 1
    find = ExactSearch(rows, "cpu")
    find(queries, 3), find(queries, 3)
    assert len(read) == 2
    monkeypatch.setattr(search, "_RESIDENT", 4 * rows.size - 1)
    find = ExactSearch(rows, "cpu")
    assert len(read) == 2
    find(queries, 3), find(queries, 3)
    assert len(read) == 4


@pytest.mark.parametrize("store", [as_array, as_memory_map, as_stack])
@pytest.mark.parametrize(("dtype", "n"), [(np.float16, 3), (np.float16, 100), (np.float32, 7)])
def test_screened_search_finds_the_same(dtype, n, store, rows, queries, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "_QUERIES", 2)
    cosines, found = search.ScreenedSearch(store(rows.astype(dtype), tmp_path), "cpu")(queries, n)
    expected, where = brute_force(rows, queries, n)
    assert np.array_equal(found.numpy(), where)
    assert np.abs(cosines.numpy() - expected).max() < 1e-6


@pytest.mark.parametrize("block", [32, 1 << 16])
def test_screened_search_finds_every_embedding_by_itself(block, rows, monkeypatch):
    monkeypatch.setattr(search, "_BLOCK", block)
    _, found = search.ScreenedSearch(rows, "cpu")(torch.from_numpy(unit(rows)).float(), 1)
    assert found[:, 0].tolist() == list(range(100))


def test_what_half_precision_cannot_tell_apart_is_ranked_in_float32():
    """Forty rows at angles of 0.002 to 0.022 to the query: cosines that differ by 1e-6 or more, and less than 3e-4."""
    torch.manual_seed(0)
    query, aside = torch.linalg.qr(torch.randn(16, 2))[0].T
    angles = 0.002 + 0.0005 * torch.randperm(40)[:, None]
    rows = (angles.cos() * query + angles.sin() * aside).numpy()
    far = np.random.default_rng(0).normal(size=(500, 16)).astype(np.float32)
    everything = np.concatenate([far, rows])
    assert len(torch.from_numpy(rows).half().mv(query.half()).unique()) < 8
    _, found = search.ScreenedSearch(everything, "cpu")(query[None], 8)
    assert (found[0] - 500).tolist() == angles[:, 0].argsort()[:8].tolist()


@pytest.mark.parametrize("block", [4, 1000])
def test_equal_embeddings_are_all_found_each_once(block, rows, queries, monkeypatch):
    monkeypatch.setattr(search, "_BLOCK", block)
    nearest = int(brute_force(rows, queries[:1], 1)[1][0, 0])
    many = np.concatenate([rows, np.repeat(rows[nearest : nearest + 1], 10, axis=0)])
    cosines, found = ExactSearch(many, "cpu")(queries[:1], 12)
    assert set(found[0, :11].tolist()) == {nearest, *range(100, 110)}
    assert (cosines[0, :11] == cosines[0, 0]).all() and cosines[0, 11] < cosines[0, 0]


def test_half_precision_rows_are_compared_in_float32():
    """Where half precision would see no difference, float32 does."""
    rows = np.ones((2, 16), np.float16)
    rows[1, 0] = 1 + 2**-7
    query = torch.nn.functional.normalize(torch.from_numpy(rows[1:].astype(np.float32)), dim=-1)
    cosines, found = ExactSearch(rows, "cpu")(query, 2)
    assert found.tolist() == [[1, 0]] and cosines.dtype == torch.float32 and cosines[0, 0] > cosines[0, 1]


def test_an_embedding_of_norm_zero_is_no_nan(rows, queries):
    empty = np.concatenate([rows, np.zeros((1, 16), np.float16)])
    cosines, found = ExactSearch(empty, "cpu")(queries, 101)
    assert torch.isfinite(cosines).all() and (cosines[found == 100] == 0).all()


# ---- FAISS


@pytest.fixture(scope="module")
def clustered():
    """5,000 embeddings around 50 centres, and 60 queries near them."""
    rng = np.random.default_rng(2)
    centres = rng.normal(size=(50, 24))
    made = [centres[rng.integers(50, size=size)] + 0.4 * rng.normal(size=(size, 24)) for size in (5000, 60)]
    queries = torch.from_numpy(unit(made[1])).float()
    return made[0].astype(np.float16), queries


def rows_of(find, queries, n=10):
    return find(queries, n)[1].tolist()


def test_faiss_finds_nearly_what_exact_search_finds(clustered, tmp_path):
    pytest.importorskip("faiss")
    rows, queries = clustered
    cosines, found = FaissSearch(rows, tmp_path / "x.faiss", "cpu")(queries, 10)
    exact_cosines, exact = ExactSearch(rows, "cpu")(queries, 10)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), exact.tolist(), strict=True)])
    assert recall > 0.9 and torch.equal(FaissSearch(rows, tmp_path / "x.faiss", "cpu")(queries, 10)[1], found)
    needing = queries.clone().requires_grad_()  # as embeddings are outside of no_grad
    assert torch.equal(FaissSearch(rows, tmp_path / "x.faiss", "cpu")(needing, 10)[1], found)
    assert cosines.shape == found.shape == (60, 10) and found.dtype == torch.int64
    assert (cosines[:, :-1] >= cosines[:, 1:]).all()
    assert (cosines[:, 0] - exact_cosines[:, 0]).abs().median() < 1e-3


def test_the_index_is_kept_and_used_again(clustered, tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(search, "_SMALL", 4999)
    rows, queries = clustered
    file = tmp_path / "x.faiss"
    first = open_search("faiss", rows, file, "cpu")
    assert {path.name for path in tmp_path.glob("x.*")} == {"x.faiss", "x.faiss.sha256"}
    monkeypatch.setattr(FaissSearch, "_build", staticmethod(lambda *given: pytest.fail("built again")))
    assert rows_of(open_search("faiss", rows, file, "cpu"), queries) == rows_of(first, queries)


@pytest.mark.parametrize("change", [lambda rows: rows[:-1], lambda rows: rows[:, :-1]], ids=["count", "width"])
def test_an_index_of_other_embeddings_is_built_again(change, clustered, tmp_path):
    faiss = pytest.importorskip("faiss")
    rows, _ = clustered
    other = np.ascontiguousarray(change(rows)[:500])
    FaissSearch(rows[:501], tmp_path / "x.faiss", "cpu")
    FaissSearch(other, tmp_path / "x.faiss", "cpu")
    index = faiss.read_index(str(tmp_path / "x.faiss"))
    assert (index.ntotal, index.d) == other.shape


def flipped(raw):
    """With another bit in a vector: an index all the same, that finds others."""
    return raw[:-1000] + bytes([raw[-1000] ^ 64]) + raw[-999:]


@pytest.mark.parametrize(
    "damage", [lambda raw: b"", lambda raw: b"no index", flipped], ids=["empty", "garbage", "flipped"]
)
def test_a_damaged_index_is_built_again(damage, clustered, tmp_path):
    pytest.importorskip("faiss")
    rows, queries = clustered
    file = tmp_path / "x.faiss"
    found = rows_of(FaissSearch(rows[:500], file, "cpu"), queries)
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert rows_of(FaissSearch(rows[:500], file, "cpu"), queries) == found
    assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_written_does_not_matter(clustered, tmp_path):
    pytest.importorskip("faiss")
    rows, queries = clustered
    kept = rows_of(FaissSearch(rows[:500], tmp_path / "x.faiss", "cpu"), queries)
    assert rows_of(FaissSearch(rows[:500], tmp_path / "nowhere" / "x.faiss", "cpu"), queries) == kept


def test_a_failed_write_leaves_no_half_an_index(clustered, tmp_path, monkeypatch):
    faiss = pytest.importorskip("faiss")

    def fails(index, writer):
        raise RuntimeError("disk full")

    monkeypatch.setattr(faiss, "write_index", fails)
    FaissSearch(clustered[0][:500], tmp_path / "x.faiss", "cpu")
    assert [path.name for path in tmp_path.iterdir() if path.name != "default-store"] == []


def test_a_colleague_can_read_the_index(clustered, tmp_path):
    pytest.importorskip("faiss")
    tmp_path.chmod(0o755)
    before = os.umask(0o077)
    try:
        FaissSearch(clustered[0][:500], tmp_path / "x.faiss", "cpu")
    finally:
        os.umask(before)
    assert (tmp_path / "x.faiss").stat().st_mode & 0o044 == 0o044


def test_places_that_faiss_leaves_empty_are_marked(tmp_path):
    """An inverted file looks into some of its lists, which may hold fewer than n."""
    pytest.importorskip("faiss")
    rng = np.random.default_rng(3)
    centres = np.repeat(np.eye(8), 100, axis=0)
    rows = (centres + 0.01 * rng.normal(size=centres.shape)).astype(np.float16)
    query = torch.nn.functional.one_hot(torch.tensor([0]), 8).float()
    _, found = FaissSearch(rows, tmp_path / "x.faiss", "cpu")(query, 400)
    valid = found[0][found[0] >= 0]
    assert 0 < len(valid) < 400 and (found[0][len(valid) :] == -1).all()


def test_a_small_gallery_is_searched_exactly_without_faiss(rows, queries, tmp_path, monkeypatch, caplog):
    import sys

    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(search, "_SMALL", len(rows))
    caplog.set_level("INFO")
    find = open_search("faiss", rows, tmp_path / "x.faiss", "cpu")
    assert rows_of(find, queries) == rows_of(ExactSearch(rows, "cpu"), queries)
    assert caplog.messages == ["the gallery's 100 images are searched exactly; FAISS is for more than 100"]
    assert not (tmp_path / "x.faiss").exists()


def test_faiss_looks_through_all_of_very_few(rows, queries, tmp_path):
    pytest.importorskip("faiss")
    found = rows_of(FaissSearch(rows[:20], tmp_path / "x.faiss", "cpu"), queries, 20)
    assert all(sorted(row) == list(range(20)) for row in found)


def test_without_faiss_it_is_said_how_to_install_it(rows, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(search, "_SMALL", len(rows) - 1)
    with pytest.raises(SettingError, match=r"@search=faiss needs FAISS.*pip install 'vs2-plugin\[faiss\]'"):
        open_search("faiss", rows, tmp_path / "x.faiss", "cpu")
    open_search("exact", rows, tmp_path / "x.faiss", "cpu")


def test_the_extra_that_the_sentence_names_exists():
    from pathlib import Path

    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    extras = project.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    assert "faiss = [" in extras
