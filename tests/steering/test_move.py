import pytest
import torch

from vs2_plugin.plugins import find_plugins
from vs2_plugin.steering.amplify import Amplify
from vs2_plugin.steering.batch import Batch, steer
from vs2_plugin.steering.builtin import build_vs2, strength
from vs2_plugin.steering.context import Context
from vs2_plugin.steering.move import Code, Move, keep_norm, vs2_steer


@pytest.fixture(scope="module", params=["relu", "abs"])
def sae(request, make_sae):
    return make_sae(activation=request.param)


@pytest.fixture(scope="module")
def x():
    return torch.randn(16, 32, generator=torch.Generator().manual_seed(1)) * 3


ALPHAS = [1.05, 0.5, 3.0, -0.5, -1.0, 1000.0]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_vs2_is_its_closed_form_rescaled(alpha, sae, x):
    """``x + λv = x + α(x - b_pre) + α(x̃ - x)`` (arXiv 2506.01247), in float64."""
    wide, x64 = sae.double(), x.double()
    expected = x64 + alpha * (x64 - wide.b_dec) + alpha * (wide(x64) - x64)
    expected *= x64.norm(dim=-1, keepdim=True) / expected.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(vs2_steer(x64, wide, alpha), expected)
    torch.testing.assert_close(vs2_steer(x, sae.float(), alpha).double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("gamma", "lam"), [(1.5, 2.1), (2.0, 1.0), (0.0, 1.0), (-1.0, 0.5)])
def test_vs2_amplifies_the_active_latents(gamma, lam, sae, x):
    """``v = D(γ c) - D(c)``, with the dense sparse code."""
    latents = sae.encode(x)
    code = torch.zeros(len(x), sae.config.num_latents).scatter(-1, latents.indices, latents.values)
    v = (gamma * code @ sae.W_dec + sae.b_dec) - (code @ sae.W_dec + sae.b_dec)
    expected = (x + lam * v) * x.norm(dim=-1, keepdim=True) / (x + lam * v).norm(dim=-1, keepdim=True)
    torch.testing.assert_close(vs2_steer(x, sae, strength(gamma, lam, None)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_norm_is_kept_and_the_direction_is_not(alpha, sae, x):
    steered = vs2_steer(x, sae, alpha)
    torch.testing.assert_close(steered.norm(dim=-1), x.norm(dim=-1))
    assert (torch.nn.functional.cosine_similarity(steered, x) < 0.999).all()


def test_no_strength_changes_no_bit(sae, x):
    assert torch.equal(vs2_steer(x, sae, 0.0), x)
    assert torch.equal(vs2_steer(x, sae, strength(1.0, 2.1, None)), x)
    assert torch.equal(vs2_steer(x, sae, strength(1.5, 0.0, None)), x)


def test_an_activation_without_active_latents_changes_no_bit(make_sae, x):
    silent = make_sae()
    silent.encoder.bias -= 1e6
    assert torch.equal(vs2_steer(x, silent, 1.05), x)


def test_the_input_is_left_alone(sae, x):
    before = x.clone()
    vs2_steer(x, sae, 1.05)
    assert torch.equal(x, before)


def test_the_zero_vector_stays_zero(sae):
    assert torch.equal(vs2_steer(torch.zeros(2, 32), sae, 1.05), torch.zeros(2, 32))


def test_keep_norm_leaves_rows_of_norm_zero():
    x = torch.tensor([[3.0, 4.0], [3.0, 4.0], [0.0, 0.0], [0.0, 0.0]])
    steered = torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    for scale, dtype in ((1, torch.float32), (1, torch.float16), (1, torch.float64), (1e8, torch.float32)):
        expected = scale * torch.tensor([[0.0, 5.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
        assert torch.equal(keep_norm(steered.to(dtype), (scale * x).to(dtype)), expected.to(dtype))


def test_a_result_does_not_depend_on_its_companions(sae, x):
    alone = vs2_steer(x, sae, 1.05)
    others = torch.randn(15, 32, generator=torch.Generator().manual_seed(2)) * 100
    for row in (0, 7, 15):
        company = torch.cat([others[:row], x[row : row + 1], others[row:]])
        assert torch.equal(vs2_steer(company, sae, 1.05)[row], alone[row])


@pytest.mark.parametrize("size", [1, 3, 7])
def test_a_result_does_not_depend_on_the_batch_size(size, sae, x):
    parts = torch.cat([vs2_steer(part, sae, 1.05) for part in x.split(size)])
    torch.testing.assert_close(parts, vs2_steer(x, sae, 1.05), atol=1e-5, rtol=1e-5)


def test_an_empty_batch_stays_empty(sae):
    assert vs2_steer(torch.zeros(0, 32), sae, 1.05).shape == (0, 32)


@pytest.mark.parametrize("gamma", [1.5, 0.0, -1.0])
def test_the_amplified_reconstruction_takes_the_place_of_the_activation(gamma, sae, x):
    """``x̂ = D(γ c)`` (arXiv 2506.01247, REC_F+γ)."""
    latents = sae.encode(x)

    def amplified(strength):
        return Move(Code.of(sae, x), strength, "b_dec", keep_norm=False).apply(x)

    torch.testing.assert_close(amplified(gamma), sae.decode(latents._replace(values=gamma * latents.values)))
    assert torch.equal(amplified(1.0), sae(x))
    assert torch.equal(amplified(0.0), sae.b_dec.expand_as(x))


# ---- the built-in method


def build(sae, **given):
    method = find_plugins().method("vs2")
    context = Context(torch.nn.Identity(), "visual", 32, sae, torch.zeros(32), {})
    options = method.fill(given)
    return method.build(context, **{option.name: options[option.name] for option in method.options})


def applied(steering, x):
    return steer(steering, x, Batch())


def test_alpha_is_all_that_matters_of_gamma_and_lam(sae, x):
    by_alpha = build(sae, alpha=1.0)
    assert torch.equal(applied(by_alpha, x), applied(build(sae, gamma=2.0, lam=1.0), x))
    assert torch.equal(applied(by_alpha, x), applied(build(sae, gamma=1.5, lam=2.0), x))
    assert not torch.equal(applied(by_alpha, x), applied(build(sae), x))


def test_the_defaults_are_the_best_pair_of_the_paper(sae):
    assert build(sae).facts["alpha"] == strength(1.5, 2.1, None) == pytest.approx(1.05)
    assert strength(None, None, 0.8) == strength(7.0, 7.0, 0.8) == 0.8


def test_the_built_steering_holds_its_sae_and_tells_its_strength(sae, x):
    steering = build_vs2(Context(torch.nn.Identity(), "visual", 32, sae), alpha=0.5)
    assert isinstance(steering, Amplify)
    assert dict(steering.facts) == {"alpha": 0.5}
    assert {name.partition(".")[0] for name in steering.state_dict()} == {"sae"}
    assert torch.equal(applied(steering, x), vs2_steer(x, sae, 0.5))


@pytest.mark.parametrize("base", ["x", "b_dec"])
def test_a_move_goes_by_its_gain_along_each_active_latent(base, sae, x):
    code = Code.of(sae, x)
    move = Move(code, 1.7, base, keep_norm=False)
    for row, changed in enumerate(move.apply(x) - x):
        latents, activations, amounts = code.active(row)
        assert torch.equal(activations, amounts) and activations.count_nonzero() == len(latents) > 0
        along = move.gain * sum(amount * sae.W_dec[latent] for latent, amount in zip(latents, amounts))
        unexplained = sae(x[row : row + 1])[0] - x[row] if base == "b_dec" else torch.zeros(32)
        torch.testing.assert_close(changed, along + unexplained, rtol=1e-4, atol=1e-4)
    assert move.rest == {"x": "rest", "b_dec": "what the SAE does not explain, left out"}[base]


def test_amounts_stand_beside_the_activations_they_are_of(sae, x):
    latents = sae.encode(x)
    plain, doubled = Code(sae, *latents), Code(sae, 2 * latents.values, latents.indices, latents.values)
    dense = Code(sae, lambda: torch.zeros(16, 64).scatter(1, latents.indices, latents.values))
    for row in (0, 5):
        where, activations, amounts = doubled.active(row)
        assert torch.equal(amounts, 2 * activations) and torch.equal(activations, plain.active(row)[1])
        assert sorted(dense.active(row)[0].tolist()) == sorted(where.tolist())
        assert torch.equal(where, plain.active(row)[0])
    again = plain.scaled(torch.full((16, 1), 2.0)).active(5)
    assert all(map(torch.equal, again, doubled.active(5)))
    part = dense[torch.tensor([5, 0])]
    torch.testing.assert_close(part.direction, plain.direction[[5, 0]])
    assert torch.equal(part.values[0], dense.values[5])
