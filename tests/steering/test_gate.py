"""The gate's arithmetic and bookkeeping."""

import pytest
import torch

from vs2_plugin.errors import CheckpointError
from vs2_plugin.steering.gate import Gate, threshold


@pytest.fixture
def parts(make_sae):
    sae = make_sae()
    torch.manual_seed(3)
    return sae, torch.randn(32), torch.randn(40, 32)


def test_thresholds_are_the_stored_quantiles_and_between_them():
    stored = {"0.5": 0.1, "0.9": 0.2, "0.99": 0.5}
    assert threshold(stored, 0.9) == 0.2 and threshold(stored, 0.7) == pytest.approx(0.15)
    assert threshold(stored, 0.99) == 0.5


@pytest.mark.parametrize(("tau", "coverage"), [(None, 1.0), (-1.0, 0.0), (float("inf"), 1.0)])
def test_open_and_closed(parts, tau, coverage):
    sae, mean, x = parts
    gate = Gate(lambda x: x + 1, sae, mean, tau)
    assert torch.equal(gate(x), x + 1 if coverage else x)
    assert gate.facts["coverage"] == coverage


def test_a_skipped_image_stays_bit_for_bit_even_where_steering_is_not_finite(parts):
    sae, mean, x = parts
    assert torch.equal(Gate(lambda x: x / 0, sae, mean, -1.0)(x), x)


def test_at_the_mean_fvu_is_zero_and_the_gate_is_open(parts):
    sae, mean, _ = parts
    gate = Gate(lambda x: x + 1, sae, mean, 0.0)
    assert torch.equal(gate(mean[None]), mean[None] + 1)


def test_statistics_add_up_over_batches_and_are_forgotten(parts):
    sae, mean, x = parts
    whole, parted = Gate(lambda x: x, sae, mean, 1.0), Gate(lambda x: x, sae, mean, 1.0)
    whole(x)
    for part in x.split(7):
        parted(part)
    assert parted.facts == pytest.approx(whole.facts)
    parted.reset()
    assert set(parted.facts) == {"gate_threshold"}


@pytest.mark.parametrize(("quantiles", "told"), [({}, "none"), ({"0.5": 0.1, "0.9": 0.2}, "0.5 to 0.9")])
def test_a_quantile_that_is_not_told_is_refused(quantiles, told):
    with pytest.raises(CheckpointError, match=rf"no FVU quantile for gate=0.95 \(it has {told}\)"):
        threshold(quantiles, 0.95)


def test_what_is_recorded_of_each_image_is_what_opened_the_gate(parts):
    sae, mean, x = parts
    expected = (x - sae(x)).pow(2).sum(1) / (x - mean).pow(2).sum(1)
    tau = expected.median().item()
    for gate in (Gate(lambda x: x + 1, sae, mean, tau), Gate(lambda x: x + 1, sae, mean, None)):
        gate.recording = True
        steered = torch.cat([gate(part) for part in x.split(9)])
        found = gate.per_image()
        torch.testing.assert_close(found["fvu"], expected, rtol=1e-5, atol=1e-6)
        assert found["steered"].tolist() == (steered != x).any(1).tolist()
        assert gate.facts["coverage"] == found["steered"].float().mean().item()
        assert gate.facts["mean_fvu"] == pytest.approx(expected.mean().item(), rel=1e-5)
        gate.reset()
        assert {name: len(values) for name, values in gate.per_image().items()} == {"fvu": 0, "steered": 0}
