"""The sparse-aware step against autograd of the dense form."""

import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vs2_plugin.sae.product import Precision, multiplies_int8
from vs2_plugin.sae.step import ClassMeans, set_gradients
from vs2_plugin.sae.topk import Latents, SaeConfig, TopKSAE, fvu

D_IN, LATENTS, K = 64, 512, 8
ROWS = Precision(None, torch.bfloat16)
BFLOAT16 = Precision(torch.bfloat16, torch.bfloat16)
INT8 = pytest.param(
    Precision(torch.int8, torch.bfloat16),
    marks=pytest.mark.skipif(not multiplies_int8(), reason="torch has no products of 8-bit integers here"),
)


def dense_gradients(sae, x, dead=None, auxk=0.0):
    """The loss as a formula over dense codes, differentiated by autograd."""
    pre = (x - sae.b_dec) @ sae.encoder.weight.T + sae.encoder.bias
    rank = pre.abs() if sae.config.activation == "abs" else pre
    act = (lambda t: t) if sae.config.activation == "abs" else torch.relu

    chosen = torch.zeros_like(pre).scatter(1, rank.topk(sae.config.k).indices, 1)
    residual = x - (act(pre) * chosen) @ sae.W_dec - sae.b_dec
    variance = (x - x.mean(0)).pow(2).sum()
    loss = residual.pow(2).sum() / variance
    count = 0 if dead is None else int(dead.sum())
    if auxk and count:
        wanted = x.shape[1] // 2
        places = rank.masked_fill(~dead, -torch.inf).topk(min(wanted, count)).indices
        chosen = torch.zeros_like(pre).scatter(1, places, 1)
        guess = (act(pre) * chosen) @ sae.W_dec
        loss = loss + auxk * min(1, count / wanted) * (guess - residual.detach()).pow(2).sum() / variance
    sae.zero_grad()
    loss.backward()
    for row, gradient in zip(sae.W_dec.detach(), sae.W_dec.grad, strict=True):
        gradient -= (gradient @ row) * row
    return loss.detach()


def make_sae(activation, dtype, seed=0):
    torch.manual_seed(seed)
    sae = TopKSAE(SaeConfig(D_IN, LATENTS, K, activation)).to(dtype)
    with torch.no_grad():
        sae.b_dec.normal_()
        sae.encoder.weight *= 0.7  # so that encoder and decoder cannot be mistaken for one another
        if activation == "relu":
            # so negative that some activations have fewer than k active latents
            sae.encoder.bias.normal_(mean=-4)
    return sae, torch.randn(100, D_IN, dtype=dtype) * 2 + 1


def gradients(sae):
    return {name: p.grad.clone() for name, p in sae.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dead_count", [0, 1, 5, 200])
@pytest.mark.parametrize("activation", ["relu", "abs"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_gradients_equal_those_of_the_dense_form(activation, dead_count, dtype, tolerance):
    sae, x = make_sae(activation, dtype)
    dead = torch.zeros(LATENTS, dtype=torch.bool)
    dead[torch.randperm(LATENTS)[:dead_count]] = True
    expected_loss = dense_gradients(sae, x, dead, auxk=0.5)
    expected = gradients(sae)
    loss, _ = set_gradients(sae, x, dead, auxk=0.5)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=tolerance)
    for name, gradient in gradients(sae).items():
        assert (gradient - expected[name]).norm() <= tolerance * expected[name].norm(), name
    assert (sae.W_dec.grad * sae.W_dec).sum(1).abs().max() <= 1e-6


def test_the_cases_above_have_partly_empty_codes():
    sae, x = make_sae("relu", torch.float64)
    active = (sae.encode(x).values > 0).sum(1)
    assert active.min() < K
    assert active.max() > 0


def test_auxk_reaches_the_dead_latents_and_no_others():
    sae, x = make_sae("relu", torch.float64)
    dead = torch.arange(LATENTS) == 7
    changed = {}
    for auxk in (0.0, 1.0):
        set_gradients(sae, x, dead, auxk)
        changed[auxk] = gradients(sae)
    for name in ("encoder.weight", "W_dec"):
        difference = (changed[1.0][name] - changed[0.0][name]).abs().sum(1)
        assert difference.nonzero().flatten().tolist() == [7], name


def fvu_after_training(activation, gradients_of):
    torch.manual_seed(1)
    factors = torch.rand(1000, 40).pow(6)
    data = factors @ torch.randn(40, D_IN)
    torch.manual_seed(0)
    sae = TopKSAE(SaeConfig(D_IN, LATENTS, K, activation))
    with torch.no_grad():
        sae.b_dec.copy_(data.mean(0))
    optimizer = torch.optim.Adam([p for p in sae.parameters() if p.requires_grad], lr=1e-3)
    for step in range(200):
        gradients_of(sae, data[torch.arange(step * 100, step * 100 + 100) % 1000])
        optimizer.step()
        sae.normalize_decoder()
    with torch.no_grad():
        return fvu(data, sae(data)).item()


@pytest.mark.parametrize("activation", ["relu", "abs"])
def test_training_follows_the_dense_form(activation):
    expected = fvu_after_training(activation, dense_gradients)
    assert expected < 0.3  # it learns something
    assert fvu_after_training(activation, set_gradients) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("activation", ["relu", "abs"])
@pytest.mark.parametrize("precision", [BFLOAT16, INT8], ids=str)
def test_training_at_lower_precision_ends_at_nearly_the_same_fvu(activation, precision):
    expected = fvu_after_training(activation, set_gradients)
    found = fvu_after_training(activation, functools.partial(set_gradients, precision=precision))
    assert found == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("precision", [BFLOAT16, INT8], ids=str)
def test_lower_precision_finds_nearly_the_same_latents_and_values(precision):
    sae, x = make_sae("relu", torch.float32)
    _, exact = set_gradients(sae, x)
    _, found = set_gradients(sae, x, precision=precision)
    assert found.values.dtype == torch.float32
    code = torch.zeros(len(x), LATENTS).scatter(1, exact.indices, exact.values)
    same = code.gather(1, found.indices) > 0
    assert same.sum() > 0.97 * (exact.values > 0).sum()
    # Off by rounding x and W_enc, and in bfloat16 the result, to 8 bits each; a sum of d products more where they
    # cancel, and integers more, since those of one row have one unit.
    atol = 0.03 if precision == BFLOAT16 else 0.1
    torch.testing.assert_close(found.values[same], code.gather(1, found.indices)[same], rtol=0.01, atol=atol)


@pytest.mark.parametrize("activation", ["relu", "abs"])
def test_sums_of_rows_in_bfloat16_are_off_by_their_rounding(activation):
    sae, x = make_sae(activation, torch.float32)
    expected_loss, expected_latents = set_gradients(sae, x)
    expected = gradients(sae)
    loss, latents = set_gradients(sae, x, precision=ROWS)
    assert torch.equal(latents.values, expected_latents.values)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-3) and loss != expected_loss
    for name, gradient in gradients(sae).items():
        assert 0 < (gradient - expected[name]).norm() <= 0.01 * expected[name].norm(), name


@pytest.mark.parametrize("activation", ["relu", "abs"])
@pytest.mark.parametrize("dead_count", [0, 20, 200])
@pytest.mark.parametrize("precision", [BFLOAT16, INT8], ids=str)
def test_gradients_at_lower_precision_are_nearly_those_of_float32(activation, dead_count, precision):
    """Of latents that are equally active but for rounding, others may be taken."""
    sae, x = make_sae(activation, torch.float32)
    dead = torch.randperm(LATENTS) < dead_count
    expected_loss = dense_gradients(sae, x, dead, auxk=0.5)
    expected = gradients(sae)
    loss, _ = set_gradients(sae, x, dead, auxk=0.5, precision=precision)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=5e-3)
    for name, gradient in gradients(sae).items():
        apart = (gradient - expected[name]).norm() / expected[name].norm()
        assert apart <= 0.15, (name, apart)


def test_one_step_takes_one_dense_product():
    sae, x = make_sae("relu", torch.float32)
    product = 2 * len(x) * D_IN * LATENTS
    with FlopCounterMode(display=False) as counter:
        set_gradients(sae, x)
    small = 2 * D_IN * LATENTS  # the bias gradient times the encoder: a vector, not the batch
    assert product <= counter.get_total_flops() <= product + small
    with FlopCounterMode(display=False) as counter:
        dense_gradients(sae, x)
    assert counter.get_total_flops() >= 5 * product


@pytest.mark.parametrize("activation", ["relu", "abs"])
def test_the_term_of_pass_has_the_gradients_of_autograd(activation):
    """Against the term written out densely, class by class; one class is absent, one has a single image."""
    torch.manual_seed(0)
    sae = TopKSAE(SaeConfig(16, 48, 6, activation))
    with torch.no_grad():
        sae.b_dec.normal_()
        sae.encoder.bias.normal_(std=0.1)
    x, labels = torch.randn(40, 16), torch.randint(0, 5, (40,)).clamp_max(3)
    labels[0] = 5
    loss, _ = set_gradients(sae, x, classes=ClassMeans(0.8, 7, running=False), labels=labels)
    ours = {name: p.grad.clone() for name, p in sae.named_parameters() if p.requires_grad}

    sae.zero_grad()
    latents = sae.encode(x)
    codes = torch.zeros(40, 48).scatter(1, latents.indices, latents.values)
    spread = sum((codes[labels == c] - codes[labels == c].mean(0)).pow(2).sum() for c in labels.unique())
    error = (x - codes @ sae.W_dec - sae.b_dec).pow(2).sum()
    expected = (error + 0.8 * spread) / (x - x.mean(0)).pow(2).sum()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    sae.W_dec.grad -= (sae.W_dec.grad * sae.W_dec).sum(1, keepdim=True) * sae.W_dec.detach()
    for name, parameter in sae.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-5, atol=1e-6)


def test_running_class_means_forget_a_tenth_with_each_batch_of_the_class():
    classes = ClassMeans(1.0, 3, running=True)
    code = lambda value: Latents(torch.tensor([[value]]), torch.tensor([[2]]))  # noqa: E731
    first, _ = classes(code(1.0), torch.tensor([1]), 4)
    assert first.item() == 0  # the first code is the mean
    classes(code(5.0), torch.tensor([0]), 4)  # another class changes nothing
    term, slope = classes(code(2.0), torch.tensor([1]), 4)
    mean = 0.9 * 1.0 + 0.1 * 2.0
    assert term.item() == pytest.approx((2.0 - mean) ** 2) and slope.item() == pytest.approx(2 * (2.0 - mean))
