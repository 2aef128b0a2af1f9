"""Selective amplification: the statistics against loops over classes and images, and the steering against VS2."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vs2_plugin.gallery.gallery import Gallery
from vs2_plugin.sae.topk import Latents
from vs2_plugin.steering import selective as module
from vs2_plugin.steering.batch import Batch, call, steer
from vs2_plugin.steering.move import vs2_steer
from vs2_plugin.steering.neighbours import Activations
from vs2_plugin.steering.retriever import Retriever
from vs2_plugin.steering.selective import SelectiveSteering, Selectivity, class_selectivity, latent_weights, weighted

LATENTS = 12


def omega_squared(codes, probabilities):
    """ω² of each column of ``codes`` [n, latents] by the formula of the analysis of variance, in plain loops."""
    count, found = len(codes), []
    mass = probabilities.sum(0)
    present = [k for k in range(probabilities.shape[1]) if mass[k] >= 1]
    for code in codes.T:
        mean = code.mean()
        total = sum((value - mean) ** 2 for value in code)
        between = 0.0
        for k in present:
            class_mean = sum(p * value for p, value in zip(probabilities[:, k], code, strict=True)) / mass[k]
            between += mass[k] * (class_mean - mean) ** 2
        within = (total - between) / (count - len(present))
        found.append((between - (len(present) - 1) * within) / (total + within) if total > 0 else 0.0)
    return np.array(found)


def sparse(codes):
    """Dense codes as what the SAE gives: every latent, in another order for each image."""
    order = torch.rand(codes.shape, generator=torch.Generator().manual_seed(0)).argsort(1)
    return Latents(codes.gather(1, order), order)


def selectivity(codes, probabilities, sizes=None):
    sizes = sizes or [len(codes)]
    parts = zip(codes.split(sizes), probabilities.split(sizes), strict=True)
    return class_selectivity(((sparse(code), p) for code, p in parts), codes.shape[1])


def make(count=400, classes=5, seed=0, effect=1.0, sharp=4.0):
    """Sparse codes of which the first half follow the classes, the rest do not; and class probabilities."""
    made = torch.Generator().manual_seed(seed)
    logits = sharp * torch.randn(count, classes, generator=made)
    codes = torch.randn(count, LATENTS, generator=made)
    codes[:, : LATENTS // 2] += effect * logits[:, [latent % classes for latent in range(LATENTS // 2)]] / sharp
    return F.relu(codes), logits.softmax(1)


@pytest.mark.parametrize("classes", [1, 2, 5, 30])
def test_it_is_the_square_root_of_omega_squared(classes):
    codes, probabilities = make(classes=classes)
    found = selectivity(codes, probabilities)
    expected = omega_squared(codes.double().numpy(), probabilities.double().numpy())
    assert found.shape == (LATENTS,) and found.dtype == torch.float32
    assert found.numpy() == pytest.approx(np.sqrt(expected.clip(0, 1)), abs=1e-4)
    if classes == 5:
        assert expected[:6].min() > 0.1 and expected[6:].max() < 0.05


def test_with_sure_classes_it_is_the_textbook_value():
    """Three groups of three: SB = 42, SW = 6, so that ω² = (42 - 2) / (48 + 1)."""
    codes = torch.tensor([[1.0, 2, 3, 4, 5, 6, 6.2679492, 7.2679492, 8.2679492]]).T
    groups = torch.arange(3).repeat_interleave(3)
    values = codes[:, 0].double()
    within = sum(((values[groups == g] - values[groups == g].mean()) ** 2).sum() for g in range(3))
    between = sum(3 * (values[groups == g].mean() - values.mean()) ** 2 for g in range(3))
    expected = (between - 2 * within / 6) / (between + within + within / 6)
    assert within == pytest.approx(6)
    assert float(selectivity(codes, F.one_hot(groups).float())[0]) == pytest.approx(float(expected) ** 0.5, abs=1e-6)


@pytest.mark.parametrize("classes", [2, 10, 40])
def test_latents_that_have_nothing_to_do_with_the_classes_have_none(classes):
    """Unlike S_B / S_T, which is K / n in the mean."""
    squares, naive = [], []
    for seed in range(20):
        made = torch.Generator().manual_seed(seed)
        codes = F.relu(torch.randn(500, LATENTS, generator=made))
        probabilities = F.one_hot(torch.randint(classes, (500,), generator=made), classes).float()
        squares.append(selectivity(codes, probabilities).square().mean())
        unclamped = omega_squared(codes.double().numpy(), probabilities.double().numpy())
        naive.append(unclamped.mean())
    chance = (classes - 1) / 500
    assert abs(np.mean(naive)) < 0.1 * chance + 0.0005  # no bias
    # No square is below 0; what is left is the spread, √(2 (K - 1)) / n, and no mean.
    assert np.mean(squares) < 0.6 * (2 * (classes - 1)) ** 0.5 / 500 + 1e-4
    assert classes == 2 or np.mean(squares) < 0.45 * chance


def test_the_scale_of_a_latent_does_not_matter():
    codes, probabilities = make()
    scale = torch.logspace(-3, 4, LATENTS)
    torch.testing.assert_close(selectivity(codes * scale, probabilities), selectivity(codes, probabilities))


def test_latents_that_never_change_have_none():
    codes, probabilities = make()
    codes[:, 0], codes[:, 1] = 0, 3.0
    found = selectivity(codes, probabilities)
    assert found[:2].tolist() == [0, 0] and found[2] > 0.2 and torch.isfinite(found).all()


def test_a_class_of_less_than_one_image_is_left_out():
    codes, probabilities = make(count=60, classes=4)
    rare = torch.zeros(60, 3)
    rare[5] = torch.tensor([0.9, 0.05, 0.0])  # one image nearly makes a class of its own
    mixed = torch.cat([probabilities * (1 - rare.sum(1, keepdim=True)), rare], dim=1)
    found = selectivity(codes, mixed).double().numpy()
    assert found**2 == pytest.approx(omega_squared(codes.double().numpy(), mixed.double().numpy()).clip(0), abs=1e-4)
    torch.testing.assert_close(selectivity(codes, torch.cat([probabilities, torch.zeros(60, 9)], 1)),
                               selectivity(codes, probabilities))  # fmt: skip
    # Just above, it counts.
    rare[6] = rare[5]
    mixed = torch.cat([probabilities * (1 - rare.sum(1, keepdim=True)), rare], dim=1)
    expected = omega_squared(codes.double().numpy(), mixed.double().numpy()).clip(0)
    assert selectivity(codes, mixed).double().numpy() ** 2 == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("sizes", [[400], [1, 399], [100] * 4, [37] * 10 + [30]])
def test_batches_come_to_the_same_as_one(sizes):
    codes, probabilities = make()
    torch.testing.assert_close(selectivity(codes, probabilities, sizes), selectivity(codes, probabilities))


def test_few_images_and_many_classes_are_finite():
    for count in (1, 2, 5):
        codes, probabilities = make(count=count, classes=9)
        found = selectivity(codes, probabilities)
        assert torch.isfinite(found).all() and found.min() >= 0 and found.max() <= 1


# ---- weights


def test_weights():
    r = torch.tensor([0.0, 0.1, 0.3, 0.2])
    assert latent_weights(r, 0).tolist() == [1] * 4
    assert latent_weights(r, 1).tolist() == pytest.approx([0, 0.5, 1.5, 1])
    assert latent_weights(r, 2).tolist() == pytest.approx([0, 0.25, 2.25, 1])
    assert latent_weights(r, 0.5).tolist() == pytest.approx([0, 0.5**0.5, 1.5**0.5, 1])
    assert latent_weights(torch.zeros(3), 2).tolist() == [1] * 3


# ---- the steering

CLASSES = 6


@pytest.fixture(scope="module")
def parts(make_sae):
    """A random SAE, a gallery of 300 activations and their embeddings, and the class embeddings."""
    sae = make_sae(num_latents=64, k=8)
    made = torch.Generator().manual_seed(1)
    directions = torch.randn(CLASSES, 32, generator=made)
    x = directions[torch.arange(300) % CLASSES] + torch.randn(300, 32, generator=made)
    return sae, x.half(), torch.randn(32, 32, generator=made), directions


def applied(steering, x):
    return steer(steering, x, Batch())


@pytest.fixture
def build(parts):
    """A function that gives the steering, with the retriever that knows the classes."""
    sae, x, project, directions = parts
    embeddings = (x.float() @ project).half()
    gallery = Gallery({"site": x.numpy()}, {"clip": embeddings.numpy()}, np.arange(300, dtype=np.uint64))
    retriever = Retriever(gallery, "cpu")
    retriever.set_classifier((directions @ project).T)
    shared = Selectivity(sae, Activations(gallery.activations["site"], retriever.device), retriever)
    return lambda alpha, p: SelectiveSteering(sae, shared, alpha, p), retriever


def test_the_selectivity_is_that_of_codes_and_zero_shot_probabilities(parts, build):
    sae, x, project, directions = parts
    make, _ = build
    applied(make(1.0, 2.0), x[:5].float())
    latents = sae.encode(x.float())
    codes = np.zeros((300, 64))
    np.put_along_axis(codes, latents.indices.numpy(), latents.values.double().numpy(), 1)
    embeddings = (x.float() @ project).half().double()
    logits = 100 * F.normalize(embeddings, dim=1) @ F.normalize((directions @ project).double(), dim=1).T
    expected = np.sqrt(omega_squared(codes, logits.softmax(1).numpy()).clip(0))
    found = make(1.0, 2.0).selectivity._r.numpy()
    assert found == pytest.approx(expected, abs=2e-3) and found.max() > 0.3 and (found == 0).any()


@pytest.mark.parametrize("alpha", [-1.0, 0.25, 3.0])
def test_with_p_0_it_is_vs2(parts, build, alpha):
    sae, _, _, _ = parts
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(2)) * 5
    found = applied(build[0](alpha, 0.0), x)
    torch.testing.assert_close(found, vs2_steer(x, sae, alpha), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(found, applied(build[0](alpha, 2.0), x), atol=1e-2)


@pytest.mark.parametrize("p", [0.0, 2.0])
def test_with_alpha_0_activations_stay_bit_for_bit(build, p):
    x = torch.randn(40, 32)
    assert applied(build[0](0.0, p), x) is x


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 8.0])
def test_over_the_gallery_the_steering_vectors_have_the_mean_length_of_vs2(parts, build, p):
    sae, x, _, _ = parts
    plain = sae.combine(sae.encode(x.float()))
    selective = call(build[0](1.0, p), x.float(), Batch()).code.direction
    assert float(selective.norm(dim=1).mean()) == pytest.approx(float(plain.norm(dim=1).mean()), rel=1e-5)
    assert not torch.allclose(plain, selective, rtol=0.05)


def test_the_formula_by_hand(parts, build):
    sae, x, _, _ = parts
    queries = torch.randn(10, 32, generator=torch.Generator().manual_seed(3))
    steering = build[0](1.5, 2.0)
    found = applied(steering, queries).double().numpy()
    r = steering.selectivity._r.double().numpy()
    w = (r / r[r > 0].mean()) ** 2
    decoder = sae.W_dec.double().numpy()

    def dense(activations):
        latents = sae.encode(activations)
        codes = np.zeros((len(activations), 64))
        np.put_along_axis(codes, latents.indices.numpy(), latents.values.double().numpy(), 1)
        return codes

    codes = dense(x.float())
    scale = np.linalg.norm(codes @ decoder, axis=1).sum() / np.linalg.norm((w * codes) @ decoder, axis=1).sum()
    moved = queries.double().numpy() + 1.5 * scale * (w * dense(queries)) @ decoder
    norms = np.linalg.norm(queries.double().numpy(), axis=1) / np.linalg.norm(moved, axis=1)
    assert found == pytest.approx(moved * norms[:, None], abs=1e-4)


def test_other_classes_make_other_weights(build):
    make, retriever = build
    steering, x = make(1.0, 2.0), torch.randn(10, 32)
    before = applied(steering, x)
    assert torch.equal(applied(steering, x), before)
    retriever.set_classifier(2 * retriever.classifier)  # the same classes
    torch.testing.assert_close(applied(steering, x), before)
    retriever.set_classifier(torch.randn(32, 3, generator=torch.Generator().manual_seed(9)))
    after = applied(steering, x)
    assert not torch.allclose(after, before, atol=1e-3)
    fresh = SelectiveSteering(
        steering.sae, Selectivity(steering.sae, steering.selectivity._activations, retriever), 1.0, 2.0
    )
    assert torch.equal(applied(fresh, x), after)


def test_of_a_large_gallery_images_spread_over_it_are_used_in_batches(parts, build, monkeypatch):
    sae, x, _, _ = parts
    whole = build[0](1.0, 2.0).selectivity.weights(2.0)
    shared, retriever = build[0](1.0, 2.0).selectivity, build[1]
    monkeypatch.setattr(module, "_BATCH", 64)
    again = Selectivity(sae, shared._activations, retriever).weights(2.0)
    torch.testing.assert_close(again[0], whole[0], rtol=1e-4, atol=1e-5)
    assert again[1] == pytest.approx(whole[1], rel=1e-5)
    monkeypatch.setattr(module, "_IMAGES", 100)
    rows = torch.tensor(np.linspace(0, 299, 100).astype(int))
    gallery = Gallery(
        {"site": x[rows].numpy()}, {"clip": retriever.gallery.embeddings["clip"][rows]}, np.arange(100, dtype=np.uint64)
    )
    few = Retriever(gallery, "cpu")
    few.set_classifier(retriever.classifier)
    expected = Selectivity(sae, Activations(gallery.activations["site"], few.device), few).weights(2.0)
    found = Selectivity(sae, shared._activations, retriever).weights(2.0)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], whole[0], atol=1e-2) and found[1] == pytest.approx(expected[1], rel=1e-5)


def test_weighting_leaves_the_code_as_it_was(parts):
    latents = Latents(torch.ones(2, 3), torch.tensor([[0, 1, 2], [2, 2, 0]]))
    found = weighted(latents, torch.tensor([1.0, 2.0, 3.0]))
    assert found.values.tolist() == [[1, 2, 3], [3, 3, 1]] and latents.values.sum() == 6
