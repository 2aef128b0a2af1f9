"""The encoder's product at lower precision, against float64."""

import pytest
import torch

from vs2_plugin.devices import has_bfloat16_units
from vs2_plugin.sae.product import FLOAT32, Precision, Room, _multiply, multiplies_int8, pre_activations
from vs2_plugin.sae.topk import SaeConfig, TopKSAE

D, LATENTS, K, BATCH = 96, 512, 16, 200
needs_int8 = pytest.mark.skipif(not multiplies_int8(), reason="torch has no products of 8-bit integers here")


def make_sae(activation="relu"):
    torch.manual_seed(0)
    sae = TopKSAE(SaeConfig(D, LATENTS, K, activation)).requires_grad_(False)
    if activation == "relu":
        sae.encoder.bias.normal_(std=0.3)
    return sae


def activations(columns, rows):
    """Activations of which some columns and rows are that many times as large as the others."""
    torch.manual_seed(1)
    x = torch.randn(BATCH, D)
    x[:, :3] *= columns
    x[::10] *= rows
    return x


def code_of(sae, x, dtype):
    values, indices = sae.select(pre_activations(sae, x, dtype, Room()))
    return torch.zeros(len(x), LATENTS).scatter(1, indices, values)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_a_product_of_floats_is_in_the_precision_asked_for(dtype):
    """Also where memory is kept from a batch of another shape and precision; nothing of it is differentiated."""
    sae, x, room = make_sae().requires_grad_(True), activations(1, 1).repeat(3, 1)[:LATENTS], Room()
    for before in (None, torch.bfloat16):
        pre_activations(sae, 100 * x[:7], before, room)
        found = pre_activations(sae, x, dtype, room)
        kept = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[found.dtype]
        assert found.dtype == (dtype or torch.float32) and not found.requires_grad
        exact = (x @ sae.encoder.weight.T + sae.encoder.bias).detach()
        assert (found.float() - exact).norm() <= kept * exact.norm() and found.shape == exact.shape


def test_memory_of_the_same_name_and_shape_is_the_same():
    room, x = Room(), torch.ones(3, 2)
    first = room.like(x, "a")
    assert room.like(x, "a") is first and room.like(x, "b") is not first
    assert room.like(x, "a", dtype=torch.int8).dtype == torch.int8
    assert room.like(x, "a", (4, 2), torch.int8).shape == (4, 2)
    assert room.cast(x, "c", torch.float32).data_ptr() == x.data_ptr()


@needs_int8
@pytest.mark.parametrize("size", [1, 1e-10])
def test_weights_of_each_latent_have_a_unit_of_their_own(size):
    """However small the activations are."""
    sae, x = make_sae(), size * activations(1, 1)
    sae.encoder.bias.zero_()
    sae.encoder.weight[::2] *= 300
    found, exact = pre_activations(sae, x, torch.int8, Room()), x @ sae.encoder.weight.T
    assert ((found - exact).norm(dim=0) <= 0.03 * exact.norm(dim=0)).all()


@needs_int8
@pytest.mark.parametrize("activation", ["relu", "abs"])
@pytest.mark.parametrize("columns", [1, 30, 300])
@pytest.mark.parametrize("rows", [1, 0.01, 30])
def test_a_code_in_int8_is_off_by_about_a_hundredth(activation, columns, rows):
    """Also where few dimensions or few activations are far larger than the others."""
    sae, x = make_sae(activation), activations(columns, rows)
    pre = x.double() @ sae.encoder.weight.T.double() + sae.encoder.bias
    off = (pre_activations(sae, x, torch.int8, Room()) - pre).norm(dim=1) / pre.norm(dim=1)
    assert 0 < off.mean() <= 0.015 and off.max() <= 0.03
    exact, code = code_of(sae, x, None), code_of(sae, x, torch.int8)
    both = (exact != 0) & (code != 0)
    assert both.sum() >= 0.95 * (exact != 0).sum()
    assert (code - exact)[both].norm() <= 0.015 * exact.norm()


@needs_int8
def test_integers_are_multiplied_exactly_at_their_limits():
    """Without VNNI, sums of two products are kept in 16 bits: larger integers would be cut off."""
    inputs = torch.tensor([[127] * 64, [1] * 64, [127, 1] * 32], dtype=torch.uint8)
    weights = torch.tensor([[127] * 64, [-127] * 64, [127, -127] * 32], dtype=torch.int8)
    found = _multiply(inputs, weights, torch.tensor([1.0, 2.0, 0.5]))
    exact = (inputs.double() - 64) @ weights.T.double() * torch.tensor([1.0, 2.0, 0.5])
    assert torch.equal(found.double(), exact)


@needs_int8
def test_what_is_zero_stays_finite():
    sae, x = make_sae(), torch.randn(BATCH, D)
    x[:, 0] = 0  # a dimension in which all activations are alike
    x[3] = 0
    sae.encoder.weight[:, 5] = 0
    sae.encoder.weight[7] = 0
    pre = pre_activations(sae, x, torch.int8, Room())
    exact = x @ sae.encoder.weight.T + sae.encoder.bias
    torch.testing.assert_close(pre, exact, atol=0.1 * exact.std().item(), rtol=0)
    assert torch.equal(pre[3], sae.encoder.bias) and torch.equal(pre[:, 7], sae.encoder.bias[7].expand(BATCH))


@needs_int8
@pytest.mark.parametrize("where", ["weight", "input"])
def test_what_is_not_a_number_is_not_hidden(where):
    """A training that diverges must be seen to."""
    sae, x = make_sae("abs"), torch.randn(BATCH, D)
    (sae.encoder.weight if where == "weight" else x)[4, 4] = torch.nan
    assert code_of(sae, x, torch.int8).isnan().any()


@needs_int8
def test_memory_that_is_kept_holds_nothing_of_the_step_before():
    sae, x, room = make_sae(), activations(30, 1), Room()
    pre_activations(sae, 100 * x.flip(0), torch.int8, room)
    assert torch.equal(pre_activations(sae, x, torch.int8, room), pre_activations(sae, x, torch.int8, Room()))


def test_where_integers_would_be_used_they_are_multiplied():
    """Were they not, all tests of them would be left out."""
    if has_bfloat16_units() is not False or not torch.backends.mkldnn.is_available():
        pytest.skip("this processor does not need them, or this build of torch has no oneDNN")
    assert multiplies_int8()


LARGE = (1024, 768, 3072)


@pytest.mark.parametrize(
    ("units", "device", "shape", "product", "rows"),
    [
        (True, "cpu", LARGE, torch.bfloat16, torch.bfloat16),
        (True, "cpu", (64, 8, 64), torch.bfloat16, torch.bfloat16),
        (False, "cpu", LARGE, torch.int8, torch.bfloat16),
        (False, "cpu", (256, 768, 3072), None, torch.bfloat16),  # rounding the weights takes longer
        (False, "cpu", (1024, 64, 512), None, torch.bfloat16),
        (None, "cpu", LARGE, None, None),
        (True, "cuda", LARGE, None, None),
    ],
)
def test_precision_is_told_by_processor_and_shape(units, device, shape, product, rows, monkeypatch):
    monkeypatch.setattr("vs2_plugin.sae.product.has_bfloat16_units", lambda: units)
    monkeypatch.setattr("vs2_plugin.sae.product.multiplies_int8", lambda: True)
    assert Precision.fastest(torch.device(device), *shape) == Precision(product, rows)


@pytest.mark.parametrize("error", [AttributeError, NotImplementedError, RuntimeError, TypeError, None])
def test_without_products_of_integers_they_are_float32(error, monkeypatch):
    """A build of torch without them, or one whose results are wrong."""

    def fails(inputs, weights, unit):
        if error is None:
            return torch.zeros(len(inputs), len(weights))
        raise error("no such operator")

    monkeypatch.setattr("vs2_plugin.sae.product._multiply", fails)
    monkeypatch.setattr("vs2_plugin.sae.product.has_bfloat16_units", lambda: False)
    multiplies_int8.cache_clear()
    try:
        assert not multiplies_int8()
        assert Precision.fastest(torch.device("cpu"), *LARGE) == FLOAT32._replace(rows=torch.bfloat16)
    finally:
        multiplies_int8.cache_clear()
