"""All figures of checkpoints, of given activations and of a gallery."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import vs2_plugin
from vs2_plugin.checkpoint.store import Store
from vs2_plugin.errors import DataError
from vs2_plugin.quality import measure as module
from vs2_plugin.quality.meaning import sparse_probes
from vs2_plugin.quality.measure import ZeroShot, keep, measure, stability
from vs2_plugin.quality.notes import NOTES
from vs2_plugin.quality.subject import open_subject

COUNT, WIDTH = 400, 16


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A store with two SAEs of the same activations, and files of them and of labels."""
    folder = tmp_path_factory.mktemp("quality")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, COUNT)
    x = (rng.normal(size=(4, WIDTH))[labels] + rng.normal(size=(COUNT, WIDTH)) / 2 + 1).astype(np.float32)
    np.save(folder / "X.npy", x)
    np.save(folder / "y.npy", labels)
    np.save(folder / "other.npy", x[::-1] * 2)
    for seed in (0, 1):
        vs2_plugin.train(x, samples=4000, k=4, seed=seed, quiet=True, store=folder, name=f"s{seed}")
    return folder


@pytest.fixture
def subject(trained):
    return open_subject("s0", Store(trained), activations=trained / "X.npy", labels=trained / "y.npy")


def test_figures_are_those_of_plain_computations(trained, subject):
    found = measure(subject, np.load(trained / "other.npy"))
    x, sae, site = np.load(trained / "X.npy"), subject.sae, subject.site
    order = np.random.default_rng(0).permutation(COUNT)
    held, rest = np.sort(order[:40]), order[40:]
    figures = {name: figure.value for name, figure in found.figures.items()}

    def explained(rows):
        rebuilt = sae(torch.from_numpy(rows.copy())).numpy()
        return 1 - ((rows - rebuilt) ** 2).sum() / ((rows - rows.mean(0)) ** 2).sum()

    assert figures["explained_variance"] == pytest.approx(explained(x[held]), abs=1e-5)
    assert figures["explained_variance"] == pytest.approx(1 - site.fvu, abs=1e-5)
    assert figures["explained_variance_elsewhere"] == pytest.approx(explained(x[::-1] * 2), abs=1e-5)
    centred = x[rest] - x[rest].mean(0)
    vectors = np.linalg.svd(centred, full_matrices=False)[2][:4]
    outside = x[held] - x[rest].mean(0)
    outside = outside - outside @ vectors.T @ vectors
    pca = 1 - (outside**2).sum() / ((x[held] - x[held].mean(0)) ** 2).sum()
    older = replace(subject, site=replace(site, training={}))  # its training recorded nothing
    for figures_of in (found, measure(older)):
        assert figures_of.figures["explained_variance"].beside == pytest.approx(pca, abs=1e-5)
    assert figures["gamma"] == pytest.approx(np.linalg.norm(x.mean(0)) / np.sqrt(x.var(0).sum()), rel=1e-5)
    latents = sae.encode(torch.from_numpy(x[np.sort(order)]))
    dense = torch.zeros(COUNT, 64).scatter_(1, latents.indices, latents.values).numpy() != 0
    assert figures["l0"] == pytest.approx(dense.sum(1).mean())
    assert figures["dead"] == (~dense.any(0)).mean() and figures["dense"] == (dense.mean(0) > 0.1).mean()
    recorded = sae.encode(torch.from_numpy(x[rest]))
    trained_on = torch.zeros(360, 64).scatter_(1, recorded.indices, recorded.values).numpy() != 0
    assert site.training["dense"] == pytest.approx((trained_on.mean(0) > 0.1).mean(), abs=1e-6)
    assert site.training["l0"] == pytest.approx(trained_on.sum(1).mean(), abs=1e-4)
    assert site.training["gamma"] == pytest.approx(figures["gamma"], abs=1e-5)
    assert figures["probe_1"] > 0.6 and figures["probe_5"] > figures["probe_1"] - 0.05
    assert figures["monosemanticity"] > found.figures["monosemanticity"].beside
    there = ~np.isnan(found.meaning.scores)
    chance = np.quantile(found.meaning.shuffled[there], 0.95)
    assert figures["monosemantic"] == pytest.approx((found.meaning.scores[there] > chance).mean())
    assert found.figures["monosemantic"].beside == 0.05
    unit = sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)
    nearest = (unit @ unit.T - 2 * torch.eye(64)).amax(1)
    assert figures["collinearity"] == pytest.approx(nearest.mean().item(), abs=1e-5)
    assert figures["doubled"] == pytest.approx((nearest > 0.9).float().mean().item()) and 0 < figures["doubled"] < 1
    assert set(figures) | {"stability", "stable"} == set(NOTES)


def test_other_activations_than_those_of_the_training_are_told(trained):
    subject = open_subject("s0", Store(trained), activations=trained / "other.npy")
    assert "whose mean is not that of those that it was trained on" in subject.images.about
    assert measure(subject).figures["explained_variance"].beside is None  # principal components are of others
    assert len(subject.images.held) == COUNT and not len(subject.images.others)
    assert subject.images.held_out == "400 images that it may have been trained on"
    found = measure(replace(subject, images=replace(subject.images, labels=np.load(trained / "y.npy"))))
    first = np.arange(COUNT) % 2 == 0  # tested on half of what is new, and fitted on the others
    expected = sparse_probes(found.codes.matrix, np.load(trained / "y.npy"), ~first, first)
    assert (found.figures["probe_1"].value, found.figures["probe_5"].value) == (expected[1].auc, expected[5].auc)


def test_without_activations_the_figures_of_the_training_are_shown(trained):
    found = measure(open_subject("s0", Store(trained)))
    site = found.subject.site
    assert found.codes is None and found.figures["dead"].value == site.training["dead"]
    shown = found.figures["explained_variance"]
    assert (shown.value, shown.beside) == (1 - site.fvu, 1 - site.training["pca_fvu"])
    assert "--activations" in found.figures["monosemanticity"].why
    assert found.figures["collinearity"].value is not None


def test_activations_that_are_all_equal_are_refused(subject):
    equal = np.ones((COUNT, WIDTH), np.float32)
    own = replace(subject, images=replace(subject.images, activations=equal))
    for given in ((own,), (subject, equal)):
        with pytest.raises(DataError, match="all activations are equal"):
            measure(*given)


def test_predictions_with_labels_without_them_and_before_the_towers_end(subject):
    weights = torch.randn(WIDTH, 4, generator=torch.Generator().manual_seed(0))
    found = measure(subject, zero_shot=ZeroShot(lambda x: x, weights, True, "4 classes")).figures
    assert found["agreement"].value > found["agreement"].beside
    found = measure(subject, zero_shot=ZeroShot(lambda x: x, weights, False, "4 classes")).figures
    assert found["recovered"].value is None and "do not belong to these classes" in found["recovered"].why
    bare = replace(subject, images=replace(subject.images, labels=None))
    found = measure(bare, zero_shot=ZeroShot(lambda x: x, weights, False, "4 classes")).figures
    assert "--gallery_labels" in found["recovered"].why and "--labels" in found["probe_5"].why
    found = measure(subject, zero_shot=ZeroShot(None, weights, True, "4 classes")).figures
    assert "rec:" in found["agreement"].why


def test_activations_in_another_order_are_not_taken_for_held_out_ones(trained):
    np.save(trained / "turned.npy", np.load(trained / "X.npy")[::-1])
    subject = open_subject("s0", Store(trained), activations=trained / "turned.npy")
    assert "those that it was trained on, in another order" in subject.images.about
    assert subject.images.held_out == "400 images that it may have been trained on"
    assert measure(subject).figures["explained_variance"].beside is None


def test_what_is_left_of_predictions_is_kept_in_the_record(trained, subject):
    weights = torch.randn(WIDTH, 4, generator=torch.Generator().manual_seed(0))
    zero_shot = ZeroShot(lambda x: x, weights, True, "4 classes")
    found, before = measure(subject, zero_shot=zero_shot), subject.checkpoint
    assert keep(found, zero_shot) and not keep(found, "no classes") and not keep(measure(subject), zero_shot)
    bare = open_subject("s0", Store(trained))  # as it comes from a hub
    assert bare.checkpoint.digest == before.digest
    assert bare.site.training["recovered_on"] == (
        "40 images that it was not trained on (400 activations of X.npy, those that it was trained on), with 4 classes"
    )
    figures = measure(bare).figures
    assert figures["recovered"].value == pytest.approx(found.figures["recovered"].value, abs=1e-6)
    assert figures["agreement"].value == pytest.approx(found.figures["agreement"].value, abs=1e-6)
    unlabelled = measure(replace(subject, images=replace(subject.images, labels=None)), zero_shot=zero_shot)
    assert keep(unlabelled, zero_shot)
    assert "recovered" not in open_subject("s0", Store(trained)).site.training


def test_two_seeds_are_compared_and_one_is_not(trained, monkeypatch):
    saes = [measure(open_subject(name, Store(trained), activations=trained / "X.npy")) for name in ("s0", "s1")]
    figures, [(one, other, found)] = stability(saes)
    assert (one, other) == ("s0", "s1")
    assert figures["stability"].value == pytest.approx(found.cosines.mean())
    assert figures["stable"].value == pytest.approx((found.cosines >= 0.7).mean())
    assert len(found.cosines) == min(one.codes.alive.sum() for one in saes)
    assert "--seed 0 1 2" in stability(saes[:1])[0]["stability"].why
    copied = replace(saes[0], subject=replace(saes[0].subject, site=replace(saes[0].subject.site, training={})))
    for others in ([saes[0]], [copied]):  # of one seed, and the same by another way
        figures, pairs = stability([saes[0], *others])
        assert not pairs and figures["stable"].value is None and "several seeds" in figures["stability"].why
    figures, pairs = stability([*saes, copied])
    means = [found.cosines.mean() for _, _, found in pairs]
    assert len(pairs) == 2 and figures["stability"].value == pytest.approx(np.mean(means))
    longer = replace(saes[1].subject.site, training={"seed": 0, "samples": 9})  # as of the first one's seed
    assert not stability([saes[0], replace(saes[1], subject=replace(saes[1].subject, site=longer))])[1]
    monkeypatch.setattr(module, "LOOKED_AT", 100)
    assert measure(saes[0].subject).codes.matrix.shape[0] == 100
