"""The brake of VS2++ and CLIP steering: an image whose neighbours disagree is left alone, bit for bit."""

import numpy as np
import pytest
import torch

from vs2_plugin.data.images import image_digest
from vs2_plugin.gallery.gallery import Gallery
from vs2_plugin.gallery.search import ExactSearch
from vs2_plugin.sae.topk import sample_fvu
from vs2_plugin.steering.batch import Batch
from vs2_plugin.steering.batch import steer as applied
from vs2_plugin.steering.gate import Gate
from vs2_plugin.steering.neighbours import Activations, Codes, NeighbourSteering
from vs2_plugin.steering.retriever import Retriever

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
