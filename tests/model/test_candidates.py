"""Classes of images under many steerings: those that the tower's end gives for each steering by itself."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vs2_plugin.clip.sites import OUTPUT, Site, embedding_from
from vs2_plugin.model import candidates as module
from vs2_plugin.model.candidates import ZeroShot
from vs2_plugin.steering.move import Move

D, E, CLASSES, IMAGES = 24, 16, 30, 150
BLOCK = Site("visual.transformer.resblocks.3", D, 1)
STRENGTHS = (0.0, 0.25, 1.0, 3.0, 8.0)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Module()
    model.visual = nn.Module()
    model.visual.ln_post = nn.LayerNorm(D)
    nn.init.normal_(model.visual.ln_post.weight)
    nn.init.normal_(model.visual.ln_post.bias)
    model.visual.proj = nn.Parameter(torch.randn(D, E))
    return model.requires_grad_(False)


@pytest.fixture
def asked(monkeypatch):
    """How many activations the tower itself classifies, a number for each time that it is asked."""
    counts = []

    def embed(model, site, x):
        counts.append(len(x))
        return embedding_from(model, site, x)

    monkeypatch.setattr(module, "embedding_from", embed)
    return counts


def drawn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lines():
    """Activations along a line for each image, brought to the length that they had."""
    x, v = drawn(IMAGES, D), drawn(IMAGES, D, seed=2)
    return [F.normalize(x + strength * v) * x.norm(dim=1, keepdim=True) for strength in STRENGTHS]


def gated():
    """The same, every other image left alone."""
    return [torch.where(torch.arange(IMAGES)[:, None] % 2 == 0, way, lines()[0]) for way in lines()]


def two_lines():
    """The same along another line, too: of a second option."""
    x, v = lines()[0], drawn(IMAGES, D, seed=3)
    return [*lines(), *(x + strength * v for strength in STRENGTHS)]


def anywhere():
    """Activations that have nothing to do with each other."""
    return list(drawn(9, IMAGES, D))


def unlike():
    """Along lines, but for one image that each steering sends elsewhere, and one that is not a number."""
    ways = lines()
    for number, way in enumerate(ways):
        way[-1], way[3] = drawn(D, seed=20 + number), torch.nan
    return ways


def none():
    return [torch.zeros(IMAGES, D)] * 3


class Along:
    """A code, as far as a move asks for it."""

    def __init__(self, direction):
        self.direction = direction

    def __getitem__(self, rows):
        return Along(self.direction[rows])


def moves(*directions):
    return [Move(Along(direction), strength) for direction in directions for strength in STRENGTHS]


def one_line():
    return drawn(IMAGES, D), moves(drawn(IMAGES, D, seed=2))


def lines_of_one_image():
    return drawn(1, D), moves(drawn(1, D, seed=2))


def small():
    """Activations for which LayerNorm's eps matters."""
    return drawn(IMAGES, D) / 1000, moves(drawn(IMAGES, D, seed=2) / 1000)


def two_lines_from():
    """Moves along two lines; some images do not move, and one is zero."""
    x, first, second = drawn(IMAGES, D), drawn(IMAGES, D, seed=2), drawn(IMAGES, D, seed=3)
    first[:5], x[7] = 0, 0
    return x, [*moves(first, second), Move(Along(-first), 2.0)]


def cancelled():
    """Moves of which one leaves next to nothing of each image, or nothing at all."""
    x = drawn(IMAGES, D)
    left = torch.logspace(-6, -1, IMAGES)[:, None] * drawn(IMAGES, D, seed=2)
    away = left - x / x.new_tensor(STRENGTHS[1:])[torch.arange(IMAGES) % 4, None]
    away[0] = -x[0]
    return x + 3, moves(away - 3 / x.new_tensor(STRENGTHS[1:])[torch.arange(IMAGES) % 4, None])


def expected(model, site, ways, classifier):
    return torch.stack(
        [(F.normalize(embedding_from(model, site, way), dim=-1) @ classifier).argmax(1) for way in ways], dim=1
    )


@pytest.mark.parametrize("make", [lines, gated, two_lines, anywhere, unlike, none])
@pytest.mark.parametrize("site", [BLOCK, Site(OUTPUT, D)], ids=["block", "output"])
def test_the_classes_are_those_of_the_tower(make, site, model):
    classifier, ways = F.normalize(drawn(E if site is BLOCK else D, CLASSES, seed=4), dim=0), make()
    before = [way.clone() for way in ways]
    found = ZeroShot(model, site, classifier)(ways)
    assert torch.equal(found, expected(model, site, ways, classifier))
    for way, copy in zip(ways, before, strict=True):
        torch.testing.assert_close(way, copy, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("make", [one_line, lines_of_one_image, small, two_lines_from, cancelled])
@pytest.mark.parametrize("site", [BLOCK, Site(OUTPUT, D)], ids=["block", "output"])
@pytest.mark.parametrize("projected", [True, False])
def test_the_classes_under_moves_are_those_of_the_tower(projected, make, site, model, asked):
    model.visual.proj = model.visual.proj if projected else None
    classifier = F.normalize(drawn(E if site is BLOCK and projected else D, CLASSES, seed=4), dim=0)
    search, (x, ways) = ZeroShot(model, site, classifier), make()
    assert search.mixes
    found = search.along(x, ways)
    doubts = sum(asked)
    assert torch.equal(found, expected(model, site, [move.apply(x) for move in ways], classifier))
    assert doubts < (0.2 if make is cancelled else 0.05) * found.numel()


@pytest.mark.parametrize("bias", [0, 1])
def test_of_classes_that_rounding_could_swap_the_tower_decides_under_moves_too(bias, model, asked):
    model.visual.ln_post.bias *= bias
    classifier = F.normalize(drawn(E, CLASSES, seed=4), dim=0)
    near = torch.cat([classifier, classifier + 2e-7 * drawn(E, CLASSES, seed=5)], dim=1)
    ZeroShot(model, BLOCK, near).along(*one_line())
    assert sum(asked) == IMAGES * len(STRENGTHS)


def other_eps(model):
    norm = model.visual.ln_post
    norm.forward = lambda x: F.layer_norm(x, (D,), norm.weight, norm.bias, 1e-6)  # not the eps that it tells


ENDS = {
    "of another eps": other_eps,
    "in half precision": lambda model: model.bfloat16(),
    "with a hook": lambda model: model.visual.ln_post.register_forward_hook(lambda norm, given, result: result * 1.1),
    "of another kind": lambda model: setattr(model.visual, "ln_post", nn.Tanh()),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_tower_that_does_not_end_with_a_layernorm_is_found_out(end, model):
    ENDS[end](model)
    assert not ZeroShot(model, BLOCK, drawn(E, CLASSES)).mixes
    assert ZeroShot(model, Site(OUTPUT, D), drawn(D, CLASSES)).mixes


def test_without_a_projection(model):
    model.visual.proj = None
    classifier = F.normalize(drawn(D, CLASSES, seed=4), dim=0)
    assert torch.equal(ZeroShot(model, BLOCK, classifier)(lines()), expected(model, BLOCK, lines(), classifier))


def test_a_tower_may_be_of_half_precision(model):
    classifier = F.normalize(drawn(E, CLASSES, seed=4), dim=0)
    ways = lines()
    found = ZeroShot(model.bfloat16(), BLOCK, classifier)(ways)
    assert torch.equal(found, expected(model, BLOCK, ways, classifier))


def test_of_classes_with_the_same_embedding_the_tower_decides(model):
    classifier = F.normalize(drawn(E, CLASSES, seed=4), dim=0)
    twice = torch.cat([classifier, classifier], dim=1)
    assert torch.equal(ZeroShot(model, BLOCK, twice)(lines()), expected(model, BLOCK, lines(), twice))


def test_of_a_single_class_all_are(model):
    classifier = F.normalize(drawn(E, 1, seed=4), dim=0)
    assert torch.equal(ZeroShot(model, BLOCK, classifier)(lines()), torch.zeros(IMAGES, len(STRENGTHS), dtype=int))


@pytest.mark.parametrize("bias", [1, 10_000])
def test_of_classes_that_rounding_could_swap_the_tower_decides(bias, model, asked):
    """The bias of the LayerNorm takes part in rounding, and may be far longer than what varies."""
    model.visual.ln_post.bias *= bias
    classifier = F.normalize(drawn(E, CLASSES, seed=4), dim=0)
    near = torch.cat([classifier, classifier + 2e-7 * drawn(E, CLASSES, seed=5)], dim=1)
    ZeroShot(model, BLOCK, near)(lines())
    assert sum(asked) == IMAGES * len(STRENGTHS)


@pytest.mark.parametrize(("make", "directions"), [(none, 0), (lines, 2), (gated, 2), (two_lines, 3), (anywhere, 4)])
def test_along_lines_few_directions_and_few_doubts_are_left(make, directions, model, asked, monkeypatch):
    seen = []
    spanning = module._spanning
    monkeypatch.setattr(module, "_spanning", lambda z: seen.append(spanning(z)) or seen[-1])
    ZeroShot(model, BLOCK, F.normalize(drawn(E, CLASSES, seed=4), dim=0))(make())
    assert [len(found) for found in seen] == [directions]
    if make in (lines, gated, two_lines):
        assert sum(asked) < 0.02 * IMAGES * len(make())


@pytest.mark.parametrize("count", [2, CLASSES])
def test_what_lies_outside_of_the_directions_counts_as_doubt(count, model):
    """Each image goes from its own class towards the next best one, out of the only direction."""
    classifier = F.normalize(drawn(E, count, seed=4), dim=0)
    search, first, weights = ZeroShot(model, BLOCK, classifier), drawn(5000, D), model.visual.proj @ classifier
    best, next_best = ((first + model.visual.ln_post.bias) @ weights).topk(2).indices.T
    away = weights.T[next_best] - weights.T[best]
    along = F.normalize(first, dim=1)
    away = F.normalize(away - (away * along).sum(1, keepdim=True) * along, dim=1)
    z = torch.stack([first, first + torch.linspace(0, 1, 5000)[:, None] * away], dim=1)
    classes, sure = search._part(z, [0])
    wrong = classes != ((z + model.visual.ln_post.bias) @ weights).argmax(2)
    assert wrong.float().mean() > 0.1 and sure.float().mean() > 0.5 and not (wrong & sure).any()
