"""Search by Triton kernels, run on the processor by Triton's interpreter."""

import contextlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vs2_plugin.gallery.search import ExactSearch, ScreenedSearch

pytest.importorskip("triton", reason="torch comes without Triton here")


@pytest.fixture(scope="module")
def kernels(interpreted):
    with interpreted("vs2_plugin.gallery.kernels") as module:
        yield module


@pytest.mark.parametrize(
    ("count", "width", "batch", "n", "dtype"),
    [
        (530, 64, 2, 5, np.float16), (300, 40, 1, 3, np.float32), (7, 64, 2, 7, np.float16),
        (6000, 32, 2, 3, np.float16),
    ],
)
def test_they_find_what_exact_search_does(kernels, count, width, batch, n, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: contextlib.nullcontext())
    rows = np.random.default_rng(0).standard_normal((count, width)).astype(dtype)
    queries = F.normalize(torch.randn(batch, width, generator=torch.Generator().manual_seed(0)), dim=-1)
    search = ScreenedSearch(rows, "cpu")
    search._candidates = kernels.Rounded(torch.from_numpy(rows))
    cosines, found = search(queries, n)
    expected, where = ExactSearch(rows, "cpu")(queries, n)
    assert torch.equal(found, where)
    torch.testing.assert_close(cosines, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("common", "apart"), [(200.0, 0.0), (0.0, 100.0)])
def test_what_all_have_in_common_or_one_coordinate_holds_hides_no_other(kernels, common, apart, monkeypatch):
    """As in CLIP's embeddings: in units of the largest coordinate, the others would be rounded away."""
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: contextlib.nullcontext())
    draw = torch.Generator().manual_seed(0)
    rows, queries = (torch.randn(count, 1024, generator=draw) for count in (6000, 8))
    for some in (rows, queries):
        some[:, 5] += common + apart * some[:, 5].sign()
    queries = F.normalize(queries, dim=-1)
    _, places = kernels.Rounded(rows)(queries, 2 * 10 + 32)
    expected = ExactSearch(rows.numpy(), "cpu")(queries, 10)[1]
    assert all(set(some) <= set(found) for some, found in zip(expected.tolist(), places.tolist(), strict=True))
