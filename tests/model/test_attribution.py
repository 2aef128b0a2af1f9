"""Contributions against brute force: they sum to the change, and where a logit is linear they are what it loses."""

import pytest
import torch
import torch.nn.functional as F

from vs2_plugin.clip.edits import editing, reading
from vs2_plugin.clip.sites import Sites, embedding_from
from vs2_plugin.model.attribution import attribute, movement, tail
from vs2_plugin.sae.topk import Latents
from vs2_plugin.steering.batch import Batch, call, steer
from vs2_plugin.steering.builtin import build_amp, build_clipsteer, build_rec, build_vs2, build_vs2pp
from vs2_plugin.steering.context import Context
from vs2_plugin.steering.move import Move


def context(sae, retriever=None):
    return Context(None, "site", sae.config.d_in, sae, torch.zeros(sae.config.d_in), {}, None, retriever)


def moved_by(steering, x):
    return movement(call(steering, x, Batch()))


def applied(steering, x):
    return steer(steering, x, Batch())


def dense(sae, moved):
    return torch.zeros(sae.config.num_latents).scatter_add(0, moved.latents, moved.amounts) @ sae.W_dec


def scaled(y, x):
    return y * x.norm() / y.norm()


@pytest.fixture
def x():
    return torch.randn(1, 32, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("activation", ["relu", "abs"])
def test_a_movement_is_what_the_steering_does(make_sae, activation, x):
    sae = make_sae(activation=activation)
    vs2 = build_vs2(context(sae), alpha=1.3)
    moved = moved_by(vs2, x)
    assert len(moved.latents) == len(set(moved.latents.tolist())) == 8 and (moved.activations != 0).all()
    assert torch.allclose(moved.amounts, 1.3 * moved.activations)
    assert torch.allclose(scaled(x[0] + dense(sae, moved), x[0]), applied(vs2, x)[0], atol=1e-5)
    unexplained = x - sae(x)
    for gamma in (1.5, 0.0, -1.0):
        amp = build_amp(context(sae), gamma)
        moved = moved_by(amp, x)
        assert torch.allclose(x[0] + dense(sae, moved) - unexplained[0], applied(amp, x)[0], atol=1e-5)
    assert not moved_by(build_rec(context(sae)), x).amounts.any()


def test_latents_that_are_not_active_are_left_out(make_sae, x):
    sae = make_sae()
    sae.encode = lambda x: Latents(torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[5, 0, 1]]))
    assert moved_by(build_vs2(context(sae), alpha=1.0), x).latents.tolist() == [5]


class Hood:
    """A retriever with three neighbours: two of class 1, one of class 0."""

    device = torch.device("cpu")

    def __init__(self, activations):
        from vs2_plugin.gallery.gallery import Gallery

        rows = activations.numpy()
        self.gallery = Gallery({"site": rows}, {"clip": rows}, digests=torch.arange(len(rows)).numpy())
        self.classifier = torch.eye(2)

    def neighbours(self, batch):
        from vs2_plugin.steering.retriever import Neighbours

        return Neighbours(torch.tensor([[0, 1, 2]]), torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool))

    def likely(self, batch):
        """None: there is no GPU to wait for."""

    def labels(self, kind):
        return torch.tensor([1, 0, 1])


def test_the_movement_of_vs2pp_is_along_its_neighbours_codes(make_sae, x):
    sae, others = make_sae(), torch.randn(3, 32, generator=torch.Generator().manual_seed(4))
    options = {"alpha": 0.7, "rule": "majority", "labels": "pseudo", "brake": None}
    steering = build_vs2pp(context(sae, Hood(others)), **options)
    moved = moved_by(steering, x)
    codes = torch.zeros(3, 64).scatter(1, sae.encode(others).indices, sae.encode(others).values)
    expected = (codes[0] + codes[2]) / 2 - codes[1]
    assert set(moved.latents.tolist()) == set(expected.nonzero()[:, 0].tolist())
    assert torch.allclose(moved.activations, expected[moved.latents])
    assert torch.allclose(scaled(x[0] + dense(sae, moved), x[0]), applied(steering, x)[0], atol=1e-5)
    for other in (build_clipsteer(context(sae, Hood(others)), **options), lambda x: 2 * x):
        assert not isinstance(call(other, x, Batch()), Move)


def test_where_the_logit_is_linear_a_contribution_is_what_leaving_the_latent_out_loses(x):
    generator = torch.Generator().manual_seed(5)
    steps, weights, bias = (torch.randn(*shape, generator=generator) for shape in ((6, 32), (32, 3), (3,)))

    def logits(z):
        return z @ weights + bias

    steered = x[0] + steps.sum(0) + 0.1
    found = attribute(logits, x[0], steps, steered)
    whole = logits(x[0] + steps.sum(0))
    for index in range(len(steps)):
        without = logits(x[0] + steps.sum(0) - steps[index])
        assert torch.allclose(found.latents[index], whole - without, atol=1e-4)
    assert torch.allclose(found.rest, logits(steered) - whole, atol=1e-4)
    assert torch.allclose(found.total, logits(steered) - logits(x[0]), atol=1e-4)
    assert found.remainder.abs().max() < 1e-4


@pytest.mark.parametrize("alpha", [0.3, 1.05, 20.0])
def test_the_sum_closes_and_agrees_with_a_walk_in_small_steps(make_clip, make_sae, alpha, x):
    """The walk goes to x̂ in 4,000 steps, and takes each latent's part of a step by finite differences."""
    model, sae = make_clip().double(), make_sae().double()
    site, x = Sites.of(model).default, 3 * x.double()
    texts = F.normalize(torch.randn(4, 24, generator=torch.Generator().manual_seed(6), dtype=torch.double), dim=-1)

    def logits(z):  # embedding_from is float32
        visual = model.visual
        return 100 * F.normalize(visual.ln_post(z) @ visual.proj, dim=-1) @ texts.T

    vs2 = build_vs2(context(sae), alpha=alpha)
    with torch.no_grad():
        moved, steered = moved_by(vs2, x), applied(vs2, x)
    steps = moved.amounts[:, None] * sae.W_dec[moved.latents]
    found = attribute(logits, x[0], steps, steered[0])
    assert found.remainder.abs().max() < 1e-3 * found.total.abs().max()
    assert found.rest.abs().max() < 1e-2  # at the tower's end a LayerNorm follows, which hardly sees the norm
    walked, times = torch.zeros_like(found.latents), (torch.arange(4000, dtype=torch.double) + 0.5) / 4000
    with torch.no_grad():
        points = x + times[:, None] * steps.sum(0)
        for index, step in enumerate(steps):
            walked[index] = ((logits(points + 1e-5 * step) - logits(points)) / 1e-5).mean(0)
    assert torch.allclose(found.latents, walked, rtol=1e-3, atol=1e-3)
    # On the model's own tail, in float32.
    tower = make_clip()
    assert torch.allclose(
        100 * F.normalize(embedding_from(tower, site, x.float()), dim=-1) @ texts.T.float(),
        logits(x).float(),
        atol=1e-3,
    )


@pytest.mark.parametrize("where", [0, 1, 2, "output"])
def test_the_tail_is_the_rest_of_the_tower(make_clip, batch, where):
    model, image = make_clip(), batch[:1]
    site = Sites.of(model).output if where == "output" else Sites.of(model).blocks[where]
    z = torch.randn(3, site.width, generator=torch.Generator().manual_seed(7))
    found = tail(model, Sites.of(model), site, image)(z)
    for row, activation in zip(found, z, strict=True):
        with torch.no_grad(), editing(model, site, lambda x, activation=activation: activation[None]):
            assert torch.allclose(row, model.encode_image(image)[0], atol=1e-5)


def test_the_sum_closes_in_the_middle_of_the_tower_too(make_clip, make_sae, batch):
    model, sae, image = make_clip(), make_sae(), batch[:1]
    site = Sites.of(model).blocks[0]
    texts = F.normalize(torch.randn(4, 24, generator=torch.Generator().manual_seed(8)), dim=-1)
    with torch.no_grad(), reading(model, [site]) as read:
        model.encode_image(image)
        x = read[site]
        vs2 = build_vs2(context(sae), alpha=1.0)
        moved, steered = moved_by(vs2, x), applied(vs2, x)
    run = tail(model, Sites.of(model), site, image)
    steps = moved.amounts[:, None] * sae.W_dec[moved.latents]
    found = attribute(lambda z: 100 * F.normalize(run(z), dim=-1) @ texts.T, x[0], steps, steered[0])
    assert found.total.abs().max() > 0.1
    assert found.remainder.abs().max() < 1e-2 * found.total.abs().max()
