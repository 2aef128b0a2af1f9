"""The gallery's own images as queries: what ``auto`` looks at. What is known of them is not computed anew."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vs2_plugin.arrays import Stack
from vs2_plugin.data.images import image_digest
from vs2_plugin.gallery.gallery import Gallery
from vs2_plugin.gallery.search import ExactSearch
from vs2_plugin.steering.batch import Batch
from vs2_plugin.steering.retriever import Retriever

COUNT = 30


@pytest.fixture(scope="module")
def images():
    """Thirty images, of which the last three are there twice or three times."""
    found = torch.randn(COUNT, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    found[27:29] = found[3]
    found[29] = found[8]
    return found


@pytest.fixture(params=["one array", "parts"])
def arrays(request, images):
    """Embeddings by CLIP and by another encoder, and digests."""
    clip, other = images.flatten(1).half().numpy(), images[:, 0].flatten(1).half().numpy()
    if request.param == "parts":
        clip, other = (Stack([array[:11], array[11:]]) for array in (clip, other))
    return {"clip": clip, "other": other}, np.array([image_digest(image) for image in images], np.uint64)


def make(arrays, encoder="clip", n=5, **options):
    embeddings, digests = arrays
    gallery = Gallery({}, embeddings, digests)
    encode = None if encoder == "clip" else lambda images: pytest.fail("the images are not there to be encoded")
    return Retriever(
        gallery, "cpu", n=n, search=ExactSearch(embeddings[encoder], "cpu"), encode=encode, encoder=encoder,
        digest=lambda image: pytest.fail("no image is there"), **options,
    )  # fmt: skip


def left_one_out(images, query, encoder, n):
    """The n nearest other images of an image, by brute force; its doubles are not others."""
    vectors = images.flatten(1) if encoder == "clip" else images[:, 0].flatten(1)
    cosines = F.cosine_similarity(vectors.half().double(), vectors[query].half().double()[None])
    order = cosines.argsort(descending=True, stable=True).tolist()
    return [row for row in order if not torch.equal(images[row], images[query])][:n]


def same(rows, images):
    """Rows, with each double as the first image that is like it."""
    return [next(first for first in range(COUNT) if torch.equal(images[first], images[row])) for row in rows]


@pytest.mark.parametrize("encoder", ["clip", "other"])
@pytest.mark.parametrize("n", [1, 5, 20])
def test_neighbours_are_the_others(arrays, images, encoder, n):
    retriever = make(arrays, encoder, n)
    for rows in torch.randperm(COUNT, generator=torch.Generator().manual_seed(1)).split(7):
        found = retriever.neighbours(retriever.own(rows))
        assert found.rows.shape == (len(rows), n) and found.valid.all()
        for query, neighbours in zip(rows.tolist(), found.rows.tolist(), strict=True):
            assert not any(torch.equal(images[row], images[query]) for row in neighbours)
            assert same(neighbours, images) == same(left_one_out(images, query, encoder, n), images)


def test_they_are_what_the_images_themselves_would_get(arrays, images):
    embeddings, digests = arrays
    by_image = Retriever(
        Gallery({}, embeddings, digests), "cpu", n=6, search=ExactSearch(embeddings["clip"], "cpu"), digest=image_digest
    )
    by_row, rows = make(arrays, n=6), torch.tensor([3, 0, 29, 12])
    classifier = torch.randn(48, 4, generator=torch.Generator().manual_seed(2))
    for retriever in (by_image, by_row):
        retriever.set_classifier(classifier)
    image, row = Batch(images[rows], embed=lambda: images[rows].flatten(1).half()), by_row.own(rows)
    assert torch.equal(row.embedding(), image.embedding())
    assert row.embedding().dtype == torch.float32
    torch.testing.assert_close(row.embedding().norm(dim=1), torch.ones(4))
    assert torch.equal(by_row.classes(row), by_image.classes(image))
    assert torch.equal(by_row.classes(row), by_row.labels("pseudo")[rows])
    for one, other in zip(by_row.neighbours(row), by_image.neighbours(image), strict=True):
        assert torch.equal(one, other)


def test_images_at_hand_afterwards_are_not_taken_for_them(arrays, images):
    embeddings, digests = arrays
    retriever = Retriever(
        Gallery({}, embeddings, digests), "cpu", n=3, search=ExactSearch(embeddings["clip"], "cpu"), digest=image_digest
    )
    retriever.neighbours(retriever.own(torch.tensor([0])))
    strangers = -images[:2]
    found = retriever.neighbours(Batch(strangers, embed=lambda: strangers.flatten(1)))
    cosines = F.cosine_similarity(strangers.flatten(1)[:, None], images.flatten(1)[None], dim=-1)
    assert same(found.rows[0].tolist(), images) == same(cosines[0].topk(3).indices.tolist(), images)
