"""SAEs that are trained on a GPU."""

import json

import numpy as np
import pytest
import torch

from vs2_plugin.sae.config import TrainConfig
from vs2_plugin.sae.step import ClassMeans, set_gradients
from vs2_plugin.sae.topk import SaeConfig, TopKSAE
from vs2_plugin.sae.train import Job, train_sae, train_saes

from .conftest import NAME

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
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        sae = TopKSAE(SaeConfig(32, 128, 8, activation)).to(device)
        x = torch.from_numpy(activations[0][:256]).to(device)
        labels = torch.from_numpy(activations[1][:256]).to(device)
        classes = ClassMeans(0.8, 5, extra == "running") if extra in ("pass", "running") else None
        dead = torch.arange(128, device=device) % 7 == 0 if extra == "auxk" else None
        loss, _ = set_gradients(sae, x, dead, 0.5 if extra == "auxk" else 0.0, False, classes, labels)
        gradients.append({"loss": loss, **{name: weight.grad for name, weight in sae.named_parameters()}})
    for name, expected in gradients[0].items():
        if expected is not None:
            torch.testing.assert_close(gradients[1][name].cpu(), expected, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("settings", [{}, {"activation": "abs"}, {"pass_weight": 0.8}], ids=str)
def test_an_sae_comes_out_as_good_as_on_the_cpu(activations, settings):
    config = TrainConfig(expansion_factor=8, k=8, samples=60_000, **settings)
    rows, labels = activations
    one, other = (
        train_sae(rows, config, labels=labels, device=device, quiet=True) for device in ("cpu", "cuda")
    )
    assert other.figures.fvu == pytest.approx(one.figures.fvu, abs=0.02)
    assert other.figures.dead == pytest.approx(one.figures.dead, abs=0.05)
    assert other.figures.fvu_quantiles["0.5"] == pytest.approx(one.figures.fvu_quantiles["0.5"], abs=0.03)
    assert {weight.device.type for weight in (*other.sae.parameters(), other.mean)} == {"cpu"}


def test_a_training_that_was_saved_goes_on_with_the_same_bits(activations, tmp_path):
    jobs = [Job("SAE", activations[0], TrainConfig(expansion_factor=4, k=4, samples=20_000))]
    first, again = (
        train_saes(jobs, device="cuda", quiet=True, states=tmp_path, save_every=0)[0] for _ in range(2)
    )
    assert again.figures.seconds != 0 and (tmp_path / "0.safetensors").is_file()
    for name, weight in first.sae.state_dict().items():
        assert torch.equal(again.sae.state_dict()[name], weight), name


def test_the_command_writes_a_checkpoint(here):
    manifest = json.loads((here / "store/checkpoints" / NAME / "vs2.json").read_text())
    assert [site["variant"] for site in manifest["sites"]] == ["plain", "plain", "pass", "pass"]
    assert all(0 < site["fvu"] < 1 for site in manifest["sites"])
