"""What a class tells of the neighbours' classes: against plain counting, a bootstrap, and cases known by hand."""

import math
from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from sklearn.metrics import mutual_info_score

from vs2_plugin.strength import criterion as module
from vs2_plugin.strength.criterion import (
    Scores,
    divergence,
    information,
    neighbour_graph,
    scores,
)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def clusters(count, classes, spread=0.3, seed=0, width=16):
    """Embeddings of images in clusters, ``[count, width]``, and which cluster each is of."""
    made = generator(seed)
    centres = torch.randn(classes, width, generator=made)
    labels = torch.arange(count) % classes
    return centres[labels] + spread * torch.randn(count, width, generator=made), labels


def blurred(labels, classes, share, seed):
    """The labels, a share of them replaced at random."""
    made = generator(seed)
    other = torch.randint(classes, (len(labels),), generator=made)
    return torch.where(torch.rand(len(labels), generator=made) < share, other, labels)


def counted(classes, graph):
    """Mutual information over the edges, each taken in both directions, by counting in dictionaries."""
    pairs = Counter()
    for image, row in enumerate(graph.tolist()):
        for other in row:
            pairs[int(classes[image]), int(classes[other])] += 1
            pairs[int(classes[other]), int(classes[image])] += 1
    total, margin = sum(pairs.values()), Counter()
    for (one, _), number in pairs.items():
        margin[one] += number
    return sum(n / total * math.log(n * total / (margin[a] * margin[b])) for (a, b), n in pairs.items())


# ---- mutual information


@pytest.mark.parametrize("classes", [2, 7, 60])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_information_is_what_counting_gives(classes, share):
    embeddings, labels = clusters(300, 6)
    graph = neighbour_graph(embeddings, 7)
    way = blurred(labels % classes, classes, share, seed=classes)
    ours, theirs = way[:, None].expand_as(graph).flatten(), way[graph].flatten()
    by_sklearn = mutual_info_score(torch.cat([ours, theirs]), torch.cat([theirs, ours]))
    found = information(way, graph, classes)
    assert found.shape == (300,) and found.dtype == torch.float64
    assert float(found.mean()) == pytest.approx(counted(way, graph), abs=1e-12)
    assert float(found.mean()) == pytest.approx(by_sklearn, abs=1e-12)


def test_two_triangles_by_hand():
    graph = torch.tensor([[1, 2], [0, 2], [0, 1], [4, 5], [3, 5], [3, 4]])
    apart, mixed = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 0, 1, 1, 1, 1])
    assert information(apart, graph, 2).tolist() == pytest.approx([math.log(2)] * 6)
    # Of 24 directed edges four go 0-0, four 0-1, four 1-0 and twelve 1-1; the margins are 1/3 and 2/3.
    same, other, rest = math.log(4 / 24 * 9), math.log(4 / 24 * 9 / 2), math.log(12 / 24 * 9 / 4)
    mean = (2 * same + 4 * other + 6 * rest) / 12
    own = [(same + other) / 2] * 2 + [other] + [rest] * 3
    into = own  # the edges are there in both directions
    expected = [one + other - mean for one, other in zip(own, into, strict=True)]
    assert information(mixed, graph, 2).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("classes", [2, 10, 40])
def test_classes_that_are_the_clusters_tell_everything(classes):
    embeddings, labels = clusters(1200, classes, spread=0.05)
    graph = neighbour_graph(embeddings)
    assert (labels[graph] == labels[:, None]).all()
    assert information(labels, graph, classes).tolist() == pytest.approx([math.log(classes)] * 1200)


def test_one_class_tells_nothing():
    embeddings, labels = clusters(100, 4)
    found = scores([labels * 0, labels * 0, labels], neighbour_graph(embeddings), 4)
    assert [column[:2] for column in found[:2]] == [[0, 0]] * 2
    assert all(map(math.isfinite, chain(*found))) and found.information[2] > 1
    assert found.entropy[:2] == [0, 0] and found.divergence[0] == pytest.approx(math.log(4))
    alone = scores([labels * 0], neighbour_graph(embeddings), 1)
    assert list(alone) == [[0.0]] * len(alone)


def test_classes_that_no_image_has_change_nothing():
    embeddings, labels = clusters(400, 2, spread=1.0)
    graph = neighbour_graph(embeddings)
    ways = [blurred(labels, 2, share, seed=1) for share in (0.5, 0.2)]
    few, many = scores(ways, graph, 2), scores([3 + 4 * way for way in ways], graph, 50)
    for name in Scores._fields:
        more = math.log(25) if name == "divergence" else 0  # the classes that should be there
        assert getattr(many, name) == pytest.approx([value + more for value in getattr(few, name)], abs=1e-12)


def test_as_many_classes_as_there_may_be_need_no_memory():
    embeddings, labels = clusters(400, 8, spread=1.0)
    graph = neighbour_graph(embeddings)
    ways = [labels, blurred(labels, 8, 0.2, seed=1)]
    for one, other in zip(scores(ways, graph, 8)[:3], scores(ways, graph, 1_000_000)[:3], strict=True):
        assert one == pytest.approx(other, abs=1e-12)


# ---- the chance level


@pytest.mark.parametrize("classes", [2, 10, 100, 1000])
def test_classes_without_structure_score_nothing_however_many_they_are(classes):
    embeddings, labels = clusters(1500, 10)
    graph = neighbour_graph(embeddings)
    ways = [torch.randint(classes, (1500,), generator=generator(seed)) for seed in range(3)]
    plugin = information(ways[0], graph, classes).mean()
    found = scores(ways, graph, classes).information
    assert max(map(abs, found)) < 0.02 + 0.02 * plugin
    assert plugin > {2: 0, 10: 0.001, 100: 0.25, 1000: 2}[classes]  # which the plug-in estimate does not know


def test_what_chance_gives_is_taken_away_from_what_is_told():
    embeddings, labels = clusters(600, 5, spread=0.05)
    graph = neighbour_graph(embeddings)
    told = float(information(labels, graph, 5).mean())
    shuffled = np.mean([counted(labels[torch.randperm(600, generator=generator(s))], graph) for s in range(8)])
    assert float(scores([labels], graph, 5).information[0]) == pytest.approx(told - shuffled, abs=4e-4)
    assert shuffled > 5e-4


def test_scores_are_the_same_every_time():
    embeddings, labels = clusters(200, 5)
    graph = neighbour_graph(embeddings)
    torch.manual_seed(1)
    first = scores([labels, labels % 3], graph, 5)
    torch.manual_seed(2)
    assert first == scores([labels, labels % 3], graph, 5)


def test_shares_are_counted_in_double_precision():
    labels = torch.tensor([0, 0, 1, 2, 2, 2, 2])
    expected = sum(n / 7 * math.log(3 * n / 7) for n in (2, 1, 4))
    assert divergence(labels, torch.ones(3) / 3).mean().item() == pytest.approx(expected, abs=1e-6)
    told = scores([labels], torch.tensor([[1]] * 7), 3).entropy[0]
    assert told == pytest.approx(-sum(n / 7 * math.log(n / 7) for n in (2, 1, 4)), abs=1e-12)


def test_divergence_is_that_of_scipy_and_finite_for_a_class_that_should_not_be_there():
    labels = torch.tensor([0] * 5 + [1] * 3 + [3] * 2)
    prior = torch.tensor([0.6, 0.1, 0.2, 0.1])
    found = divergence(labels, prior)
    smooth = 0.99 * prior.double().numpy() + 0.01 / 4
    assert float(found.mean()) == pytest.approx(entropy([0.5, 0.3, 0, 0.2], smooth), abs=1e-7)
    assert torch.isfinite(divergence(labels, torch.tensor([0.0, 0, 1, 0]))).all()
    even = scores([labels], torch.arange(10)[:, None].flip(0), 4)
    assert even.entropy[0] == pytest.approx(entropy([0.5, 0.3, 0.2]))
    assert even.divergence[0] == pytest.approx(math.log(4) - even.entropy[0])


# ---- standard errors


def weighted(classes, graph, weight, count):
    """Mutual information and divergence from even shares where image i is there ``weight[i]`` times, so that an edge is
    there as often as both its ends say."""
    edges = (weight[:, None] * weight[graph]).ravel()
    joint = np.zeros((count, count))
    np.add.at(joint, (np.repeat(classes, graph.shape[1]), classes[graph].ravel()), edges)
    joint = joint + joint.T
    joint /= joint.sum()
    margin = joint.sum(1)
    there = joint > 0
    share = np.bincount(classes, weight, count) / weight.sum()
    told = (joint[there] * np.log(joint[there] / np.outer(margin, margin)[there])).sum()
    return told, (share * np.log(share * count)).sum()


@pytest.mark.parametrize("classes", [2, 8])
def test_influence_is_the_derivative_by_the_weight_of_an_image(classes):
    embeddings, labels = clusters(60, 4, spread=1.0)
    graph = neighbour_graph(embeddings, 5)
    assert len(set(torch.bincount(graph.flatten(), minlength=60).tolist())) > 3  # some are neighbours of many
    way = blurred(labels % classes, classes, 0.4, seed=1)
    step, found = 1e-5, (information(way, graph, classes), divergence(way, torch.full((classes,), 1 / classes)))
    for image in range(0, 60, 7):
        ends = []
        for sign in (1, -1):
            weight = np.ones(60)
            weight[image] += sign * step
            ends.append(np.array(weighted(way.numpy(), graph.numpy(), weight, classes)))
        slopes = (ends[0] - ends[1]) / (2 * step)
        for influence, slope in zip(found, slopes, strict=True):
            assert float(influence[image] - influence.mean()) == pytest.approx(60 * slope, abs=1e-6)


@pytest.mark.parametrize(("before", "after"), [(0.6, 0.5), (0.3, 0.1), (0.2, 0.5)])
def test_standard_errors_are_those_of_a_bootstrap_over_images(before, after):
    embeddings, labels = clusters(1000, 8, spread=0.6)
    graph = neighbour_graph(embeddings)
    ways = [blurred(labels, 8, before, seed=1), blurred(labels, 8, after, seed=2)]
    found = scores(ways, graph, 8)
    rng = np.random.default_rng(0)
    arrays, edges = [way.numpy() for way in ways], graph.numpy()
    draws = []
    for _ in range(200):
        weight = np.bincount(rng.integers(0, 1000, 1000), minlength=1000)
        one, other = (np.array(weighted(array, edges, weight, 8)) for array in arrays)
        draws.append(other - one)
    for index, (values, errors) in enumerate([found[:2], found[3:]]):
        spread = (values[1] - values[0]) / errors[1]
        assert spread == pytest.approx(np.std(draws, axis=0)[index], rel=0.25)
        assert errors[0] == 0 and (index == 1 or np.sign(errors[1]) == (1 if after < before else -1))


def test_standard_errors_are_those_of_new_samples():
    """Images drawn anew, each time with a graph of their own."""
    differences, errors = [], []
    for seed in range(120):
        made = generator(seed)
        centres = torch.randn(8, 16, generator=generator(1000))
        labels = torch.randint(8, (400,), generator=made)
        graph = neighbour_graph(centres[labels] + 0.8 * torch.randn(400, 16, generator=made))
        ways = [blurred(labels, 8, 0.5, 2000 + seed), blurred(labels, 8, 0.3, 3000 + seed)]
        found = scores(ways, graph, 8)
        differences.append(found.information[1] - found.information[0])
        errors.append(differences[-1] / found.information_errors[1])
    assert np.mean(errors) == pytest.approx(np.std(differences), rel=0.25)


def test_differences_are_taken_image_by_image():
    """Two ways that differ in a few images only are told apart by far less than two that differ everywhere."""
    embeddings, labels = clusters(1000, 8, spread=0.6)
    graph = neighbour_graph(embeddings)
    first = blurred(labels, 8, 0.4, seed=1)
    near = first.clone()
    near[:100] = labels[:100]
    found = scores([first, near, blurred(labels, 8, 0.4, seed=2)], graph, 8)
    gained = np.array(found.information[1:]) - found.information[0]
    spread = gained / found.information_errors[1:]
    assert spread[0] < 0.6 * spread[1] and found.information_errors[1] > 4 > abs(found.information_errors[2])


# ---- the graph


def brute_force(embeddings, k):
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    near = np.argpartition(-cosines, k, axis=1)[:, :k]
    order = np.argsort(-np.take_along_axis(cosines, near, 1), axis=1)
    return np.take_along_axis(near, order, 1), cosines


@pytest.mark.parametrize("block", [7, 100, 2048])
def test_neighbours_are_those_of_largest_cosine_in_blocks_of_any_size(block, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", block)
    embeddings = torch.randn(100, 8, generator=generator(0)) * torch.rand(100, 1, generator=generator(1)) * 50
    found = neighbour_graph(embeddings, 5)
    assert found.dtype == torch.int64 and found.tolist() == brute_force(embeddings.double().numpy(), 5)[0].tolist()


def test_more_images_than_a_block():
    embeddings, _ = clusters(2 * 2048 + 3, 30)
    found = neighbour_graph(embeddings)
    expected, cosines = brute_force(embeddings.double().numpy(), 10)
    assert found.shape == (4099, 10) and (found != torch.arange(4099)[:, None]).all()
    similarity = np.take_along_axis(cosines, found.numpy(), 1)
    assert np.abs(similarity - np.take_along_axis(cosines, expected, 1)).max() < 1e-5
    assert (found.numpy() == expected).mean() > 0.999


@pytest.mark.parametrize(("count", "k", "width"), [(5, 10, 4), (5, 4, 4), (2, 10, 1), (11, 10, 10)])
def test_of_few_images_all_others_are_neighbours(count, k, width):
    found = neighbour_graph(torch.randn(count, 6, generator=generator(0)), k)
    assert found.shape == (count, width)
    for image, row in enumerate(found.tolist()):
        assert len({*row}) == width and image not in row
    assert math.isfinite(float(scores([torch.arange(count) % 2], found, 2).information[0]))


def test_an_image_that_is_there_twice_has_its_double_as_neighbour_and_not_itself():
    embeddings = torch.randn(30, 8, generator=generator(0))
    doubled = torch.cat([embeddings, 3 * embeddings])
    found = neighbour_graph(doubled, 3)
    assert found[:, 0].tolist() == [*range(30, 60), *range(30)]
    same = neighbour_graph(torch.ones(6, 4), 3)
    assert (same != torch.arange(6)[:, None]).all() and all(len({*row}) == 3 for row in same.tolist())


def test_half_precision_serves():
    embeddings, labels = clusters(300, 5, spread=0.6)
    half = neighbour_graph(embeddings.half())
    assert torch.equal(half, neighbour_graph(embeddings.half().float()))
    assert (half.sort(1).values == neighbour_graph(embeddings).sort(1).values).float().mean() > 0.9
    assert neighbour_graph(torch.zeros(4, 3, dtype=torch.float16), 2).shape == (4, 2)


@pytest.mark.parametrize("count", [1, 3, 50])
def test_pairs_counted_in_a_table_and_by_sorting_are_the_same(count, monkeypatch):
    made = torch.Generator().manual_seed(0)
    classes, graph = torch.randint(count, (200,), generator=made), neighbour_graph(torch.randn(200, 8, generator=made))
    found = information(classes, graph, count)
    monkeypatch.setattr(module, "_TABLE", 0)
    assert torch.equal(information(classes, graph, count), found)
