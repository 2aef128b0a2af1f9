"""Reading and editing activations, against the models' own intermediate outputs."""

import copy

import pytest
import torch
from torch import nn

from vs2_plugin.clip.edits import Edit, editing, in_float32, paused, reading
from vs2_plugin.clip.sites import OUTPUT, Site, Sites, embedding_from
from vs2_plugin.steering.move import vs2_steer

from .towers import CLS_TOWERS, EMBED_DIM, OTHER_TOWERS, TOWERS, build, encode, images_for

# ---- reading


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CLS_TOWERS)
@torch.no_grad()
def test_reading_gives_open_clips_own_prefix_tokens(name, amp, make_clip):
    model = build(name, make_clip)
    sites = Sites.of(model).blocks
    images = images_for(model)
    with reading(model, [*sites, Sites.of(model).output]) as found:
        features = encode(model, images, amp)
    with torch.autocast("cpu", enabled=amp):
        own = model.visual.forward_intermediates(images, output_extra_tokens=True)
    for site, prefix in zip(sites, own["image_intermediates_prefix"], strict=True):
        assert found[site].shape == (4, 32)
        assert torch.equal(found[site], prefix[:, 0])
    assert torch.equal(found[Sites.of(model).output], features)


@pytest.mark.parametrize("name", OTHER_TOWERS)
def test_reading_the_output_gives_the_image_embedding(name, make_clip):
    model = build(name, make_clip)
    site = Sites.of(model).default
    with reading(model, [site]) as found:
        features = encode(model, images_for(model))
    assert found[site].shape == (4, EMBED_DIM)
    assert torch.equal(found[site], features)


def test_reading_ends_with_its_block(make_clip, batch):
    model = make_clip()
    with pytest.raises(RuntimeError, match="stop"), reading(model, Sites.of(model).blocks) as found:
        raise RuntimeError("stop")
    encode(model, batch)
    assert found == {}
    assert_untouched(model)


# ---- editing


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", TOWERS)
def test_the_identity_changes_no_bit(name, amp, make_clip):
    model = build(name, make_clip)
    images = images_for(model)
    stock = encode(model, images, amp)
    seen = []

    def identity(x):
        seen.append(x.dtype)
        return x

    for site in [*Sites.of(model).blocks, Sites.of(model).output]:
        with editing(model, site, identity):
            steered = encode(model, images, amp)
        assert steered.dtype == stock.dtype
        assert torch.equal(steered, stock)
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", TOWERS)
def test_an_edit_changes_the_embedding_and_keeps_its_dtype(name, amp, make_clip):
    model = build(name, make_clip)
    images = images_for(model)
    stock = encode(model, images, amp)
    with editing(model, Sites.of(model).default, lambda x: x.flip(-1)):
        steered = encode(model, images, amp)
    assert steered.dtype == stock.dtype
    assert not torch.allclose(steered, stock, atol=1e-3)
    if not Sites.of(model).blocks:
        assert torch.equal(steered, stock.flip(-1))


@pytest.mark.parametrize("name", CLS_TOWERS)
@torch.no_grad()
def test_only_the_cls_token_is_edited(name, make_clip):
    model = build(name, make_clip)
    images = images_for(model)
    site = Sites.of(model).blocks[1]
    outputs = []
    handle = site.module(model).register_forward_hook(lambda module, args, output: outputs.append(output))
    encode(model, images)
    handle.remove()
    with editing(model, site, lambda x: x + 1):
        handle = site.module(model).register_forward_hook(lambda module, args, output: outputs.append(output))
        encode(model, images)
    stock, steered = outputs
    assert torch.equal(site.read(steered), site.read(stock) + 1)
    rest = range(1, stock.shape[site.token_dim])
    for token in rest:
        assert torch.equal(steered.select(site.token_dim, token), stock.select(site.token_dim, token))


@pytest.mark.parametrize("name", CLS_TOWERS)
@torch.no_grad()
def test_an_edit_of_the_last_block_is_followed_by_layer_norm_and_projection_only(name, make_clip):
    model = build(name, make_clip)
    images = images_for(model)
    site = Sites.of(model).default

    def steering(x):
        return x.roll(1, -1) * 1.5

    with reading(model, [site]) as found:
        encode(model, images)
    with editing(model, site, steering):
        steered = encode(model, images)
    by_hand = model.visual.ln_post(steering(found[site])) @ model.visual.proj
    torch.testing.assert_close(steered, by_hand)


def test_an_edit_reaches_the_blocks_after_it(make_clip, batch):
    model = make_clip()
    first, second, last = Sites.of(model).blocks
    with reading(model, [first, second, last]) as stock:
        encode(model, batch)
    with editing(model, second, lambda x: x + 1), reading(model, [first, second, last]) as steered:
        encode(model, batch)
    assert torch.equal(steered[first], stock[first])
    assert torch.equal(steered[second], stock[second] + 1)
    assert not torch.allclose(steered[last], stock[last])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_what_is_left_of_the_tower_gives_the_embedding(name, dtype, make_clip):
    """From the activation at the default site, in float32, also of a tower in half precision and within autocast."""
    model = build(name, make_clip).to(dtype)
    site = Sites.of(model).default
    images = images_for(model).to(dtype)
    with reading(model, [site]) as found:
        embedding = model.encode_image(images)
    with torch.autocast("cpu"):
        rest = embedding_from(model, site, found[site].float())
    assert rest.dtype == torch.float32
    if name == "CoCa":  # its encode_image gives them at norm 1
        rest = nn.functional.normalize(rest, dim=-1)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(rest, embedding.float(), atol=tolerance, rtol=tolerance)


@torch.no_grad()
def test_paused_edits_are_as_if_they_were_not_there(make_clip, batch):
    model = make_clip()
    plain = encode(model, batch)
    edits = [Edit(model, site, lambda x: x + 1) for site in Sites.of(model).blocks[1:]]
    steered = encode(model, batch)
    with pytest.raises(ZeroDivisionError), paused(edits[:1]):
        assert not torch.equal(encode(model, batch), steered)
        with paused(edits):
            assert torch.equal(encode(model, batch), plain)
        raise ZeroDivisionError
    assert torch.equal(encode(model, batch), steered) and not torch.equal(steered, plain)


def test_outputs_that_are_tuples_keep_their_other_parts():
    embedding, tokens = torch.rand(2, 3), torch.rand(2, 5, 3)
    site = Site(OUTPUT, 3)
    assert site.read((embedding, tokens)) is embedding
    written = site.write((embedding, tokens), embedding * 2)
    assert torch.equal(written[0], embedding * 2)
    assert written[1] is tokens


def test_coca_captions_are_steered_through_its_tokens_untouched(make_clip):
    model = build("CoCa", make_clip)
    images = images_for(model)
    with torch.no_grad():
        stock, tokens = model.visual(images)
        with editing(model, Sites.of(model).default, lambda x: -x):
            steered, same = model.visual(images)
    assert torch.equal(steered, -stock)
    assert torch.equal(same, tokens)


def test_writing_leaves_the_original_output_alone():
    for token_dim in (0, 1):
        output = torch.rand(3, 3, 2)
        before = output.clone()
        Site("visual.transformer.resblocks.0", 2, token_dim).write(output, torch.zeros(3, 2))
        assert torch.equal(output, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_steering_is_float32_inside_autocast_and_returns_the_dtype_given(dtype):
    weight = torch.eye(3) * (1 + 2**-12)  # rounds to 1 in bfloat16
    x = torch.ones(2, 3, dtype=dtype)
    seen = []

    def steering(x):
        seen.append(x @ weight)
        return seen[-1]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert in_float32(steering, x).dtype == dtype
    assert seen[0].dtype == torch.float32
    assert seen[0][0, 0].item() == 1 + 2**-12


# ---- steering modules


def assert_untouched(model):
    assert not [name for name, _ in model.named_modules() if "vs2" in name]
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["batch first", "average pooling", "timm ConvNeXt"])
def test_removing_an_edit_leaves_no_trace(name, make_clip, make_sae):
    model = build(name, make_clip)
    site, images = Sites.of(model).default, images_for(model)
    keys, stock = list(model.state_dict()), encode(model, images)
    handle = Edit(model, site, Steering(make_sae(site.width), 2.0))
    assert not torch.equal(encode(model, images), stock)
    handle.remove()
    handle.remove()  # harmless
    assert list(model.state_dict()) == keys
    assert torch.equal(encode(model, images), stock)
    assert_untouched(model)


class Steering(nn.Module):
    """VS2, as a module of activations alone."""

    def __init__(self, sae, alpha):
        super().__init__()
        self.sae, self.alpha = sae, alpha

    def forward(self, x):
        return vs2_steer(x, self.sae, self.alpha)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.ones(32))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x + self.shift


def test_a_steering_module_moves_with_the_model(make_clip, batch, make_sae):
    model = make_clip()
    steering = Steering(make_sae(), 1.0)
    Edit(model, Sites.of(model).default, steering)
    steered = encode(model, batch)
    model.to(torch.float64)
    assert steering.sae.W_dec.dtype == torch.float32  # steering is float32 whatever the model is
    assert encode(model, batch.double()).dtype == torch.float64
    torch.testing.assert_close(encode(model, batch.double()).float(), steered, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_steered_model_can_be_cast_to_half_precision(dtype, make_clip, batch, make_sae):
    model = make_clip()
    Edit(model, Sites.of(model).default, Steering(make_sae(), 1.0))
    model.to(dtype)
    assert encode(model, batch.to(dtype)).dtype == dtype


@pytest.mark.parametrize("training", [False, True])
def test_a_steering_module_is_in_the_mode_of_the_model(training, make_clip):
    model = build("batch first", make_clip).train(training)
    steering = nn.Dropout(0.5)
    with editing(model, Sites.of(model).default, steering):
        assert steering.training is training
        assert {module.training for module in model.modules()} == {training}


def test_a_copied_model_steers_with_its_own_copy(make_clip, batch):
    model, steering = make_clip(), Counting()
    Edit(model, Sites.of(model).default, steering)
    steered = encode(model, batch)
    twin = copy.deepcopy(model)
    calls = steering.calls
    assert torch.equal(encode(twin, batch), steered)
    assert steering.calls == calls  # the copy did the work
    Sites.of(twin).default.module(twin).vs2_steering_0.steer.shift.zero_()
    assert not torch.equal(encode(twin, batch), steered)
    assert torch.equal(encode(model, batch), steered)


def test_two_steering_modules_at_one_site_both_run(make_clip, batch):
    model, first, second = make_clip(), Counting(), Counting()
    site = Sites.of(model).default
    with editing(model, site, first), editing(model, site, second):
        encode(model, batch)
    assert (first.calls, second.calls) == (1, 1)


def test_two_steering_functions_at_one_site_run_in_order(make_clip, batch):
    model = make_clip()
    site = Sites.of(model).default
    with reading(model, [site]) as stock:
        encode(model, batch)
    with (
        editing(model, site, lambda x: x * 2),
        editing(model, site, lambda x: x + 1),
        reading(model, [site]) as steered,
    ):
        encode(model, batch)
    assert torch.equal(steered[site], stock[site] * 2 + 1)


def test_a_replica_steers_with_its_own_module(make_clip, batch):
    """DataParallel calls shallow copies of modules that hold copies of their children: the hook must use those."""
    model, original, copied = make_clip(), Counting(), Counting()
    site = Sites.of(model).default
    Edit(model, site, original)
    block = site.module(model)
    replica = block._replicate_for_data_parallel()
    (name,) = [name for name in block._modules if name.startswith("vs2_steering")]
    replica_edit = block._modules[name]._replicate_for_data_parallel()
    replica_edit._modules = {"steer": copied}
    replica._modules = {**block._modules, name: replica_edit}
    replica._parameters = block._parameters
    with torch.no_grad():
        replica(model.visual._embeds(batch))
    assert (original.calls, copied.calls) == (0, 1)
