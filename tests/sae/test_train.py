"""Training: what it is given, what it keeps apart, and what it says of itself."""

import copy
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

from vs2_plugin import arrays
from vs2_plugin.errors import DataError, SettingError
from vs2_plugin.sae import source
from vs2_plugin.sae import train as train_module
from vs2_plugin.sae.config import RECIPES, TrainConfig
from vs2_plugin.sae.fit import QUANTILES, parted, pca_fvu
from vs2_plugin.sae.source import Source
from vs2_plugin.sae.topk import fvu, sample_fvu
from vs2_plugin.sae.train import train_sae

D_IN = 16


def make_activations(count=300, seed=0):
    """Sparse sums of 40 directions around a mean far from the origin."""
    rng = np.random.default_rng(seed)
    factors = rng.random((count, 40)) ** 8
    return (factors @ rng.standard_normal((40, D_IN)) + 3 * rng.standard_normal(D_IN)).astype(np.float32)


def quick(**settings):
    return TrainConfig(**{"k": 4, "samples": 8000, "sae_batch_size": 50, **settings})


def train(activations, **settings):
    return train_sae(activations, quick(**settings), quiet=True)


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.fixture(scope="module")
def trained():
    activations = make_activations()
    return activations, *train(activations)


@pytest.mark.parametrize("settings", [{}, {"activation": "abs", "rescale": False}, RECIPES["paper"]])
def test_same_seed_same_bits(settings):
    activations = make_activations()
    one, _, figures = train(activations, **settings)
    two, _, again = train(activations, **settings)
    assert same_weights(one, two)
    assert asdict(figures) | {"seconds": 0} == asdict(again) | {"seconds": 0}
    assert not same_weights(one, train(activations, seed=1, **settings)[0])


def test_a_float16_file_on_disk_trains_as_its_values_in_memory_do(tmp_path):
    half = make_activations().astype(np.float16)
    np.save(tmp_path / "half.npy", half)
    mapped = np.load(tmp_path / "half.npy", mmap_mode="r")
    on_disk, mean, figures = train(mapped)
    in_memory, same_mean, same_figures = train(half.astype(np.float32))
    assert same_weights(on_disk, in_memory)
    assert torch.equal(mean, same_mean)
    assert figures.fvu_quantiles == same_figures.fvu_quantiles


@pytest.mark.parametrize("files", [1, 2])
def test_what_memory_may_not_hold_is_asked_for_and_trains_to_the_same_bits(files, tmp_path, monkeypatch):
    half = make_activations().astype(np.float16)
    mapped = []
    for number, part in enumerate(np.array_split(half, files)):
        np.save(tmp_path / f"{number}.npy", part)
        mapped.append(np.load(tmp_path / f"{number}.npy", mmap_mode="r"))
    expected, _, figures = train(half)
    asked, read = [], []
    rows = Source.read
    monkeypatch.setattr(arrays, "_LARGE", half.nbytes)
    monkeypatch.setattr(source, "ask_for", lambda given, rows: asked.append(rows) or arrays.ask_for(given, rows))
    monkeypatch.setattr(Source, "read", lambda given, chosen: read.append(chosen) or rows(given, chosen))
    found, _, same_figures = train(arrays.stack(mapped))
    assert same_weights(found, expected)
    assert asdict(same_figures) | {"seconds": 0} == asdict(figures) | {"seconds": 0}
    wanted = {number for part in asked for number in part.tolist()}
    assert len(asked) > figures.steps == 160 and {number for part in read for number in part.tolist()} <= wanted
    monkeypatch.setattr(arrays, "_LARGE", half.nbytes + 1)
    asked.clear()
    train(arrays.stack(mapped))
    assert not asked


def test_it_learns(trained):
    activations, sae, _, figures = trained
    untrained = train(activations, samples=50, init="random")[2]
    assert figures.fvu < 0.5 * untrained.fvu
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(4 * D_IN))
    assert not any(p.requires_grad for p in sae.parameters())


@pytest.mark.parametrize("init", ["data", "random"])
def test_held_out_activations_are_never_trained_on(monkeypatch, init):
    activations = make_activations()
    seen = set()

    def spy(sae, x, *args):
        seen.update(x[:, 0].tolist())
        return set_gradients(sae, x, *args)

    set_gradients = train_module.set_gradients
    monkeypatch.setattr(train_module, "set_gradients", spy)
    figures = train(activations, rescale=False, init=init)[2]
    assert len(set(activations[:, 0].tolist())) == 300  # the first coordinate tells them apart
    assert figures.held_out_count == 30
    assert figures.train_count == len(seen) == 270


def test_data_directions_are_differences_of_training_activations():
    activations = make_activations(60)
    start = train(activations, samples=50, lr=1e-9)[0]
    differences = torch.from_numpy((activations[:, None] - activations[None]).reshape(-1, D_IN))
    cosines = start.W_dec @ torch.nn.functional.normalize(differences).T
    torch.testing.assert_close(cosines.amax(1), torch.ones(4 * D_IN), atol=1e-4, rtol=0)


def test_equal_activations_leave_no_latent_without_a_direction():
    activations = make_activations(40)
    activations[:20] = activations[0]
    sae, _, figures = train(activations, samples=200)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(4 * D_IN))
    assert math.isfinite(figures.fvu)


@torch.no_grad()
def test_figures_are_those_of_the_sae_returned(trained):
    activations, sae, mean, figures = trained
    held = torch.from_numpy(activations[np.random.default_rng(0).permutation(300)[:30]])
    rest = torch.from_numpy(activations[np.random.default_rng(0).permutation(300)[30:]])
    torch.testing.assert_close(mean, torch.from_numpy(activations.mean(0)))
    assert figures.fvu == pytest.approx(fvu(held, sae(held)).item(), abs=2e-5)
    quantiles = np.quantile(sample_fvu(held, sae(held), mean).numpy(), QUANTILES)
    assert list(figures.fvu_quantiles) == [f"{q:g}" for q in QUANTILES]
    np.testing.assert_allclose(list(figures.fvu_quantiles.values()), quantiles, atol=2e-5)
    latents = sae.encode(rest)
    assert figures.dead == pytest.approx(1 - len(latents.indices[latents.values != 0].unique()) / (4 * D_IN), abs=1e-6)
    assert figures.steps == 160


def test_the_unit_of_the_activations_does_not_matter(trained):
    activations, sae, mean, figures = trained
    larger, larger_mean, same = train(activations * 64)  # a power of two, so that rounding is the same too
    assert same.fvu == figures.fvu
    torch.testing.assert_close(larger_mean, mean * 64)
    torch.testing.assert_close(larger.W_dec, sae.W_dec)
    x = torch.from_numpy(activations)
    torch.testing.assert_close(larger(x * 64), sae(x) * 64)
    fixed = [train(activations * unit, rescale=False)[2].fvu for unit in (1, 64)]
    assert fixed[0] != fixed[1]


@torch.no_grad()
def test_scaling_back_gives_the_reconstruction_of_the_training(monkeypatch):
    activations = make_activations()
    inside = []

    def spy(sae, source, held, scale=1.0):
        x = torch.from_numpy(activations[held]) / scale
        inside.append((x, sae(x)))
        return held_out_fvu(sae, source, held, scale)

    held_out_fvu = train_module.held_out_fvu
    monkeypatch.setattr(train_module, "held_out_fvu", spy)
    monkeypatch.setattr(train_module, "_EVALUATIONS", 1)
    sae, _, _ = train(activations)
    ((scaled, reconstruction),) = inside  # once, at the end of the training
    held = np.sort(np.random.default_rng(0).permutation(len(activations))[: len(scaled)])
    raw = torch.from_numpy(activations[held])
    scale = raw.norm() / scaled.norm()
    assert abs(scale - 1) > 0.05
    torch.testing.assert_close(scaled * scale, raw)
    torch.testing.assert_close(sae(raw), reconstruction * scale)


def with_value(value):
    activations = make_activations()
    activations[5, 3] = value
    return activations


@pytest.mark.parametrize(
    ("activations", "named"),
    [
        (make_activations(19), "19 activations are too few"),
        (with_value(np.nan), "not finite"),
        (with_value(np.inf), "not finite"),
        (with_value(-np.inf).astype(np.float16), "not finite"),
        (np.full((50, D_IN), 0.1, np.float32), "all activations are equal"),
        (np.zeros((50, D_IN), np.float16), "all activations are equal"),
        (make_activations() * np.float32(1e18), "total variance of .*e\\+3.; expected 1e-30 to 1e\\+30.*divide them"),
        (make_activations() * np.float32(1e-18), "total variance of .*e-3.; expected 1e-30 to 1e\\+30.*divide them"),
        (np.eye(50, D_IN)[[0] + [1] * 49], "all 5 held-out activations are equal"),
    ],
)
def test_activations_that_cannot_be_used_are_refused(activations, named):
    with pytest.raises(DataError, match=named):
        train(activations)


def test_the_number_of_threads_is_as_before():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        train(make_activations(), samples=50)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_training_that_diverges_says_so(monkeypatch):
    monkeypatch.setattr(train_module, "held_out_fvu", lambda *_: math.nan)
    with pytest.raises(DataError, match="diverged"):
        train(make_activations(), samples=100)


def test_more_active_latents_than_there_are_is_refused():
    with pytest.raises(SettingError, match="k is 65"):
        train(make_activations(), k=65)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", 0),
        ("warmup", 1.5),
        ("samples", -1),
        ("sae_batch_size", 1),
        ("auxk", -1),
        ("dead_after", 0),
        ("seed", -1),
        ("expansion_factor", 0),
        ("k", 0),
        ("activation", "gelu"),
        ("init", "zero"),
    ],
)
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(SettingError, match=f"{name} is {value}|{name} is '{value}'"):
        TrainConfig(**{name: value})


def test_zeros_are_filled_in_by_the_number_of_activations():
    sizes = [(c.sae_batch_size, c.samples) for c in map(TrainConfig().for_size, (40, 900, 5000, 90_000))]
    assert sizes == [(40, 200_000), (112, 200_000), (625, 1_000_000), (1024, 1_000_000)]
    given = TrainConfig(samples=500, sae_batch_size=10).for_size(900)
    assert (given.sae_batch_size, given.samples) == (10, 500)


def test_the_paper_recipe_states_what_the_paper_does():
    paper = TrainConfig(**RECIPES["paper"])
    assert (paper.lr, paper.auxk, paper.rescale, paper.init, paper.activation) == (5e-4, 0.0, False, "random", "relu")


def test_latents_silent_for_so_many_steps_are_those_that_the_step_revives(monkeypatch):
    told, active, set_gradients = [], [], train_module.set_gradients

    def spy(sae, x, dead, *args):
        found = set_gradients(sae, x, dead, *args)
        told.append(dead.clone())
        active.append(torch.bincount(found[1].indices[found[1].values != 0], minlength=4 * D_IN) > 0)
        return found

    monkeypatch.setattr(train_module, "set_gradients", spy)
    train(make_activations(), k=1, samples=100, sae_batch_size=5, dead_after=3)
    for step in range(20):
        expected = ~torch.stack(active[step - 3 : step]).any(0) if step >= 3 else torch.zeros(4 * D_IN, dtype=bool)
        assert torch.equal(told[step], expected)
    assert 0 < sum(map(torch.sum, told)) < 17 * 4 * D_IN


def test_the_weights_kept_are_those_of_the_least_held_out_fvu(monkeypatch):
    seen = []

    def spy(sae, *_):
        seen.append(copy.deepcopy(sae))
        return [3.0, 1.0, 2.0][len(seen) - 1]

    monkeypatch.setattr(train_module, "held_out_fvu", spy)
    monkeypatch.setattr(train_module, "_EVALUATIONS", 3)
    sae, _, _ = train(make_activations(), samples=150, rescale=False)
    assert [same_weights(sae, one) for one in seen] == [False, True, False]


@torch.no_grad()
def test_latents_chosen_with_a_value_of_zero_are_not_counted_as_active():
    activations = make_activations()
    sae, _, figures = train(activations, samples=500, k=60)
    rest = torch.from_numpy(activations[np.random.default_rng(0).permutation(300)[30:]])
    counts = (sae.encode(rest).values != 0).sum(1).double()
    assert figures.l0 == pytest.approx(counts.mean().item(), abs=1e-4) and figures.l0 < 59


def test_a_tenth_is_held_out_but_no_more_than_ten_thousand():
    assert [list(map(len, parted(count, 0))) for count in (25, 200_000)] == [[2, 23], [10_000, 190_000]]


def test_the_learning_rate_rises_for_the_warm_up_and_falls_to_the_end(monkeypatch):
    rates, step = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: rates.append(self.param_groups[0]["lr"]) or step(self))
    train(make_activations(), samples=500, warmup=0.4, lr=1e-3)
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, *(n / 6 * 1e-3 for n in (5, 4, 3, 2, 1))])


def test_of_few_activations_there_are_few_principal_components():
    """Beyond their number, directions would explain what happens to lie along them."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 128)).astype(np.float32)
    fitted, held = np.arange(40), np.arange(40, 60)
    known, rows = x[fitted].astype(np.float64), x[held].astype(np.float64)
    vectors = np.linalg.svd(known - known.mean(0), full_matrices=False)[2][:39]
    rest = rows - known.mean(0)
    rest = rest - rest @ vectors.T @ vectors
    expected = np.square(rest).sum() / np.square(rows - rows.mean(0)).sum()
    assert pca_fvu(Source(x, "cpu"), fitted, held, 64) == pytest.approx(expected, rel=1e-4)
