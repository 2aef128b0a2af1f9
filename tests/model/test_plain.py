"""The plain embedding beside a steered one: by the end of the tower alone, or by the whole tower."""

import pytest
import torch

from vs2_plugin.clip.edits import Edit
from vs2_plugin.clip.sites import Sites
from vs2_plugin.model import plain
from vs2_plugin.model.plain import PlainEmbedding


@pytest.mark.parametrize("exact", [True, False])
@torch.no_grad()
def test_the_first_batch_of_a_shape_decides(exact, make_clip, monkeypatch):
    """Where its bits differ, later ones that are equal by chance change nothing."""
    model, finish, calls = make_clip(), plain.finish, []

    def ended(*args):
        calls.append(finish(*args))
        return calls[-1] + (0 if exact or len(calls) > 1 else 1e-3)

    monkeypatch.setattr(plain, "finish", ended)
    edit = Edit(model, Sites.of(model).default, lambda x: -x)
    beside = PlainEmbedding(model, [edit], inside=False)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    steered = [model.encode_image(images)]
    found = [beside.of(images)]
    for _ in range(3):
        steered.append(model.encode_image(images))
        found.append(beside.of(images))
    edit.remove()
    assert all(torch.equal(one, model.encode_image(images)) for one in found)
    assert not torch.equal(steered[0], found[0])
    assert len(calls) == (4 if exact else 1)
