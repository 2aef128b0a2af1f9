"""The brake of VS2++ and CLIP steering: an image whose neighbours disagree is left alone, bit for bit."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vs2_plugin.data.images import image_digest
from vs2_plugin.errors import DataError
from vs2_plugin.gallery.gallery import Gallery
from vs2_plugin.gallery.search import ExactSearch
from vs2_plugin.sae.topk import sample_fvu
from vs2_plugin.steering.batch import Batch
from vs2_plugin.steering.batch import steer as applied
from vs2_plugin.steering.gate import Gate
from vs2_plugin.steering.neighbours import Activations, Codes, MixedSteering, NeighbourSteering, VoteSteering, contrast
from vs2_plugin.steering.retriever import Neighbours, Retriever

N = 10


@pytest.fixture(scope="module")
def images():
    """64 images that come with their embeddings and activations: 24 queries, the others in the gallery."""
    return torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["codes", "activations"])
def make(request, images, make_sae):
    """A function that gives the steering with a brake, and one that steers the queries by it."""
    sae, kept = make_sae(), images[24:]
    x = images.flatten(1)[:, :32] * 3
    embeddings = kept.flatten(1).half().numpy()
    activations = Activations(x[24:].half().numpy(), torch.device("cpu"))
    digests = np.array([image_digest(image) for image in kept], np.uint64)
    gallery = Gallery({"site": activations._rows}, {"clip": embeddings}, digests)
    retriever = Retriever(gallery, "cpu", n=N, search=ExactSearch(embeddings, "cpu"), digest=image_digest)
    retriever.set_classifier(torch.randn(48, 3, generator=torch.Generator().manual_seed(1)))
    directions = Codes(sae, activations, 40) if request.param == "codes" else activations

    def build(brake, rule="majority", alpha=2.0):
        return NeighbourSteering(retriever, directions, alpha, rule, "pseudo", brake=brake)

    def steer(steering, rows=slice(0, 24)):
        return applied(steering, x[rows], Batch(images[rows], embed=lambda: images[rows].flatten(1)))

    def shares(rule="majority"):
        """The share of S⁺ among the neighbours of each query, counted one by one."""
        batch = Batch(images[:24], embed=lambda: images[:24].flatten(1))
        hood, own = retriever.neighbours(batch), retriever.classes(batch).tolist()
        labels = retriever.labels("pseudo")[hood.rows].tolist()
        if rule == "query":
            return [row.count(mine) / N for row, mine in zip(labels, own, strict=True)]
        return [max(row.count(label) for label in row) / N for row in labels]

    return build, steer, shares, x[:24], sae


@pytest.mark.parametrize("rule", ["majority", "query"])
@pytest.mark.parametrize("brake", [0.4, 0.5, 0.6, 0.7, 0.8])
def test_images_below_the_brake_stay_and_the_others_are_steered_as_without(make, brake, rule):
    build, steer, shares, x, _ = make
    steering = build(brake, rule)
    found, free = steer(steering), steer(build(None, rule))
    opened = torch.tensor([share >= brake - 1e-9 for share in shares(rule)])  # 6 of 10 are at least 0.6
    assert torch.equal(found[~opened], x[~opened]) and torch.equal(found[opened], free[opened])
    assert not torch.isclose(free, x).all(1).any()
    assert steering.facts["braked"] == pytest.approx(float((~opened).double().mean()))
    assert 0 < int(opened.sum()) < 24 or brake in (0.4, 0.8)


def test_a_brake_of_0_is_none_and_one_of_1_asks_for_all(make):
    build, steer, shares, x, _ = make
    never, always = build(0.0), build(1.0)
    assert torch.equal(steer(never), steer(build(None))) and never.facts["braked"] == 0
    unanimous = torch.tensor([share == 1 for share in shares()])
    found = steer(always)
    assert torch.equal(found[~unanimous], x[~unanimous]) and always.facts["braked"] == float(
        (~unanimous).float().mean()
    )


def test_without_a_brake_nothing_is_reported_of_one(make):
    build, steer, *_ = make
    steering = build(None)
    steer(steering)
    assert "braked" not in steering.facts and 0 < steering.facts["agreement"] < 1
    assert "braked" not in build(0.5).facts  # nothing seen


def test_shares_add_up_over_batches_and_are_forgotten(make):
    build, steer, *_ = make
    whole, parted = build(0.6), build(0.6)
    expected = steer(whole)
    found = torch.cat([steer(parted, slice(start, start + 5)) for start in range(0, 24, 5) if start < 20])
    torch.testing.assert_close(found, expected[:20])
    steer(parted, slice(20, 24))
    assert parted.facts == pytest.approx(whole.facts) and 0 < parted.facts["braked"] < 1
    parted.reset()
    assert parted.facts == {"alpha": 2.0}
    steer(parted)
    assert parted.facts == pytest.approx(whole.facts)


def test_agreement_is_that_of_all_images_braked_or_not(make):
    build, steer, shares, *_ = make
    steering = build(0.7)
    steer(steering)
    assert steering.facts["agreement"] == pytest.approx(np.mean(shares()))


def test_with_a_gate_an_image_is_steered_where_both_let_it(make):
    build, steer, shares, x, sae = make
    mean = torch.zeros(32)
    ratio = sample_fvu(x, sae(x), mean)
    tau = float(ratio.sort().values[11:13].mean())
    steering = build(0.6)
    gate = Gate(steering, sae, mean, tau)
    found, free = steer(gate), steer(build(None))
    opened = torch.tensor(shares()) >= 0.6
    both = opened & (ratio <= tau)
    assert torch.equal(found[both], free[both]) and torch.equal(found[~both], x[~both])
    assert 0 < int(both.sum()) < int(opened.sum())
    assert gate.facts["coverage"] == 0.5 and steering.facts["braked"] == pytest.approx(float((~opened).float().mean()))


# ---- of what the brake and the gate let through


def test_a_contrast_is_the_mean_of_the_ones_less_that_of_the_others():
    made = torch.Generator().manual_seed(0)
    labels, chosen = torch.randint(3, (60, 5), generator=made), torch.randint(4, (60,), generator=made)
    valid, values = torch.rand(60, 5, generator=made) < 0.6, torch.randn(60, 5, generator=made)
    valid[0] = False
    weights, shares = contrast(labels, chosen, valid)
    for row in range(60):
        places = valid[row].nonzero()[:, 0].tolist()
        there = [(float(values[row, place]), labels[row, place] == chosen[row]) for place in places]
        ones, others = ([value for value, same in there if same == which] for which in (True, False))
        expected = sum(ones) / max(1, len(ones)) - sum(others) / max(1, len(others))
        assert float(weights[row] @ values[row]) == pytest.approx(expected, abs=1e-6)
        assert shares[row] == pytest.approx(len(ones) / max(1, len(there)))


class Found(SimpleNamespace):
    """A retriever that has found four neighbours of three queries; of the second, one, and of the third, none."""

    device = torch.device("cpu")
    similarity = torch.tensor([[0.9, 0.6, 0.3, -0.2], [0.5, 0.4, 0.3, 0.2], [0.5, 0.4, 0.3, 0.2]])
    valid = torch.tensor([[True] * 4, [False, True, False, False], [False] * 4])
    classifier = torch.nn.functional.normalize(torch.randn(6, 3, generator=torch.Generator().manual_seed(2)), dim=0)

    def neighbours(self, batch):
        return Neighbours(torch.arange(4).expand(3, 4), self.similarity, self.valid)

    def labels(self, kind):
        return torch.tensor([2, 1, 1, 2])

    @property
    def gallery(self):
        return SimpleNamespace(embeddings={"clip": self.embeddings})

    embeddings = 3 * np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)


@pytest.mark.parametrize("labels", ["none", "pseudo"])
def test_embeddings_are_mixed_with_the_mean_of_neighbours_by_similarity(labels):
    steering, x = MixedSteering(Found(), 0.7, labels), torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    found = steering(x, None)
    unit = Found.embeddings / np.linalg.norm(Found.embeddings, axis=1, keepdims=True)
    # Of the first, two neighbours each have the labels 1 and 2; those of 1 are more similar together.
    taken = ({0: 0.9, 1: 0.6, 2: 0.3}, {1: 0.4}) if labels == "none" else ({1: 0.6, 2: 0.3}, {1: 0.4})
    for row, of in enumerate(taken):
        mean = sum(weight * unit[place] for place, weight in of.items()) / sum(of.values())
        query, norm = x[row].numpy(), float(x[row].norm())
        torch.testing.assert_close(found[row], torch.from_numpy(norm * (0.7 * query / norm + 0.3 * mean)).float())
    assert torch.equal(found[2], x[2])
    assert steering.facts == ({} if labels == "none" else {"agreement": pytest.approx((0.5 + 1 + 0) / 3)})


def test_a_vote_gives_the_embedding_of_the_winning_class_and_leaves_who_has_no_neighbours():
    steering, x = VoteSteering(Found()), torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    found = steering(x, None)
    assert torch.equal(found[1], Found.classifier.T[1]) and torch.equal(found[2], x[2])
    assert steering.facts == {"agreement": pytest.approx((0.5 + 1 + 0) / 3)}


def test_the_query_rule_numbers_classes_as_the_training_labels_do():
    class Two(Found):
        gallery = SimpleNamespace(first_labels={"a": 0, "b": 5})

        def classes(self, batch):
            return torch.tensor([1, 2])

    def own(dataset, labels="oracle", retriever=Two):
        return NeighbourSteering(retriever(), None, 1.0, "query", labels, dataset)._own_classes(None).tolist()

    assert (own("a"), own("b"), own("c", "pseudo")) == ([1, 2], [6, 7], [1, 2])
    for unknown in ("c", None):
        with pytest.raises(DataError, match="training labels of a and b"):
            own(unknown)
    one = type("One", (Two,), {"gallery": SimpleNamespace(first_labels={"a": 0})})
    assert own(None, retriever=one) == [1, 2]
