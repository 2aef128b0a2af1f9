"""Codes, against dense ones."""

import numpy as np
import pytest
import torch

from vs2_plugin.quality.codes import encode
from vs2_plugin.sae.source import Source


@pytest.mark.parametrize("activation", ["relu", "abs"])
def test_codes_are_those_of_the_sae_and_their_figures_those_of_the_dense_form(make_sae, activation):
    sae = make_sae(activation=activation)
    x = np.random.default_rng(0).normal(size=(60, 32)).astype(np.float32)
    numbers = np.array([3, 1, 50, 7, 20, 21, 22, 59, 30, 12])
    codes = encode(sae, Source(x, "cpu"), numbers)
    latents = sae.encode(torch.from_numpy(x[numbers]))
    dense = torch.zeros(10, 64).scatter_(1, latents.indices, latents.values).numpy()
    np.testing.assert_allclose(codes.matrix.toarray(), dense, rtol=1e-5, atol=1e-6)
    share = (dense != 0).mean(0)
    np.testing.assert_array_equal(codes.frequencies, share)
    np.testing.assert_array_equal(codes.alive, share > 0)
    assert codes.l0 == pytest.approx((dense != 0).sum(1).mean())
    assert codes.dead == (share == 0).mean() and codes.dense == (share > 0.1).mean()
    assert (share == 0.1).any() and codes.matrix.nnz == (dense != 0).sum()


def test_what_is_zero_is_not_active(make_sae):
    sae = make_sae()
    with torch.no_grad():
        sae.encoder.bias.fill_(-100)  # all pre-activations are negative
    codes = encode(sae, Source(np.eye(32, dtype=np.float32), "cpu"), np.arange(32))
    assert codes.matrix.nnz == 0 and codes.dead == 1 and codes.l0 == 0
