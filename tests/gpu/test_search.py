"""Search in a gallery on a GPU."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vs2_plugin.gallery import search

from .conftest import GPU, needs_gpu

pytestmark = pytest.mark.gpu


@pytest.fixture
def gallery():
    return np.random.default_rng(0).standard_normal((5000, 64)).astype(np.float16)


@pytest.mark.parametrize("resident", [True, False])
def test_exact_search_finds_what_it_finds_on_the_cpu(gallery, resident, monkeypatch):
    monkeypatch.setattr(search, "_BLOCK", 1024)
    if not resident:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    torch.manual_seed(0)
    queries = F.normalize(torch.randn(40, 64), dim=-1)
    expected = search.ExactSearch(gallery, "cpu")(queries, 10)
    found = search.open_search("exact", gallery, None, GPU)(queries.to(GPU), 10)
    torch.testing.assert_close(found[0].cpu(), expected[0], rtol=0, atol=1e-6)
    assert (found[1].cpu() == expected[1]).float().mean() > 0.99  # two may be equally near but for rounding


@needs_gpu
@pytest.mark.parametrize(
    ("dtype", "width", "batch"), [(np.float16, 64, 40), (np.float32, 64, 40), (np.float16, 200, 300)]
)
@pytest.mark.parametrize("kernels", [True, False])
def test_a_large_gallery_is_searched_as_on_the_cpu(dtype, width, batch, kernels, monkeypatch):
    rows = np.random.default_rng(0).standard_normal((70_001, width)).astype(dtype)
    torch.manual_seed(0)
    queries = F.normalize(torch.randn(batch, width), dim=-1)
    expected = search.ExactSearch(rows, "cpu")(queries, 50)
    if not kernels:
        monkeypatch.setattr(search.ScreenedSearch, "_rounded", staticmethod(lambda rows: None))
    found = search.open_search("exact", rows, None, GPU)
    assert isinstance(found, search.ScreenedSearch) and isinstance(found._candidates, search._Halves) != kernels
    cosines, where = found(queries.to(GPU), 50)
    torch.testing.assert_close(cosines.cpu(), expected[0], rtol=0, atol=1e-6)
    assert (where.cpu() == expected[1]).float().mean() > 0.99


def test_faiss_answers_on_the_gpu(gallery, tmp_path):
    pytest.importorskip("faiss")
    torch.manual_seed(0)
    queries = F.normalize(torch.randn(4, 64), dim=-1).to(GPU)
    cosines, rows = search.FaissSearch(gallery, tmp_path / "clip.faiss", GPU)(queries, 5)
    assert cosines.device.type == rows.device.type == GPU and cosines.shape == rows.shape == (4, 5)
