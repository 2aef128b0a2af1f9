"""An SAE that is there, measured on activations."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from vs2_plugin.errors import CheckpointError, DataError
from vs2_plugin.sae.adopt import adopt
from vs2_plugin.sae.foreign import ForeignSAE
from vs2_plugin.sae.topk import SaeConfig, TopKSAE, fvu, sample_fvu


@pytest.fixture
def found():
    torch.manual_seed(0)
    sae = TopKSAE(SaeConfig(16, 32, 4, "relu", "layer_norm")).eval().requires_grad_(False)
    return ForeignSAE(sae, "Prisma", 11, None)


def test_it_is_measured_and_not_changed(found):
    x = torch.randn(300, 16, generator=torch.Generator().manual_seed(1))
    before = {name: tensor.clone() for name, tensor in found.sae.state_dict().items()}
    calibration = np.arange(300) < 200
    sae, mean, figures = adopt(found, x.numpy(), calibration)
    assert all(torch.equal(tensor, before[name]) for name, tensor in sae.state_dict().items())
    torch.testing.assert_close(mean, x.mean(0))
    order = np.random.default_rng(0).permutation(300)
    held, others = x[np.sort(order[:150])], x[order[150:]]
    assert figures.fvu == pytest.approx(fvu(held, sae(held)).item(), abs=1e-5)
    calibrated = x[np.sort(order[:150][calibration[order[:150]]])]
    median = sample_fvu(calibrated, sae(calibrated), mean).double().quantile(0.5).item()
    assert figures.fvu_quantiles["0.5"] == pytest.approx(median, abs=1e-6)
    active = torch.zeros(32, dtype=torch.bool)
    active[sae.encode(others).indices[sae.encode(others).values > 0]] = True
    assert figures.dead == pytest.approx(1 - active.float().mean().item(), abs=1e-6)
    assert (figures.held_out_count, figures.train_count, figures.steps) == (150, 0, 0)


def test_principal_components_beside_it_have_not_seen_what_they_explain(found):
    noise = np.random.default_rng(0).normal(size=(24, 16)).astype(np.float32)
    figures = adopt(found, noise, np.ones(24, dtype=bool)).figures
    order = np.random.default_rng(0).permutation(24)
    held, others = noise[order[:12]], noise[order[12:]]
    centre = others.mean(0)
    components = np.linalg.svd(others - centre)[2][:4]
    rest = (held - centre) - (held - centre) @ components.T @ components
    assert figures.pca_fvu == pytest.approx((rest**2).sum() / ((held - held.mean(0)) ** 2).sum(), abs=1e-4)


def test_activations_of_another_width_are_refused(found):
    x = torch.randn(30, 8).numpy()
    for block, other in ((11, "--model$"), (None, "--blocks or --model$")):
        with pytest.raises(CheckpointError, match=f"of width 16, but those at this site have 8; .* or another {other}"):
            adopt(replace(found, block=block), x, np.ones(30, dtype=bool))


def test_a_few_activations_are_needed(found):
    with pytest.raises(DataError, match="3 activations to measure the SAE on; expected at least 4"):
        adopt(found, np.eye(3, 16, dtype=np.float32), np.ones(3, dtype=bool))
    assert adopt(found, np.eye(4, 16, dtype=np.float32), np.ones(4, dtype=bool)).figures.held_out_count == 2


def test_activations_that_are_not_finite_are_refused(found):
    x = torch.randn(30, 16)
    x[3] = torch.inf
    with pytest.raises(DataError, match="not finite"):
        adopt(found, x.numpy(), np.ones(30, dtype=bool))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_thresholds_are_not_of_next_to_no_activations(count, found):
    x = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    held = np.random.default_rng(0).permutation(300)[:150]
    calibration = np.zeros(300, bool)
    calibration[held[:count]] = True
    with pytest.raises(DataError, match=f"^{count or 'none'} of the held-out activations .* need 4 or more; take more"):
        adopt(found, x.numpy(), calibration)
