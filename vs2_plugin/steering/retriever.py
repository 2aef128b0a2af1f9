"""Look images up in a gallery: their neighbours, and the classes of these."""

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

#: A query whose nearest image is further than this is not in the gallery itself: half precision and autocast move an
#: embedding by far less.
_SAME = 0.98


class Neighbours(NamedTuple):
    """The gallery's images that are nearest to each query, best first; all on the model's device."""

    rows: Tensor
    """int64 ``[batch, n]``: which images."""
    similarity: Tensor
    """``[batch, n]``: cosines."""
    valid: Tensor
    """bool ``[batch, n]``: False in places that hold no neighbour, since fewer were found."""


def majority(labels: Tensor, neighbours: Neighbours) -> Tensor:
    """The most frequent of the neighbours' labels: ``[batch]``.

    Of equally frequent ones, that with the greater sum of similarities is taken.

    Args:
        labels: int64 ``[batch, n]``.
        neighbours: whose labels they are.
    """
    # A sum of similarities is within ± n, so that in such a unit it can only decide between equal numbers of votes.
    unit = 0.5 ** (2 * labels.shape[1]).bit_length()
    valid = neighbours.valid.double()
    votes = valid.addcmul(valid, neighbours.similarity, value=unit)
    ordered = labels.sort(dim=1).values
    firsts = torch.searchsorted(ordered, labels)  # where each label stands first
    winner = torch.zeros_like(votes).scatter_add_(1, firsts, votes).argmax(1, keepdim=True)
    return ordered.gather(1, winner)[:, 0]


class _Found(NamedTuple):
    """What a search found, before the images themselves are left out."""

    rows: Tensor
    """int64 ``[batch, n + r]``, -1 after the last, with r as often as the gallery holds any one image."""
    similarity: Tensor
    """``[batch, n + r]``."""
    near: Callable[[], Tensor]
    """Waits for, and gives, which images may be in the gallery themselves: bool ``[batch]``, on the CPU."""


class Retriever:
    """A gallery, search in it, and the classes of its images.

    The classes come with :meth:`set_classifier`, before the first batch.
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
            search: finds them; None for a method that looks up no neighbours.
            encode: images to queries ``[batch, e]``; None: the CLIP embedding.
            encoder: its name in the gallery.
            digest: of an image, as in the gallery.
        """
        self.gallery, self.device, self.n = gallery, torch.device(device), n
        self._search, self._encode, self._encoder, self._digest = search, encode, encoder, digest
        self._repeated = int(np.unique(gallery.digests, return_counts=True)[1].max()) if search else 0
        self._classifier: Tensor | None = None
        self._pseudo: tuple[Tensor, Tensor] | None = None
        self._labels = None if gallery.labels is None else torch.from_numpy(np.array(gallery.labels)).to(self.device)

    def shared(self, batch: Batch) -> dict[str, Tensor | None]:
        """The tensors that all steerings read, by their names in words."""
        named = {"the class embeddings": self._classifier, "the gallery's labels": self._labels}
        named |= zip(("the gallery's classes", "their log-odds"), self._pseudo or (), strict=False)
        neighbours: Neighbours | None = batch.known((self, "neighbours"))
        return named if neighbours is None else named | {f"neighbours.{k}": v for k, v in neighbours._asdict().items()}

    # -- the classes

    def set_classifier(self, classifier: Tensor) -> None:
        """Take the zero-shot classifier ``[e, classes]`` of the data set under evaluation."""
        self._classifier = F.normalize(classifier.detach().to(self.device, torch.float32), dim=0)
        self._pseudo = None

    @property
    def classifier(self) -> Tensor:
        """The class embeddings ``[e, classes]``: float32, of unit norm. Raises HarnessError if they are not known."""
        if self._classifier is None:
            raise HarnessError(
                "this method needs the classes of the data set, but none are known; in Python, call "
                "model.set_classifier(classifier) with the zero-shot classifier [embed_dim, classes] first"
            )
        return self._classifier

    @property
    def pseudo(self) -> tuple[Tensor, Tensor]:
        """The gallery's zero-shot classes, int64 ``[count]``, and the log-odds of each, ``[count]``.

        The log-odds are those of a softmax at CLIP's logit scale of 100, as clip_benchmark has it. They order images as
        the probabilities do, many of which float32 would round to 1.
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
        """The gallery's labels, int64 ``[count]``: ``pseudo``, its zero-shot classes, or ``oracle``, the
        training labels. Raises DataError if there are none."""
        if kind == "pseudo":
            return self.pseudo[0]
        if self._labels is None:
            raise DataError("the gallery holds no training labels, which an oracle reads")
        return self._labels

    @property
    def replayable(self) -> bool:
        """Whether a GPU finds neighbours by itself, of the CLIP embedding."""
        return self._encode is None and isinstance(self._search, ScreenedSearch)

    # -- the images at hand

    def own(self, rows: Tensor) -> Batch:
        """Images of the gallery itself as a batch: int64 ``[batch]``. What is known of them is not computed anew."""
        return Batch(rows=rows, embed=lambda: self._stored(CLIP, rows))

    def _stored(self, encoder: str, rows: Tensor) -> Tensor:
        stored = torch.from_numpy(np.asarray(self.gallery.embeddings[encoder][rows.numpy()]))
        return stored.to(self.device).float()

    def classes(self, batch: Batch) -> Tensor:
        """The zero-shot class of each image: int64 ``[batch]``."""
        return batch.once((self, "classes"), lambda: (batch.embedding() @ self.classifier).argmax(1))

    def neighbours(self, batch: Batch) -> Neighbours:
        """The N nearest images of each image, which is never its own neighbour."""
        return batch.once((self, "neighbours"), lambda: self._neighbours(batch))

    def likely(self, batch: Batch) -> Neighbours | None:
        """The same without a wait for the GPU, as long as no image is in the gallery itself: if so, :meth:`neighbours`
        gives this very object. None where there is nothing to wait for."""
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
        # Retrievers of several N share an encoder.
        return batch.once(encode, lambda: F.normalize(encode(images), dim=-1))

    def _found(self, batch: Batch) -> _Found:
        if self._search is None:
            raise PluginError("this method looks up neighbours; declare it with gallery='neighbours'")
        # As many more as an image can be in the gallery, so that n are left without them.
        similarity, rows = self._search(self._queries(batch), min(len(self.gallery), self.n + self._repeated))
        return _Found(rows, similarity, batch.ask(similarity[:, 0].ge(_SAME)))

    def _nearest(self, batch: Batch) -> Neighbours:
        """The N nearest images of each image, itself among them."""

        def made() -> Neighbours:
            found = batch.once((self, "found"), lambda: self._found(batch))
            rows, similarity = (part[:, : self.n] for part in found[:2])
            return Neighbours(rows.clamp_min(0), similarity, rows.ge(0))

        return batch.once((self, "nearest"), made)

    def _neighbours(self, batch: Batch) -> Neighbours:
        rows, similarity, near = batch.once((self, "found"), lambda: self._found(batch))
        same = self._same_image(batch, rows, near().nonzero()[:, 0].tolist())
        if same is None:
            return self._nearest(batch)
        valid = rows.ge(0) & ~same
        # Stable: those that are valid first, still best first.
        order = (~valid).to(torch.uint8).sort(dim=1, stable=True).indices[:, : self.n]
        return Neighbours(*(part.gather(1, order) for part in (rows.clamp_min(0), similarity, valid)))

    def _same_image(self, batch: Batch, rows: Tensor, near: list[int]) -> Tensor | None:
        """Which of the rows found hold the very image that is looked up: bool, of their shape. None: none do, as told
        by the bytes of those images that are ``near`` to one."""
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
