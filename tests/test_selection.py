"""Selection of the largest numbers, against torch's own."""

import pytest
import torch

from vs2_plugin.selection import largest, largest_above_zero


def some_rows(columns, dtype, count=20):
    torch.manual_seed(0)
    rows = (torch.randn(count, columns) - 1).to(dtype)
    rows[:7] = -rows[:7].abs()  # nothing positive
    rows[3, 5:9] = torch.tensor([torch.inf, -torch.inf, -0.0, 0.0])
    return rows


COLUMNS = [(3072, 64), (3072, 8), (64, 16), (100, 7), (9, 9), (1 << 16, 5), ((1 << 16) + 8, 5), ((1 << 16) + 1, 5)]


@pytest.fixture(params=[True, False], ids=["by numpy", "by torch"])
def chosen(request, monkeypatch):
    """What selects."""
    monkeypatch.setattr("vs2_plugin.selection.partitions_fast", lambda: request.param)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr("vs2_plugin.selection._AT_ONCE", 30_000)  # some rows at once, and the last few


@pytest.mark.parametrize("first", [0, 7], ids=["with rows below zero", "others"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("columns", "k"), COLUMNS)
def test_numbers_are_selected_in_the_order_of_torch(columns, k, dtype, first, chosen):
    rows = some_rows(columns, dtype)[first:]
    values, places = largest(rows, k)
    assert torch.equal(values.sort(descending=True).values, rows.topk(k).values)
    assert torch.equal(rows.gather(1, places), values)
    assert all(len(set(row)) == k for row in places.tolist())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("columns", "k"), COLUMNS)
def test_numbers_above_zero_are_selected_in_the_order_of_torch(columns, k, dtype, chosen):
    rows = some_rows(columns, dtype)
    values, places = largest_above_zero(rows, k)
    assert torch.equal(values.relu().sort(descending=True).values, rows.relu().topk(k).values)
    assert torch.equal(rows.gather(1, places), values)
    assert all(len(set(row)) == k for row in places.tolist())
    for count in (0, 1):
        assert [found.shape for found in largest_above_zero(rows[:count], k)] == [(count, k)] * 2


@pytest.mark.parametrize("select", [largest, largest_above_zero])
@pytest.mark.parametrize("columns", [64, 3072])
def test_rows_have_any_shape_and_values_gradients(select, columns, chosen):
    rows = torch.randn(2, 3, columns)
    expected = rows.topk(4, sorted=True)
    for some, best in ((rows, expected), (rows[0, 1], tuple(part[0, 1] for part in expected))):
        values, places = select(some.clone().requires_grad_(), 4)
        order = values.argsort(descending=True)
        assert torch.equal(values.gather(-1, order), best[0]) and torch.equal(places.gather(-1, order), best[1])
        assert values.requires_grad
