"""Random numbers by a seed."""

import pytest
import torch

from vs2_plugin.seeds import seeded


def test_numbers_are_those_of_the_seed_and_the_callers_own_go_on():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(7)
    own = torch.rand(4)
    torch.manual_seed(7)
    found = [torch.rand(2)]
    with seeded(5):
        drawn = torch.rand(3)
    found.append(torch.rand(2))
    assert torch.equal(drawn, expected) and torch.equal(torch.cat(found), own)


def test_they_go_on_after_an_error():
    torch.manual_seed(7)
    own = torch.rand(2)
    torch.manual_seed(7)
    with pytest.raises(ValueError, match="wrong"), seeded(5):
        raise ValueError("wrong")
    assert torch.equal(torch.rand(2), own)
