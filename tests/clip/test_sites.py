"""Which sites a tower has."""

import copy

import pytest
import torch

from vs2_plugin.clip.sites import OUTPUT, Site, Sites
from vs2_plugin.errors import TowerError

from .towers import CLS_TOWERS, EMBED_DIM, OTHER_TOWERS, build

# ---- which sites a tower has


@pytest.mark.parametrize("name", CLS_TOWERS)
def test_a_tower_with_a_pooled_cls_token_has_a_site_per_block(name, make_clip):
    model = build(name, make_clip)
    sites = Sites.of(model).blocks
    assert [site.hookpoint for site in sites] == [f"visual.transformer.resblocks.{i}" for i in range(3)]
    assert {site.width for site in sites} == {32}
    assert {site.token_dim for site in sites} == {0 if name == "tokens first" else 1}
    assert Sites.of(model).default == sites[-1]
    assert (str(sites[1]), sites[1].block) == ("block 1", 1)


@pytest.mark.parametrize("name", OTHER_TOWERS)
def test_any_other_tower_is_steered_at_its_output(name, make_clip):
    model = build(name, make_clip)
    assert Sites.of(model).blocks == ()
    assert Sites.of(model).default == Sites.of(model).find(OUTPUT) == Site(OUTPUT, EMBED_DIM)
    assert (str(Sites.of(model).default), Sites.of(model).default.block) == ("the output embedding", None)


def test_a_tower_without_cls_token_has_no_block_sites(make_clip):
    model = make_clip()
    model.visual.class_embedding = None
    assert Sites.of(model).blocks == ()


def test_finding_the_output_width_leaves_the_tower_as_it_was(make_clip):
    model = build("timm ConvNeXt", make_clip).train()
    before = copy.deepcopy(model.state_dict())
    assert Sites.of(model).output.width == EMBED_DIM
    assert model.visual.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


WRONG_SITES = [
    ("visual.transformer.resblocks.3", "resblocks.0 to visual.transformer.resblocks.2, and visual"),
    ("visual.transformer.resblocks.-1", "resblocks.0 to visual.transformer.resblocks.2, and visual"),
    ("visual.transformer", "resblocks.0 to visual.transformer.resblocks.2, and visual"),
    ("", "resblocks.0 to visual.transformer.resblocks.2, and visual"),
]


@pytest.mark.parametrize(("hookpoint", "offered"), WRONG_SITES)
def test_a_site_that_the_tower_lacks_is_refused_with_those_it_has(hookpoint, offered, make_clip):
    with pytest.raises(TowerError) as error:
        Sites.of(make_clip()).find(hookpoint)
    assert f"no site {hookpoint!r}" in str(error.value)
    assert offered in str(error.value)


def test_a_block_of_a_tower_without_block_sites_is_refused(make_clip):
    with pytest.raises(TowerError, match=r"it has only visual \(it pools no CLS token\)"):
        Sites.of(make_clip(pool_type="avg")).find("visual.transformer.resblocks.0")
