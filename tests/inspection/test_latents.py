"""Statistics of latents against plain loops."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from vs2_plugin.arrays import Stack
from vs2_plugin.inspection import latents
from vs2_plugin.inspection.latents import LatentStatistics, chance, choose, kinds, scan

TOP = 4


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    activations = (rng.integers(-8, 9, (150, 32)) / 4).astype(np.float16)  # sums of these are exact in any order
    activations[100:] = activations[:50]  # equal activations: the earlier image comes first
    return activations, rng.normal(size=(150, 24)).astype(np.float16), torch.from_numpy(rng.normal(size=(24, 5)))


def plain(sae, activations, embeddings, classifier):
    """One image and one latent at a time."""
    directions = classifier / classifier.norm(dim=0)
    found = [[] for _ in range(sae.config.num_latents)]
    for row, (x, embedding) in enumerate(zip(activations, embeddings, strict=True)):
        code = sae.encode(torch.from_numpy(x).float()[None])
        label = int((torch.from_numpy(embedding).double() @ directions).argmax())
        for value, latent in zip(code.values[0].tolist(), code.indices[0].tolist(), strict=True):
            if value:
                found[latent].append((row, value, label))
    return found


@pytest.mark.parametrize("block", [7, 50, 1000])
@pytest.mark.parametrize("activation", ["relu", "abs"])
def test_statistics_equal_plain_loops(make_sae, arrays, monkeypatch, block, activation):
    monkeypatch.setattr(latents, "_BLOCK", block)
    sae = make_sae(activation=activation, k=40)  # of which some are not active by ReLU
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_((16 * parameter).round() / 16)
        sae.encoder.weight[:3] = 0  # three dead latents
        sae.encoder.bias[:3] = -1 if activation == "relu" else 0
    seen = []
    found = scan(sae, *arrays, TOP, seen.append)
    expected = plain(sae, *arrays)
    assert sum(seen) == found.images == 150 and max(seen) <= block
    assert found.counts.tolist() == [len(active) for active in expected]
    assert found.counts[:3].tolist() == [0, 0, 0] and found.class_counts.sum() == 150
    for latent, active in enumerate(expected):
        best = sorted(active, key=lambda one: (-abs(one[1]), one[0]))[:TOP]
        shown = len(best)
        assert found.shown[latent] == shown
        assert found.rows[latent].tolist() == [row for row, _, _ in best] + [-1] * (TOP - shown)
        assert found.classes[latent].tolist() == [label for _, _, label in best] + [-1] * (TOP - shown)
        assert np.allclose(found.values[latent, :shown], [value for _, value, _ in best], atol=1e-4)
        if active:
            assert np.isclose(found.means[latent], np.mean([value for _, value, _ in active]), atol=1e-4)
            votes = Counter(label for _, _, label in best)
            most = max(votes.values())
            assert found.purity[1][latent] == most
            assert found.purity[0][latent] == min(label for label, count in votes.items() if count == most)
        else:
            assert (found.purity[0][latent], found.purity[1][latent], found.means[latent]) == (-1, 0, 0)


def test_a_gallery_of_several_data_sets_is_read_as_one(make_sae, arrays):
    sae, (activations, embeddings, classifier) = make_sae(), arrays
    whole = scan(sae, activations, embeddings, classifier, TOP)
    parts = (Stack([array[:40], array[40:]]) for array in (activations, embeddings))
    assert np.array_equal(scan(sae, *parts, classifier, TOP).rows, whole.rows)


def test_a_scan_reads_blocks_and_keeps_nothing_that_grows_with_the_images(make_sae, arrays, monkeypatch):
    class Watched(np.ndarray):
        largest = 0

        def __getitem__(self, rows):
            found = super().__getitem__(rows)
            Watched.largest = max(Watched.largest, len(found))
            return np.asarray(found)

    monkeypatch.setattr(latents, "_BLOCK", 16)
    activations, embeddings, classifier = arrays
    found = scan(make_sae(), activations.view(Watched), embeddings.view(Watched), classifier, TOP)
    assert Watched.largest == 16
    held = [value for value in vars(found).values() if isinstance(value, np.ndarray)]
    assert max(value.size for value in held) == 64 * TOP


def test_chance_is_exact():
    counts = np.array([3, 0, 5, 2])
    shares = counts / counts.sum()
    table = chance(counts, 5)
    assert np.allclose(table.sum(1), 1) and table[0, 0] == 1
    for drawn in range(1, 6):
        expected = np.zeros(6)
        for draw in itertools.product(range(4), repeat=drawn):
            expected[max(Counter(draw).values())] += np.prod(shares[list(draw)])
        assert np.allclose(table[drawn], expected)


def test_chance_with_many_classes_is_finite():
    table = chance(np.arange(1, 1001), 10)
    assert np.isfinite(table).all() and (table > -1e-12).all() and np.allclose(table.sum(1), 1)


def test_a_latent_is_rare_by_an_even_share_and_dense_by_the_images():
    frequencies = np.zeros(100)
    frequencies[:5] = [0.0039, 4 / 100 / 10, 0.04, 0.1, 0.11]
    assert kinds(frequencies, 4)[:6].tolist() == ["rare", "", "", "", "dense", "dead"]


def statistics(counts, purity=None):
    rows = np.where(np.arange(TOP) < np.array(counts)[:, None], 1, -1)
    classes = np.where(rows >= 0, np.arange(TOP) + 1, -1)
    for latent, votes in enumerate(purity or []):
        classes[latent, :votes] = 0
    counts = np.array(counts)
    return LatentStatistics(1000, counts, counts / 10, rows, rows.astype(float), classes, np.ones(TOP + 1, int))


def test_choices_are_what_they_are_said_to_be():
    found = statistics([0, 2, 9, 30, 30, 500, 40, 0], [0, 2, 3, 4, 4, 2, 2, 0])
    chosen = choose(found, 8)
    assert {name: len(rows) for name, rows in chosen.items()} == {"random": 2, "frequent": 2, "strong": 2, "pure": 2}
    assert chosen["frequent"].tolist() == chosen["strong"].tolist() == [5, 6]
    assert chosen["pure"].tolist() == [3, 4]  # not 1, whose two images are of one class
    everything = choose(found, 400)
    assert sorted(everything["random"].tolist()) == [1, 2, 3, 4, 5, 6]
    assert everything["pure"].tolist() == [3, 4, 2, 5, 6]
    assert [len(rows) for rows in choose(found, 5).values()] == [2, 1, 1, 1]
    assert [len(rows) for rows in choose(found, 7).values()] == [2, 2, 2, 1]
    assert np.array_equal(choose(found, 8)["random"], chosen["random"])


def test_purity_by_chance_is_that_of_as_many_images_drawn_with_the_classes_shares():
    found = statistics([3, 9], [2, 2])
    for latent, shown in ((0, 3), (1, 4)):
        most = np.array([max(Counter(draw).values()) for draw in itertools.product(range(TOP + 1), repeat=shown)])
        assert found.purity_by_chance(latent) == pytest.approx((most.mean() / shown, (most >= 2).mean()))


def test_random_latents_are_drawn_evenly():
    found = statistics([0, *([50] * 40)])
    times = np.zeros(41)
    for seed in range(400):
        times[choose(found, 40, seed)["random"]] += 1
    assert times[0] == 0 and times[1:].min() > 60 and times[1:].max() < 140  # 100 expected


def test_one_image_is_no_images():
    found = statistics([1, 0])
    assert found.about(0, ["zero", "one"]) == (
        "active in 1 of 1,000 training images (0.10%), mean 0.10; purity 100% (1 of 1 is 'one'; by chance 100%)"
    )
    assert found.about(1, ["zero", "one"]) == "active in none of 1,000 training images"
