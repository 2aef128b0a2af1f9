"""Looks images up in a gallery: their neighbours, and the neighbours' classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vs2_plugin.errors import DataError, HarnessError, PluginError
from vs2_plugin.gallery.gallery import CLIP, Gallery
from vs2_plugin.gallery.search import ScreenedSearch, Search, blocks
from vs2_plugin.steering.batch import Batch

__all__ = ["Neighbours", "Retriever", "majority"]

#: A query whose nearest image has a smaller cosine is not in the gallery itself: half precision and autocast change an
#: embedding by far less.
_SAME = 0.98


class Neighbours(NamedTuple):
    """The nearest images in the gallery of each query, best first; all tensors are on the model's device."""

    rows: Tensor
    """int64 ``[batch, n]``: row numbers of the images in the gallery."""
    similarity: Tensor
    """``[batch, n]``: cosines."""
    valid: Tensor
    """bool ``[batch, n]``: False in places without a neighbour, where fewer than n were found."""


def majority(labels: Tensor, neighbours: Neighbours) -> Tensor:
    """Return the most frequent of the neighbours' labels: ``[batch]``.

    Among equally frequent labels, the one with the largest sum of similarities wins.

    Args:
        labels: the neighbours' labels, int64 ``[batch, n]``.
        neighbours: the neighbours.
    """
    # A sum of similarities is within ± n: times this unit, it only decides between equal numbers of votes.
    unit = 0.5 ** (2 * labels.shape[1]).bit_length()
    valid = neighbours.valid.double()
    votes = valid.addcmul(valid, neighbours.similarity, value=unit)
    ordered = labels.sort(dim=1).values
    firsts = torch.searchsorted(ordered, labels)  # the first place of each label
    winner = torch.zeros_like(votes).scatter_add_(1, firsts, votes).argmax(1, keepdim=True)
    return ordered.gather(1, winner)[:, 0]


class _Found(NamedTuple):
    """The result of a search, which still includes the query images themselves."""

    rows: Tensor
    """int64 ``[batch, n + r]``, -1 after the last; r is the largest number of copies of an image in the gallery."""
    similarity: Tensor
    """``[batch, n + r]``."""
    near: Callable[[], Tensor]
    """Waits for the GPU, and returns which images may be in the gallery themselves: bool ``[batch]``, on the CPU."""


class Retriever:
    """A gallery, the search in it, and the classes of its images.

    :meth:`set_classifier` has to set the classes before the first batch.
    """

    def __init__(
        self,
        gallery: Gallery,
        device: str | torch.device,
        *,
        n: int = 50,
        search: Search | None = None,
        encode: Callable[[Tensor], Tensor] | None = None,
        encoder: str = CLIP,
        digest: Callable[[Tensor], int] | None = None,
    ) -> None:
        """
        Args:
            gallery: the images.
            device: where the model is.
            n: N, neighbours per query.
            search: finds the neighbours; None for a method that needs none.
            encode: turns images into queries ``[batch, e]``; None: the CLIP embedding.
            encoder: name of that encoder in the gallery.
            digest: computes the digest of an image, as in the gallery.
        """
        self.gallery, self.device, self.n = gallery, torch.device(device), n
        self._search, self._encode, self._encoder, self._digest = search, encode, encoder, digest
        self._repeated = int(np.unique(gallery.digests, return_counts=True)[1].max()) if search else 0
        self._classifier: Tensor | None = None
        self._pseudo: tuple[Tensor, Tensor] | None = None
        self._labels = None if gallery.labels is None else torch.from_numpy(np.array(gallery.labels)).to(self.device)

    def shared(self, batch: Batch) -> dict[str, Tensor | None]:
        """Return the tensors that all steerings share, by a name for messages."""
        named = {"the class embeddings": self._classifier, "the gallery's labels": self._labels}
        named |= zip(("the gallery's classes", "their log-odds"), self._pseudo or (), strict=False)
        neighbours: Neighbours | None = batch.known((self, "neighbours"))
        return named if neighbours is None else named | {f"neighbours.{k}": v for k, v in neighbours._asdict().items()}

    # -- the classes

    def set_classifier(self, classifier: Tensor) -> None:
        """Set the zero-shot classifier ``[e, classes]`` of the data set under evaluation.

        What was computed for the same classes is kept: the models of a sweep share a retriever.
        """
        normal = F.normalize(classifier.detach().to(self.device, torch.float32), dim=0)
        if self._classifier is None or not torch.equal(self._classifier, normal):
            self._classifier, self._pseudo = normal, None

    @property
    def classifier(self) -> Tensor:
        """The class embeddings ``[e, classes]``: float32, of unit norm. Raises HarnessError if they are not set."""
        if self._classifier is None:
            raise HarnessError(
                "this method needs the classes of the data set, but none are known; in Python, call "
                "model.set_classifier(classifier) with the zero-shot classifier [embed_dim, classes] first"
            )
        return self._classifier

    @property
    def pseudo(self) -> tuple[Tensor, Tensor]:
        """The gallery's zero-shot classes, int64 ``[count]``, and the log-odds of each, ``[count]``.

        The log-odds are those of a softmax at CLIP's logit scale of 100, as in clip_benchmark. They order images as the
        probabilities do, but float32 would round many of the probabilities to 1.
        """
        if self._pseudo is None:
            classes, confidence = [], []
            for block in blocks(self.gallery.embeddings[CLIP], self.device):
                logits = 100.0 * block @ self.classifier
                best = logits.max(1, keepdim=True)
                others = logits.scatter(1, best.indices, -torch.inf).logsumexp(1)
                classes.append(best.indices[:, 0])
                confidence.append(best.values[:, 0] - others)
            self._pseudo = torch.cat(classes), torch.cat(confidence)
        return self._pseudo

    def labels(self, kind: str) -> Tensor:
        """Return the gallery's labels, int64 ``[count]``: its zero-shot classes for ``pseudo``, or its training labels
        for ``oracle``. Raises DataError if the gallery has no training labels."""
        if kind == "pseudo":
            return self.pseudo[0]
        if self._labels is None:
            raise DataError("the gallery holds no training labels, which an oracle reads")
        return self._labels

    @property
    def replayable(self) -> bool:
        """Whether neighbours are those of the CLIP embedding, and a GPU finds them without the CPU."""
        return self._encode is None and isinstance(self._search, ScreenedSearch)

    # -- the images at hand

    def own(self, rows: Tensor) -> Batch:
        """Return a batch of the gallery's own images, int64 ``[batch]``, with their stored embeddings."""
        return Batch(rows=rows, embed=lambda: self._stored(CLIP, rows))

    def _stored(self, encoder: str, rows: Tensor) -> Tensor:
        stored = torch.from_numpy(np.asarray(self.gallery.embeddings[encoder][rows.numpy()]))
        return stored.to(self.device).float()

    def classes(self, batch: Batch) -> Tensor:
        """Return the zero-shot class of each image: int64 ``[batch]``."""
        return batch.once((self, "classes"), lambda: (batch.embedding() @ self.classifier).argmax(1))

    def neighbours(self, batch: Batch) -> Neighbours:
        """Return the N nearest images of each image; an image is never its own neighbour."""
        return batch.once((self, "neighbours"), lambda: self._neighbours(batch))

    def likely(self, batch: Batch) -> Neighbours | None:
        """Return the neighbours without waiting for the GPU, on the assumption that no image is in the gallery itself.

        Where that holds, :meth:`neighbours` returns this very object. None where there is no GPU to wait for.
        """
        if self.device.type == "cpu" or batch.rows is not None or batch.known((self, "neighbours")) is not None:
            return None
        return self._nearest(batch)

    def _queries(self, batch: Batch) -> Tensor:
        encode, images, rows = self._encode, batch.images, batch.rows
        if encode is None:
            return batch.embedding()
        if rows is not None:
            return F.normalize(self._stored(self._encoder, rows), dim=-1)
        if images is None:
            raise HarnessError("methods with a gallery steer within encode_image only; call model.encode_image")
        # Retrievers of different N share an encoder, and so the queries.
        return batch.once(encode, lambda: F.normalize(encode(images), dim=-1))

    def _found(self, batch: Batch) -> _Found:
        if self._search is None:
            raise PluginError("this method looks up neighbours; declare it with gallery='neighbours'")
        # As many more as an image has copies in the gallery, so that n are left after these are removed.
        similarity, rows = self._search(self._queries(batch), min(len(self.gallery), self.n + self._repeated))
        return _Found(rows, similarity, batch.ask(similarity[:, 0].ge(_SAME)))

    def _nearest(self, batch: Batch) -> Neighbours:
        """Return the N nearest images of each image; an image that is in the gallery is among its own."""

        def made() -> Neighbours:
            hits = batch.once((self, "found"), lambda: self._found(batch))
            rows, similarity = (part[:, : self.n] for part in hits[:2])
            return Neighbours(rows.clamp_min(0), similarity, rows.ge(0))

        return batch.once((self, "nearest"), made)

    def _neighbours(self, batch: Batch) -> Neighbours:
        rows, similarity, near = batch.once((self, "found"), lambda: self._found(batch))
        same = self._same_image(batch, rows, near().nonzero()[:, 0].tolist())
        if same is None:
            return self._nearest(batch)
        valid = rows.ge(0) & ~same
        # A stable sort: valid images first, and still in the order of similarity.
        order = (~valid).to(torch.uint8).sort(dim=1, stable=True).indices[:, : self.n]
        return Neighbours(*(part.gather(1, order) for part in (rows.clamp_min(0), similarity, valid)))

    def _same_image(self, batch: Batch, rows: Tensor, near: list[int]) -> Tensor | None:
        """Return which of ``rows`` are copies of the query image, bool of the same shape; None if there are no copies.

        Only the queries ``near`` are compared, by the digests of the images' bytes.
        """
        same = torch.zeros(rows.shape, dtype=torch.bool)
        for index in near:
            digest = self._digest_of(batch, index)
            if digest is not None:
                same[index] = torch.from_numpy(self.gallery.digests[rows[index].cpu().numpy()] == np.uint64(digest))
        return same.to(rows.device) if same.any() else None

    def _digest_of(self, batch: Batch, index: int) -> int | None:
        if batch.rows is not None:
            return int(self.gallery.digests[int(batch.rows[index])])
        if self._digest is None or batch.images is None:
            return None
        return self._digest(batch.images[index])
