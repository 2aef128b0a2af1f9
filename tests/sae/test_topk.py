"""The SAE module against plain NumPy."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vs2_plugin.errors import SettingError
from vs2_plugin.sae.topk import Latents, SaeConfig, TopKSAE, fvu, sample_fvu

SHAPES = [(6, 24, 3), (16, 64, 4), (16, 128, 1), (7, 21, 21), (8, 200, 8), (8, 64, 12)]  # in one round or two


def make_sae(d_in, num_latents, k, activation, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sae = TopKSAE(SaeConfig(d_in, num_latents, k, activation)).double()
    with torch.no_grad():
        sae.b_dec.normal_(generator=generator)
        if activation == "relu":
            sae.encoder.bias.normal_(generator=generator)
    return sae, torch.randn(11, d_in, generator=generator, dtype=torch.double)


def plain_code(sae, x):
    """The dense code, one activation and one latent at a time: ``[batch, n]``."""
    weight, bias, center = (t.detach().numpy() for t in (sae.encoder.weight, sae.encoder.bias, sae.b_dec))
    codes = []
    for row in x.numpy():
        pre = np.array([np.dot(w, row - center) + b for w, b in zip(weight, bias, strict=True)])
        rank = np.abs(pre) if sae.config.activation == "abs" else pre
        code = np.zeros(len(pre))
        for latent in sorted(range(len(pre)), key=lambda i: -rank[i])[: sae.config.k]:
            code[latent] = pre[latent] if sae.config.activation == "abs" else max(0.0, pre[latent])
        codes.append(code)
    return np.stack(codes)


def dense(latents, num_latents):
    return torch.zeros(len(latents.values), num_latents, dtype=latents.values.dtype).scatter(
        1, latents.indices, latents.values
    )


@pytest.mark.parametrize("activation", ["relu", "abs"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_code_and_reconstruction_equal_plain_numpy(shape, activation):
    sae, x = make_sae(*shape, activation)
    expected = plain_code(sae, x)
    latents = sae.encode(x)
    assert latents.values.shape == latents.indices.shape == (11, shape[2])
    assert latents.indices.dtype == torch.int64
    np.testing.assert_allclose(dense(latents, shape[1]), expected, atol=1e-12)
    reconstruction = np.stack([sum(c * w for c, w in zip(code, sae.W_dec.numpy(), strict=True)) for code in expected])
    np.testing.assert_allclose(sae.combine(latents), reconstruction, atol=1e-12)
    np.testing.assert_allclose(sae(x), reconstruction + sae.b_dec.numpy(), atol=1e-12)


@torch.no_grad()
def test_abs_keeps_signs_and_relu_none():
    signs = {}
    for activation in ("relu", "abs"):
        sae, x = make_sae(16, 64, 4, activation)
        signs[activation] = (sae.encode(x).values < 0).any().item()
    assert signs == {"relu": False, "abs": True}


@pytest.mark.parametrize("activation", ["relu", "abs"])
def test_encoder_and_decoder_start_equal_and_are_trained_apart(activation):
    sae = TopKSAE(SaeConfig(16, 64, 4, activation))
    assert torch.equal(sae.W_dec, sae.encoder.weight)
    assert sae.W_dec.data_ptr() != sae.encoder.weight.data_ptr()
    trained = {name for name, parameter in sae.named_parameters() if parameter.requires_grad}
    assert trained == {"W_dec", "b_dec", "encoder.weight"} | ({"encoder.bias"} if activation == "relu" else set())


def test_an_activation_is_encoded_without_a_batch_and_with_gradients():
    sae = TopKSAE(SaeConfig(16, 64, 4))
    x = torch.randn(3, 16)
    x.requires_grad_()
    values, indices = sae.encode(x)
    alone, own = sae.encode(x[0])
    assert dict(zip(own.tolist(), alone.tolist(), strict=True)) == pytest.approx(
        dict(zip(indices[0].tolist(), values[0].tolist(), strict=True))
    )
    values.sum().backward()
    expected = sum(sae.encoder.weight[latents].sum(0) for latents in indices[:1])
    torch.testing.assert_close(x.grad[0], expected)


@torch.no_grad()
@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
def test_tokens_and_a_single_activation_are_reconstructed_like_a_batch(normalize):
    sae = TopKSAE(SaeConfig(16, 64, 4, normalize_activations=normalize))
    x = torch.randn(6, 16)
    expected = sae(x)
    torch.testing.assert_close(sae(x.view(2, 3, 16)), expected.view(2, 3, 16))
    torch.testing.assert_close(sae(x[4]), expected[4])
    assert sae(x[:0].view(0, 3, 16)).shape == (0, 3, 16)


@torch.no_grad()
def test_what_was_recorded_of_an_sae_selects_the_latents_of_another_batch():
    sae, x = make_sae(16, 64, 4, "relu")
    sae, x = sae.float(), x.float()
    for recorded in (torch.jit.trace(sae, x), torch.export.export(sae, (x,)).module()):
        torch.testing.assert_close(recorded(x.flip(1)), sae(x.flip(1)))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert sae(torch.empty(11, 16)).shape == x.shape


@torch.no_grad()
def test_an_activation_equal_to_the_bias_has_an_empty_code():
    sae = TopKSAE(SaeConfig(16, 64, 4))
    sae.b_dec.normal_()
    assert (sae.encode(sae.b_dec.unsqueeze(0)).values == 0).all()
    torch.testing.assert_close(sae(sae.b_dec.unsqueeze(0))[0], sae.b_dec)


@torch.no_grad()
def test_the_result_for_an_activation_does_not_depend_on_its_batch():
    sae, x = make_sae(16, 128, 4, "relu")
    torch.testing.assert_close(sae(x)[3:4], sae(x[3:4]), rtol=0, atol=1e-13)


@torch.no_grad()
def test_decoder_directions_start_and_are_kept_at_unit_norm():
    sae = TopKSAE(SaeConfig(16, 64, 4))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))
    before = sae.W_dec.clone()
    sae.W_dec *= torch.rand(64, 1) + 0.5
    sae.normalize_decoder()
    torch.testing.assert_close(sae.W_dec, before)
    sae.W_dec[0] = 0
    sae.normalize_decoder()
    assert sae.W_dec.isfinite().all()


def test_fvu_of_the_mean_is_one_and_of_the_set_itself_zero():
    x = torch.randn(50, 8) + 3
    assert fvu(x, x) == 0
    assert fvu(x, x.mean(0).expand_as(x)).item() == pytest.approx(1)
    assert fvu(x, (x + x.mean(0)) / 2).item() == pytest.approx(0.25, rel=1e-4)


def test_sample_fvu_uses_the_stored_mean():
    mean = torch.tensor([1.0, 0.0])
    x = torch.tensor([[3.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    reconstruction = torch.tensor([[3.0, 1.0], [1.0, 1.0], [9.0, 9.0]])
    # the last one is the mean itself: 0 by definition, however bad its reconstruction
    assert sample_fvu(x, reconstruction, mean).tolist() == [0.25, 0.0, 0.0]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"d_in": 0, "num_latents": 8, "k": 1}, "d_in is 0"),
        ({"d_in": 4, "num_latents": -1, "k": 1}, "num_latents is -1"),
        ({"d_in": 4, "num_latents": 8, "k": 0}, "k is 0"),
        ({"d_in": 4, "num_latents": 8, "k": 1.5}, "k is 1.5"),
        ({"d_in": 4, "num_latents": 8, "k": 9}, "k is 9"),
        ({"d_in": 4, "num_latents": 8, "k": 2, "activation": "gelu"}, "gelu"),
    ],
)
def test_settings_out_of_range_are_named(settings, named):
    with pytest.raises(SettingError, match=named):
        SaeConfig(**settings)


def test_latents_are_named():
    assert Latents._fields == ("values", "indices")
