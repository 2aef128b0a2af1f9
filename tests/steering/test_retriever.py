"""The neighbours of a batch, and what is known of their classes."""

import numpy as np
import pytest
import torch

from vs2_plugin.data.images import image_digest
from vs2_plugin.errors import DataError, HarnessError, PluginError
from vs2_plugin.gallery.gallery import Gallery
from vs2_plugin.gallery.search import ExactSearch
from vs2_plugin.steering.batch import Batch
from vs2_plugin.steering.neighbours import contrast
from vs2_plugin.steering.retriever import Neighbours, Retriever, majority


def hood(similarity, valid=None):
    similarity = torch.tensor(similarity)
    valid = torch.ones_like(similarity, dtype=torch.bool) if valid is None else torch.tensor(valid)
    return Neighbours(torch.zeros_like(similarity, dtype=torch.long), similarity, valid)


# ---- the majority

MAJORITIES = [
    # labels, similarities, the winner, how many have it
    ([3, 3, 1], [0.5, 0.4, 0.9], 3, 2),
    ([1, 2, 2, 1], [0.9, 0.5, 0.4, 0.3], 1, 2),
    ([2, 1, 1, 2], [0.9, 0.5, 0.4, 0.3], 2, 2),
    ([1, 2], [-0.9, -0.8], 2, 1),
    ([0, 4], [-1.0, -1.0], 0, 1),
    ([0], [-1.0], 0, 1),
    ([4], [0.0], 4, 1),
    ([1, 1, 2], [-1.0, -1.0, 1.0], 1, 2),  # never outvoted by similarity
]


@pytest.mark.parametrize(("labels", "similarity", "winner", "count"), MAJORITIES)
def test_the_majority_and_its_size(labels, similarity, winner, count):
    labels, neighbours = torch.tensor([labels]), hood([similarity])
    found = majority(labels, neighbours)
    assert found.tolist() == [winner]
    assert contrast(labels, found, neighbours.valid)[1].item() == pytest.approx(count / labels.shape[1])


@pytest.mark.parametrize("labels", [[1, 2], [2, 1]])
@pytest.mark.parametrize("each", [1, 5, 25, 50])
def test_a_small_difference_of_similarity_decides_between_equal_counts(each, labels):
    """However many neighbours there are, and in whatever order the classes stand."""
    similarity = [[0.7 + 1e-4] + [0.7] * (2 * each - 1)]
    votes = torch.tensor([[labels[0]] * each + [labels[1]] * each])
    assert majority(votes, hood(similarity)).tolist() == [labels[0]]


def test_the_memory_of_a_majority_does_not_grow_with_the_labels():
    found = majority(torch.tensor([[7, 10**15, 10**15], [10**15, 7, 7]]), hood([[0.9, 0.8, 0.7]] * 2))
    assert found.tolist() == [10**15, 7]


def test_what_is_no_neighbour_has_no_vote():
    neighbours = hood([[0.9, 0.8, 0.7], [0.9, 0.8, 0.7]], [[True, False, False], [False, False, False]])
    labels = torch.tensor([[1, 2, 2], [1, 2, 2]])
    winner = majority(labels, neighbours)
    assert winner.tolist()[0] == 1 and contrast(labels, winner, neighbours.valid)[1].tolist() == [1, 0]


# ---- the neighbours of a batch


@pytest.fixture
def images():
    return torch.randn(12, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def embed(images):
    return images.flatten(1)


def make(images, copies=(), n=3, labels=None, **options):
    """A retriever whose gallery are images, some of them again."""
    kept = images[[*range(len(images)), *copies]]
    embeddings = embed(kept).numpy().astype(np.float16)
    digests = np.array([image_digest(image) for image in kept], np.uint64)
    gallery = Gallery({}, {"clip": embeddings}, digests, labels)
    options = {"digest": image_digest, **options}
    return Retriever(gallery, "cpu", n=n, search=ExactSearch(embeddings, "cpu"), **options)


def look(retriever, images):
    return retriever.neighbours(Batch(images, embed=lambda: embed(images)))


def expected_rows(images, query, copies, n):
    kept = [*range(len(images)), *copies]
    cosines = torch.nn.functional.cosine_similarity(embed(images[kept]), embed(query[None]))
    others = [row for row in cosines.argsort(descending=True).tolist() if not torch.equal(images[kept[row]], query)]
    return others[:n]


@pytest.mark.parametrize("copies", [(), (0, 0, 0), (0, 5, 5, 11)])
@pytest.mark.parametrize("n", [1, 3, 10])
def test_a_query_of_the_gallery_is_not_among_its_own_neighbours(n, copies, images):
    found = look(make(images, copies, n), images)
    assert found.rows.shape == found.similarity.shape == found.valid.shape == (12, n)
    for index, image in enumerate(images):
        rows = found.rows[index][found.valid[index]].tolist()
        own = {index, *(12 + place for place, row in enumerate(copies) if row == index)}
        assert not own & set(rows)
        assert found.similarity[index][: len(rows)].diff().le(0).all()
        assert len(rows) == min(n, 12 + len(copies) - len(own))
        expected = expected_rows(images, image, copies, n)
        kept = torch.tensor([*range(12), *copies])
        assert kept[rows].tolist() == kept[expected].tolist()  # equal images, in either order


def test_a_query_that_is_nearly_an_image_of_the_gallery_has_it_as_its_neighbour(images):
    query = images[:1] + 1e-4
    found = look(make(images), query)
    assert found.rows[0, 0] == 0 and found.valid.all()


def test_an_image_far_from_all_of_the_gallery_is_not_looked_for_by_its_bytes(images):
    def digest(image):
        raise AssertionError("which takes time")

    assert look(make(images, digest=digest), -images[:2]).valid.all()


def test_the_tensors_that_all_steerings_read_are_told_by_name(images):
    retriever, batch = make(images), Batch(images, embed=lambda: embed(images))
    assert retriever.shared(batch) == {"the class embeddings": None, "the gallery's labels": None}
    retriever.set_classifier(torch.eye(48)[:, :2])
    found, (classes, odds) = retriever.neighbours(batch), retriever.pseudo
    named = {"the class embeddings": retriever.classifier, "the gallery's labels": None}
    named |= {"the gallery's classes": classes, "their log-odds": odds}
    named |= {f"neighbours.{name}": tensor for name, tensor in found._asdict().items()}
    shared = retriever.shared(batch)
    assert shared.keys() == named.keys() and all(shared[name] is tensor for name, tensor in named.items())


def test_where_the_gallery_is_too_small_the_places_left_are_marked(images):
    found = look(make(images, n=12), images[:2])
    assert found.valid.tolist() == [[True] * 11 + [False]] * 2
    stranger = look(make(images, n=12), -images[:2])
    assert stranger.valid.all()


def test_another_encoder_gives_the_queries(images):
    def encode(batch):
        return batch[:, 0].flatten(1)

    embeddings = encode(images).numpy().astype(np.float16)
    gallery = Gallery({}, {"clip": embed(images).numpy(), "other": embeddings}, np.arange(12, dtype=np.uint64))
    retriever = Retriever(gallery, "cpu", n=4, search=ExactSearch(embeddings, "cpu"), encode=encode)
    batch = Batch(images[:5] + 0.01, embed=lambda: pytest.fail("the CLIP embedding is not needed here"))
    similarity, rows = ExactSearch(embeddings, "cpu")(
        torch.nn.functional.normalize(encode(images[:5] + 0.01), dim=-1), 4
    )
    found = retriever.neighbours(batch)
    assert torch.equal(found.rows, rows) and torch.equal(found.similarity, similarity) and found.valid.all()


def test_embedding_and_neighbours_are_computed_once_per_batch(images):
    retriever, asked = make(images), []
    batch = Batch(images[:2], embed=lambda: asked.append(1) or embed(images[:2]))
    first = retriever.neighbours(batch)
    assert retriever.neighbours(batch) is first and len(asked) == 1
    torch.testing.assert_close(batch.embedding().norm(dim=-1), torch.ones(2))
    assert len(asked) == 1
    assert not torch.equal(look(retriever, images[4:6]).rows, first.rows)


def test_images_that_are_not_known_have_no_neighbours(images):
    """A tower that runs by itself says nothing of its images."""
    retriever = make(images)
    with pytest.raises(HarnessError, match="within encode_image only"):
        retriever.neighbours(Batch())
    with pytest.raises(HarnessError, match="within encode_image only"):
        Batch().embedding()
    other = make(images, encode=lambda batch: batch.flatten(1))
    with pytest.raises(HarnessError, match="within encode_image only"):
        other.neighbours(Batch())


# ---- the classes


def test_without_classes_it_says_how_they_are_given(images):
    retriever = make(images)
    for ask in (lambda: retriever.classifier, lambda: retriever.pseudo, lambda: retriever.labels("pseudo")):
        with pytest.raises(HarnessError, match=r"none are known; in Python, call model\.set_classifier\(classifier\)"):
            ask()


@pytest.mark.parametrize("block", [5, 1000])
def test_pseudo_labels_are_the_zero_shot_classes_of_the_gallery(block, images, monkeypatch):
    monkeypatch.setattr("vs2_plugin.gallery.search._BLOCK", block)
    retriever = make(images)
    for seed in (1, 2):  # another data set has other classes
        classifier = torch.randn(48, 5, generator=torch.Generator().manual_seed(seed))
        retriever.set_classifier(3 * classifier.bfloat16())
        torch.testing.assert_close(retriever.classifier.norm(dim=0), torch.ones(5))
        half = embed(images).half().double()
        unit = torch.nn.functional.normalize(classifier.bfloat16().double(), dim=0)
        cosines = torch.nn.functional.normalize(half, dim=-1) @ unit
        assert retriever.labels("pseudo").tolist() == cosines.argmax(1).tolist()
        assert retriever.pseudo[0] is retriever.pseudo[0]
        batch = Batch(images[:4], embed=lambda: embed(images[:4]))
        assert retriever.classes(batch).tolist() == cosines[:4].argmax(1).tolist()


def test_what_is_known_of_the_same_classes_is_kept(images):
    retriever = make(images)
    classifier = torch.randn(48, 3, generator=torch.Generator().manual_seed(0))
    retriever.set_classifier(classifier)
    known = retriever.pseudo
    retriever.set_classifier(classifier.clone())
    assert retriever.pseudo is known
    retriever.set_classifier(classifier.flip(1))
    assert retriever.pseudo is not known


def test_confidence_tells_apart_what_float32_calls_certain():
    """At CLIP's scale of 100 many probabilities round to 1; the order of confidence is still that of the images."""
    angles = torch.tensor([0.30, 0.10, 0.20, 0.00, 0.25])
    embeddings = torch.stack([angles.cos(), angles.sin()], 1).numpy().astype(np.float16)
    retriever = Retriever(Gallery({}, {"clip": embeddings}, np.arange(5, dtype=np.uint64)), "cpu")
    retriever.set_classifier(torch.eye(2))
    classes, confidence = retriever.pseudo
    assert classes.tolist() == [0] * 5
    assert confidence.argsort(descending=True, stable=True).tolist() == [3, 1, 2, 4, 0]


def test_neighbours_without_a_search_name_the_declaration(images):
    retriever = Retriever(Gallery({}, {"clip": np.eye(2, dtype=np.float16)}, np.arange(2, dtype=np.uint64)), "cpu")
    with pytest.raises(PluginError, match="gallery='neighbours'"):
        retriever.neighbours(Batch(torch.zeros(1, 3, 2, 2), embed=lambda: torch.eye(2)[:1]))


def test_labels_of_an_oracle(images):
    assert make(images, labels=np.arange(12)).labels("oracle").tolist() == list(range(12))
    with pytest.raises(DataError, match="holds no training labels, which an oracle reads"):
        make(images).labels("oracle")
