"""The step of a GPU, its kernels run on the processor by Triton's interpreter."""

import contextlib

import pytest
import torch

from vs2_plugin.sae.step import ClassMeans, set_gradients
from vs2_plugin.sae.topk import Latents, SaeConfig, TopKSAE

pytest.importorskip("triton", reason="torch comes without Triton here")

D, LATENTS, K, BATCH = 12, 22, 4, 6


@pytest.fixture(scope="module")
def gpu(interpreted):
    """The module, with interpreted kernels and float32 in place of bfloat16, which the interpreter does not round."""
    with interpreted("vs2_plugin.sae.kernels", "vs2_plugin.sae.gpu") as module:
        yield module


@pytest.fixture
def here(gpu, monkeypatch):
    """What only a GPU has, done without; and float32 for bfloat16, to which the interpreter does not round."""
    product = torch.mm
    monkeypatch.setattr(torch, "mm", lambda one, other, out_dtype=None: product(one.float(), other.float()))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: contextlib.nullcontext())
    monkeypatch.setattr(gpu, "_HALF", torch.float32)
    monkeypatch.setattr(gpu, "Replayed", lambda room=None: lambda work: work())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return gpu


def rows_of(n):
    """Rows whose largest numbers are easy and hard to find."""
    torch.manual_seed(0)
    normal = torch.randn(n)
    few = torch.where(torch.rand(n) < 0.01, normal.abs(), -0.0)
    beside_each_other = normal + 10 * (torch.arange(n) < n // 3)
    return torch.stack([normal, normal.mul(2).round(), torch.zeros(n), few, beside_each_other])


def selected(gpu, x, k, activation="relu"):
    latents = Latents(torch.full((len(x), k), torch.nan), torch.full((len(x), k), -1))
    codes = torch.zeros_like(x)
    gpu.select(x, activation, latents, codes)
    return latents, codes


@pytest.mark.parametrize(
    ("n", "k", "dtype", "activation"),
    [
        (1024, 3, torch.bfloat16, "relu"),
        (1500, 40, torch.bfloat16, "abs"),
        (3072, 5, torch.float32, "relu"),
        (50, 50, torch.bfloat16, "relu"),
        (51, 30, torch.float32, "abs"),
        (700, 1, torch.bfloat16, "abs"),
    ],
    ids=str,
)
def test_the_largest_are_those_of_topk(gpu, n, k, dtype, activation):
    x = rows_of(n).to(dtype)
    (values, found), codes = selected(gpu, x, k, activation)
    assert all(len(set(row.tolist())) == k for row in found)
    ranked = x.abs() if activation == "abs" else x
    assert torch.equal(ranked.gather(1, found).sort(descending=True).values, ranked.topk(k).values)
    own = x.gather(1, found) if activation == "abs" else x.gather(1, found).relu()
    assert torch.equal(values, own.float())
    assert torch.equal(codes, torch.zeros_like(x).scatter_(1, found, own))


def test_a_row_that_is_no_number_has_places_all_the_same(gpu):
    (_, found), _ = selected(gpu, torch.full((1, 1024), torch.nan), 5)
    assert len(set(found[0].tolist())) == 5


def make_sae(activation):
    torch.manual_seed(0)
    sae = TopKSAE(SaeConfig(D, LATENTS, K, activation))
    with torch.no_grad():
        sae.b_dec.normal_()
        if activation == "relu":
            sae.encoder.bias.normal_(mean=-0.5)  # some activations have fewer than K active latents
    return sae, torch.optim.Adam([p for p in sae.parameters() if p.requires_grad], lr=1e-2)


def test_where_it_cannot_be_the_optimizer_is_as_it_was(here, monkeypatch):
    """Torch's own step goes on with it, and takes no moments and no count of steps from here."""
    monkeypatch.setattr(torch, "mm", lambda one, other: one @ other)  # without the out_dtype of torch 2.8
    sae, optimizer = make_sae("abs")
    with pytest.raises(TypeError, match="out_dtype"):
        here.GpuStep(sae, optimizer, torch.zeros(LATENTS, dtype=torch.long))
    assert not optimizer.state


@pytest.mark.parametrize(
    ("activation", "extra"),
    [("relu", "plain"), ("abs", "plain"), ("relu", "auxk"), ("abs", "auxk"), ("abs", "pass")],
)
def test_steps_are_those_of_the_plain_path_and_of_torchs_adam(here, activation, extra):
    (sae, optimizer), (other, adam) = make_sae(activation), make_sae(activation)
    silent, scale = torch.arange(LATENTS), 2.0
    step = here.GpuStep(sae, optimizer, silent, scale)
    dead = torch.arange(LATENTS) % (5 if activation == "relu" else 2) == 0  # fewer than d / 2, and more
    auxk = 0.5 if extra == "auxk" else 0.0
    for number in range(1, 3):
        x, labels = torch.randn(BATCH, D) + 1, torch.randint(4, (BATCH,))
        classes, same = (ClassMeans(0.8, 4, False) if extra == "pass" else None for _ in range(2))
        before = sae.W_dec.detach().clone()
        counted = silent.clone()
        latents = step.step(x * scale, 1e-2, number, dead, auxk, classes, labels)
        _, expected = set_gradients(other, x, dead, auxk, classes=same, labels=labels)
        assert torch.equal(latents.indices.sort().values, expected.indices.sort().values)
        active = expected.indices[expected.values != 0].unique()
        assert torch.equal(silent, (counted + 1).index_fill(0, active, 0))
        for (name, weight), wanted in zip(sae.named_parameters(), other.parameters(), strict=True):
            if weight.requires_grad:
                gradient = weight.grad.clone()
                if name == "W_dec":
                    gradient -= (gradient * before).sum(1, keepdim=True) * before
                assert (gradient - wanted.grad).norm() <= 1e-5 * wanted.grad.norm(), name
                wanted.grad = gradient
        adam.step()
        other.normalize_decoder()
        for (name, weight), wanted in zip(sae.named_parameters(), other.parameters(), strict=True):
            assert (weight - wanted).norm() <= 1e-5 * wanted.norm(), name
