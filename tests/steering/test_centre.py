"""Centring: VS2 without its SAE."""

import torch

from vs2_plugin.steering.centre import Centring


def test_it_goes_away_from_the_mean_at_the_norm_of_the_activation():
    x, mean = torch.randn(6, 8), torch.randn(8)
    moved = x + 1.5 * (x - mean)
    expected = moved * x.norm(dim=1, keepdim=True) / moved.norm(dim=1, keepdim=True)
    torch.testing.assert_close(Centring(mean, 1.5)(x), expected)
    assert torch.equal(Centring(mean, 0.0)(x), x)
