"""The step of a GPU, its kernels run on the processor by Triton's interpreter."""

import contextlib

import pytest
import torch

from vs2_plugin.sae.step import ClassMeans, set_gradients
from vs2_plugin.sae.topk import SaeConfig, TopKSAE

pytest.importorskip("triton", reason="torch comes without Triton here")

D, LATENTS, K, BATCH = 24, 50, 6, 12


@pytest.fixture(scope="module")
def gpu(interpreted):
    """The module, with interpreted kernels and float32 in place of bfloat16, which the interpreter does not round."""
    with interpreted("vs2_plugin.sae.kernels", "vs2_plugin.sae.gpu") as module:
        yield module


@pytest.fixture
def here(gpu, monkeypatch):
    """What only a GPU has, done without."""
    product = torch.mm
    monkeypatch.setattr(torch, "mm", lambda one, other, out_dtype=None: product(one.float(), other.float()))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: contextlib.nullcontext())
    monkeypatch.setattr(torch, "autocast", lambda *given: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.float().clone())
    monkeypatch.setattr(gpu, "Replayed", lambda work: work)
    empty = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda like, dtype=None: empty(like))
    return gpu


def rows(kind, n):
    torch.manual_seed(0)
    x = torch.randn(2, n)
    if kind == "ties":
        return x.mul(2).round()
    if kind == "equal":
        return torch.zeros(2, n)
    if kind == "few":
        return torch.where(torch.rand(2, n) < 0.01, x.abs(), -0.0)
    if kind == "crowded":  # the largest lie in a few groups, which hold more of them than the kernel has room for
        x[:, torch.arange(n) % 512 < 6] += 10
    return x


@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "few", "crowded"])
@pytest.mark.parametrize(("n", "k"), [(1024, 3), (1500, 40), (3072, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_largest_are_those_of_topk(gpu, n, k, kind, dtype):
    x = rows(kind, n).to(dtype)
    found = gpu.places_of_largest(x, k)
    assert all(len(set(row.tolist())) == k for row in found)
    assert torch.equal(x.gather(1, found).sort(descending=True).values, x.topk(k).values)


def test_a_row_that_is_no_number_has_places_all_the_same(gpu):
    assert sorted(gpu.places_of_largest(torch.full((1, 1024), torch.nan), 5)[0].tolist()) == [0, 1, 2, 3, 4]


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
        here.GpuStep(sae, optimizer)
    assert not optimizer.state


@pytest.mark.parametrize("activation", ["relu", "abs"])
@pytest.mark.parametrize("extra", ["plain", "auxk", "pass"])
def test_steps_are_those_of_the_plain_path_and_of_torchs_adam(here, activation, extra):
    (sae, optimizer), (other, adam) = make_sae(activation), make_sae(activation)
    step = here.GpuStep(sae, optimizer)
    dead = torch.arange(LATENTS) % 5 == 0
    auxk = 0.5 if extra == "auxk" else 0.0
    for number in range(1, 3):
        x, labels = torch.randn(BATCH, D) + 1, torch.randint(4, (BATCH,))
        classes, same = (ClassMeans(0.8, 4, False) if extra == "pass" else None for _ in range(2))
        before = sae.W_dec.detach().clone()
        latents = step.step(x, 1e-2, number, dead, auxk, classes, labels)
        _, expected = set_gradients(other, x, dead, auxk, False, same, labels)
        assert torch.equal(latents.indices.sort().values, expected.indices.sort().values)
        for (name, weight), wanted in zip(sae.named_parameters(), other.parameters(), strict=True):
            if weight.requires_grad:
                gradient = weight.grad.clone()
                if name == "W_dec":
                    gradient -= (gradient * before).sum(1, keepdim=True) * before
                # The interpreter cuts bfloat16 off, where a GPU rounds.
                assert (gradient - wanted.grad).norm() <= 0.01 * wanted.grad.norm(), name
                wanted.grad = gradient
        adam.step()
        other.normalize_decoder()
        for (name, weight), wanted in zip(sae.named_parameters(), other.parameters(), strict=True):
            assert (weight - wanted).norm() <= 1e-5 * wanted.norm(), name
        step.read_weights()  # the interpreter does not write bfloat16
