"""SAEs that are trained on a GPU."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from vs2_plugin.sae import train
from vs2_plugin.sae.config import TrainConfig
from vs2_plugin.sae.source import Source
from vs2_plugin.sae.step import ClassMeans, set_gradients
from vs2_plugin.sae.topk import Latents, SaeConfig, TopKSAE
from vs2_plugin.sae.train import Job, train_sae, train_saes

from .conftest import GPU, NAME, needs_gpu

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def activations():
    """Sparse mixtures of 80 directions, ``[3000, 32]``, with a class each."""
    rng = np.random.default_rng(0)
    codes = rng.exponential(size=(3000, 80)) * (rng.random((3000, 80)) < 0.05)
    return (codes @ rng.standard_normal((80, 32)) + 3).astype(np.float32), rng.integers(5, size=3000)


@pytest.mark.parametrize("activation", ["relu", "abs"])
@pytest.mark.parametrize("extra", ["plain", "auxk", "pass", "running"])
def test_gradients_are_those_of_the_cpu(activations, activation, extra):
    gradients = []
    for device in ("cpu", GPU):
        torch.manual_seed(0)
        sae = TopKSAE(SaeConfig(32, 128, 8, activation)).to(device)
        x = torch.from_numpy(activations[0][:256]).to(device)
        labels = torch.from_numpy(activations[1][:256]).to(device)
        classes = ClassMeans(0.8, 5, extra == "running") if extra in ("pass", "running") else None
        dead = torch.arange(128, device=device) % 7 == 0 if extra == "auxk" else None
        loss, _ = set_gradients(sae, x, dead, 0.5 if extra == "auxk" else 0.0, classes=classes, labels=labels)
        gradients.append({"loss": loss, **{name: weight.grad for name, weight in sae.named_parameters()}})
    for name, expected in gradients[0].items():
        if expected is not None:
            torch.testing.assert_close(gradients[1][name].cpu(), expected, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("settings", [{}, {"activation": "abs"}, {"pass_weight": 0.8}], ids=str)
def test_an_sae_comes_out_as_good_as_on_the_cpu(activations, settings):
    config = TrainConfig(expansion_factor=8, k=8, samples=60_000, **settings)
    rows, labels = activations
    one, other = (train_sae(rows, config, labels=labels, device=device, quiet=True) for device in ("cpu", GPU))
    assert other.figures.fvu == pytest.approx(one.figures.fvu, abs=0.02)
    assert other.figures.dead == pytest.approx(one.figures.dead, abs=0.05)
    assert other.figures.fvu_quantiles["0.5"] == pytest.approx(one.figures.fvu_quantiles["0.5"], abs=0.03)
    assert {weight.device.type for weight in (*other.sae.parameters(), other.mean)} == {"cpu"}


def test_a_training_that_was_saved_goes_on_with_the_same_bits(activations, tmp_path):
    jobs = [Job("SAE", activations[0], TrainConfig(expansion_factor=4, k=4, samples=20_000))]
    first, again = (train_saes(jobs, device=GPU, quiet=True, states=tmp_path, save_every=0)[0] for _ in range(2))
    assert again.figures.seconds != 0 and (tmp_path / "0.safetensors").is_file()
    for name, weight in first.sae.state_dict().items():
        assert torch.equal(again.sae.state_dict()[name], weight), name


def test_the_command_writes_a_checkpoint(here):
    manifest = json.loads((here / "store/checkpoints" / NAME / "vs2.json").read_text())
    assert [site["variant"] for site in manifest["sites"]] == ["plain", "plain", "pass", "pass"]
    assert all(0 < site["fvu"] < 1 for site in manifest["sites"])


#: 1,536 latents: enough for the kernel that selects.
WIDE = TrainConfig(expansion_factor=48, k=32, sae_batch_size=512, samples=40_000)


@needs_gpu
@pytest.mark.parametrize("settings", [{}, {"activation": "abs"}, {"pass_weight": 0.8}, {"dead_after": 2}], ids=str)
def test_kernels_train_as_well_as_torchs_operators(activations, settings, monkeypatch):
    config = replace(WIDE, **settings)
    kernels = train_sae(activations[0], config, labels=activations[1], device=GPU, quiet=True)
    again = train_sae(activations[0], config, labels=activations[1], device=GPU, quiet=True)
    monkeypatch.setattr(train, "_gpu_step", lambda *given: None)
    plain = train_sae(activations[0], config, labels=activations[1], device=GPU, quiet=True)
    assert kernels.figures.fvu == pytest.approx(plain.figures.fvu, rel=0.02, abs=0.01)
    for name, weight in kernels.sae.state_dict().items():
        assert torch.equal(again.sae.state_dict()[name], weight), name


@needs_gpu
@pytest.mark.parametrize("activation", ["relu", "abs"])
def test_gradients_of_dead_latents_are_those_of_torchs_operators(activations, activation):
    """Told and replayed, of few and of many of them."""
    from vs2_plugin.sae.gpu import GpuStep

    torch.manual_seed(0)
    sae = TopKSAE(SaeConfig(32, 1536, 16, activation)).to(GPU)
    adam = torch.optim.Adam([weight for weight in sae.parameters() if weight.requires_grad])
    step = GpuStep(sae, adam, torch.zeros(1536, dtype=torch.long, device=GPU))
    x = torch.from_numpy(activations[0][:512]).to(GPU)
    for number, count in enumerate([3, 700, 700, 3, 700, 3, 650, 700], 1):
        dead = torch.randperm(1536, device=GPU) < count
        other = copy.deepcopy(sae)
        set_gradients(other, x, dead, 0.5)
        step.step(x, 1e-3, number, dead, 0.5)
        for name in ("encoder.weight", "encoder.bias", "b_dec"):
            found, expected = (model.get_parameter(name).grad.flatten() for model in (sae, other))
            assert torch.cosine_similarity(found, expected, dim=0) > 0.99, (number, name)


@needs_gpu
@pytest.mark.parametrize("activation", ["relu", "abs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("n", "k"), [(1024, 1), (3072, 64), (10_240, 128), (49_152, 64), (5000, 300), (60, 60), (70, 40), (200_000, 32)]
)
def test_the_largest_are_those_of_topk(n, k, dtype, activation):
    from vs2_plugin.sae.gpu import select

    torch.manual_seed(0)
    noise = torch.randn(200, n, device=GPU)
    beside_each_other = noise + 10 * (torch.arange(n, device=GPU) < n // 3)
    for rows in (noise, noise.mul(2).round(), noise.relu(), beside_each_other):
        x = rows.to(dtype)
        values, found = latents = Latents(noise.new_empty(200, k), noise.new_empty(200, k, dtype=torch.long))
        codes = torch.zeros_like(x)
        select(x, activation, latents, codes)
        assert (found.sort(1).values.diff(dim=1) > 0).all()
        ranked = x.abs() if activation == "abs" else x
        assert torch.equal(ranked.gather(1, found).sort(1, descending=True).values, ranked.topk(k).values)
        own = x.gather(1, found) if activation == "abs" else x.gather(1, found).relu()
        assert torch.equal(values, own.float())
        assert torch.equal(codes, torch.zeros_like(x).scatter_(1, found, own))


def test_a_training_that_was_interrupted_ends_with_the_same_bits(activations, tmp_path, monkeypatch):
    jobs = [Job("SAE", activations[0], replace(WIDE, dead_after=5))]
    whole = train_saes(jobs, device=GPU, quiet=True)[0]
    take = train._Run.step

    def stop(run, x, chosen, step):
        if step == 50:
            raise KeyboardInterrupt
        take(run, x, chosen, step)

    with monkeypatch.context() as patch:
        patch.setattr(train._Run, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            train_saes(jobs, device=GPU, quiet=True, states=tmp_path, save_every=0)
    rest = train_saes(jobs, device=GPU, quiet=True, states=tmp_path, save_every=0)[0]
    for name, weight in whole.sae.state_dict().items():
        assert torch.equal(rest.sae.state_dict()[name], weight), name


@needs_gpu
def test_where_the_kernels_fail_torchs_operators_train(activations, monkeypatch, caplog):
    monkeypatch.setattr("vs2_plugin.sae.gpu.GpuStep._set_gradients", lambda *given: 1 / 0)
    trained = train_sae(activations[0], WIDE, device=GPU, quiet=True)
    assert "torch's own operators" in caplog.text
    assert np.isfinite(trained.figures.fvu)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_moments_are_those_of_the_cpu(dtype):
    rows = (np.random.default_rng(0).standard_normal((70_000, 33)) + 300).astype(dtype)  # in two parts
    one, other = Source(rows, "cpu"), Source(rows, GPU)
    assert other.mean.device.type == "cpu"
    torch.testing.assert_close(other.mean, one.mean, rtol=1e-7, atol=0)
    assert other.variance == pytest.approx(one.variance, rel=1e-12)


def test_activations_that_do_not_fit_are_read_batch_by_batch(activations, monkeypatch):
    held = train_sae(activations[0], WIDE, device=GPU, quiet=True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    read = train_sae(activations[0], WIDE, device=GPU, quiet=True)
    assert torch.equal(held.sae.W_dec, read.sae.W_dec)
