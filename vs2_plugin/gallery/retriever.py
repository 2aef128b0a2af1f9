"""The neighbours of the images at hand, and what is known of their classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vs2_plugin.errors import DataError, HarnessError
from vs2_plugin.gallery.gallery import CLIP, Gallery
from vs2_plugin.gallery.search import Search, blocks

__all__ = ["Neighbours", "Retriever", "majority"]

#: A query whose nearest image is further than this is not in the gallery itself: half precision and autocast move an
#: embedding by far less.
_SAME = 0.98


class Neighbours(NamedTuple):
    """The gallery's images that are nearest to each query, best first."""

    rows: Tensor
    """int64 ``[batch, n]``, on the CPU: which images."""
    similarity: Tensor
    """``[batch, n]``: cosines."""
    valid: Tensor
    """bool ``[batch, n]``: False in places that hold no neighbour, since fewer were found."""


def majority(labels: Tensor, neighbours: Neighbours, classes: int) -> tuple[Tensor, Tensor]:
    """The most frequent of the neighbours' labels, and the number of neighbours that have it: ``[batch]`` each.

    Of equally frequent ones, that with the greater sum of similarities is taken.

    Args:
        labels: int64 ``[batch, n]``.
        neighbours: whose labels they are.
        classes: labels are below this.
    """
    valid = neighbours.valid.double()
    counts = valid.new_zeros(len(labels), classes).scatter_add_(1, labels, valid)
    sums = torch.zeros_like(counts).scatter_add_(1, labels, neighbours.similarity * valid)
    # A sum is within ± n, so that it can only decide between equal counts.
    winner = (counts + sums / (2 * labels.shape[1] + 1)).argmax(1)
    return winner, counts.gather(1, winner[:, None])[:, 0].float()


class Retriever:
    """What the steerings of one model ask about the images of the batch at hand.

    The steered model calls :meth:`begin` before a batch and :meth:`end` after it. The classes come with
    :meth:`set_classifier`, before the first batch.
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
        self._labels = None if gallery.labels is None else torch.from_numpy(np.asarray(gallery.labels))
        self.end()

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
                "this method needs the classes of the data set, and none are known; in Python, call "
                "model.set_classifier(classifier) with the zero-shot classifier [embed_dim, classes] first"
            )
        return self._classifier

    @property
    def pseudo(self) -> tuple[Tensor, Tensor]:
        """The gallery's zero-shot classes, int64 ``[count]``, and the log-odds of each, ``[count]``; on the CPU.

        The log-odds are those of a softmax at CLIP's logit scale of 100, as clip_benchmark has it. They order images as
        the probabilities do, many of which float32 would round to 1.
        """
        if self._pseudo is None:
            classes, confidence = [], []
            for block in blocks(self.gallery.embeddings[CLIP], self.device):
                logits = 100.0 * block @ self.classifier
                best = logits.max(1, keepdim=True)
                others = logits.scatter(1, best.indices, -torch.inf).logsumexp(1)
                classes.append(best.indices[:, 0].cpu())
                confidence.append((best.values[:, 0] - others).cpu())
            self._pseudo = torch.cat(classes), torch.cat(confidence)
        return self._pseudo

    def labels(self, kind: str) -> Tensor:
        """The gallery's labels, int64 ``[count]`` on the CPU: ``pseudo``, its zero-shot classes, or ``oracle``, the
        training labels. Raises DataError if there are none."""
        if kind == "pseudo":
            return self.pseudo[0]
        if self._labels is None:
            raise DataError("the gallery holds no training labels, which an oracle reads")
        return self._labels

    # -- the batch at hand

    def begin(self, images: Tensor, targets: Tensor | None = None) -> None:
        """Images ``[batch, 3, height, width]`` are about to be encoded; ``targets`` ``[batch]``, for an oracle."""
        self.end()
        self._images, self.targets = images, targets

    def begin_own(self, rows: Tensor) -> None:
        """Images of the gallery itself are at hand: int64 ``[batch]``. What is known of them is not computed anew."""
        self.end()
        self._rows = rows

    def _embeddings_of(self, encoder: str, rows: Tensor) -> Tensor:
        found = torch.from_numpy(np.asarray(self.gallery.embeddings[encoder][rows.numpy()]))
        return F.normalize(found.to(self.device).float(), dim=-1)

    def embed(self, embedding: Callable[[], Tensor]) -> None:
        """Say how the plain CLIP embedding ``[batch, e]`` of the batch is had. It is asked for at most once.

        Raises:
            HarnessError: no batch was begun, so that the images are not known.
        """
        self._require_batch()
        self._embedding = embedding

    def end(self) -> None:
        """Forget the batch."""
        self._images: Tensor | None = None
        self._rows: Tensor | None = None
        self.targets: Tensor | None = None
        self._embedding: Callable[[], Tensor] | None = None
        self._plain: Tensor | None = None
        self._neighbours: Neighbours | None = None

    def embedding(self) -> Tensor:
        """The plain CLIP embedding of the batch, float32, of unit norm."""
        if self._plain is None and self._rows is not None:
            self._plain = self._embeddings_of(CLIP, self._rows)
        if self._plain is None:
            self._require_batch()
            self._plain = F.normalize(self._embedding().float(), dim=-1)
        return self._plain

    def _queries(self) -> Tensor:
        if self._encode is None:
            return self.embedding()
        if self._rows is not None:
            return self._embeddings_of(self._encoder, self._rows)
        return F.normalize(self._encode(self._images), dim=-1)

    def _require_batch(self) -> None:
        if self._images is None and self._rows is None:
            raise HarnessError("methods with a gallery steer within encode_image only; call model.encode_image")

    def classes(self) -> Tensor:
        """The zero-shot class of each query: int64 ``[batch]``."""
        return (self.embedding() @ self.classifier).argmax(1)

    def neighbours(self) -> Neighbours:
        """The N nearest images of each query, which is never its own neighbour."""
        if self._neighbours is None:
            queries = self._queries()
            # As many more as an image can be in the gallery, so that n are left without them.
            wanted = min(len(self.gallery), self.n + self._repeated)
            similarity, rows = self._search(queries, wanted)
            rows = rows.cpu()
            valid = rows.ge(0) & ~self._own(rows, similarity)
            # Stable: those that are valid first, still best first.
            order = (~valid).to(torch.uint8).sort(dim=1, stable=True).indices[:, : self.n]
            on_device = order.to(self.device)
            self._neighbours = Neighbours(
                rows.gather(1, order).clamp_min(0),
                similarity.gather(1, on_device),
                valid.gather(1, order).to(self.device),
            )
        return self._neighbours

    def _digest_at(self, index: int) -> np.uint64:
        if self._rows is not None:
            return self.gallery.digests[self._rows[index]]
        return np.uint64(self._digest(self._images[index]))

    def _own(self, rows: Tensor, similarity: Tensor) -> Tensor:
        own = torch.zeros_like(rows, dtype=torch.bool)
        if self._digest is not None or self._rows is not None:
            for index in similarity[:, 0].ge(_SAME).nonzero()[:, 0].tolist():
                found = self.gallery.digests[rows[index].numpy()]
                own[index] = torch.from_numpy(found == self._digest_at(index))
        return own
