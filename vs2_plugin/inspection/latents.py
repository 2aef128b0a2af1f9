"""Statistics of an SAE's latents on a gallery: how often and how strongly they are active, and their top images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vs2_plugin.arrays import Stack
from vs2_plugin.sae.fit import DENSE
from vs2_plugin.sae.topk import TopKSAE
from vs2_plugin.text import counted

__all__ = ["LatentStatistics", "chance", "choose", "kinds", "scan"]

#: Images encoded at a time.
_BLOCK = 2048
#: A latent is rare where its frequency is this many times below k/n, the mean of all latents.
_APART = 10


@dataclass(frozen=True)
class LatentStatistics:
    """Statistics of the latents of one SAE over one gallery."""

    images: int
    """Images in the gallery."""
    counts: np.ndarray
    """int64 ``[n]``: images in which a latent is active (its activation is not 0)."""
    means: np.ndarray
    """``[n]``: mean activation over those images; 0 for a dead latent."""
    rows: np.ndarray
    """int64 ``[n, top]``: rows of the top images, those of largest activation by magnitude; -1 after the last one."""
    values: np.ndarray
    """float32 ``[n, top]``: the activations in the top images."""
    classes: np.ndarray
    """int64 ``[n, top]``: the zero-shot classes of the top images; -1 where there is no image."""
    class_counts: np.ndarray
    """int64 ``[classes]``: images of each zero-shot class in the gallery."""

    @property
    def frequencies(self) -> np.ndarray:
        """``[n]``: share of the images in which a latent is active."""
        return self.counts / self.images

    @cached_property
    def shown(self) -> np.ndarray:
        """int64 ``[n]``: number of top images of each latent."""
        return np.asarray((self.rows >= 0).sum(1))

    @cached_property
    def purity(self) -> tuple[np.ndarray, np.ndarray]:
        """The most frequent zero-shot class among each latent's top images (of equally frequent ones, the lowest
        number), int64 ``[n]``, and the number of top images of that class. A dead latent has class -1 and number 0."""
        same = (self.classes[:, :, None] == self.classes[:, None, :]) & (self.classes >= 0)[:, :, None]
        votes = same.sum(2)
        most = votes.max(1)
        first = np.where(votes == most[:, None], self.classes, len(self.class_counts)).min(1)
        return first, most

    @property
    def full(self) -> np.ndarray:
        """bool ``[n]``: the latents with the full number of top images."""
        return np.asarray(self.shown == self.rows.shape[1])

    @cached_property
    def chance(self) -> np.ndarray:
        """``[top + 1, top + 1]``: distribution of purity by chance; see :func:`chance`."""
        return chance(self.class_counts, self.rows.shape[1])

    def purity_by_chance(self, latent: int) -> tuple[float, float]:
        """Return the mean purity by chance, and the probability by chance of a purity at least that of the latent."""
        shown, votes = self.shown[latent], self.purity[1][latent]
        row = self.chance[shown]
        return float(row @ np.arange(len(row)) / shown), min(1.0, float(row[votes:].sum()))

    def about(self, latent: int, classes: Sequence[str]) -> str:
        """Return the figures of a latent as a line of text; ``classes`` are the names of the zero-shot classes."""
        images = counted(self.images, "training image")
        if not self.counts[latent]:
            return f"active in none of {images}"
        shown, label, votes = (int(values[latent]) for values in (self.shown, *self.purity))
        return (
            f"active in {self.counts[latent]:,} of {images} ({self.frequencies[latent]:.2%}), "
            f"mean {self.means[latent]:.2f}; purity {votes / shown:.0%} ({votes} of {shown} "
            f"{'is' if votes == 1 else 'are'} {classes[label]!r}; by chance {self.purity_by_chance(latent)[0]:.0%})"
        )


@torch.no_grad()
def scan(
    sae: TopKSAE,
    activations: np.ndarray | Stack,
    embeddings: np.ndarray | Stack,
    classifier: Tensor,
    top: int,
    progress: Callable[[int], object] = lambda images: None,
) -> LatentStatistics:
    """Compute the statistics of all latents in one pass over a gallery, in blocks.

    Args:
        sae: the SAE, on the device that encodes.
        activations: activations at the SAE's site, ``[count, d]``.
        embeddings: CLIP embeddings of the same images, ``[count, e]``.
        classifier: the zero-shot classifier ``[e, classes]``.
        top: top images kept per latent.
        progress: called with the number of images of each block.
    """
    n, device = sae.config.num_latents, sae.W_dec.device
    classifier = F.normalize(classifier.to(device, torch.float32), dim=0)
    counts, sums = np.zeros(n, np.int64), np.zeros(n)
    class_counts = np.zeros(classifier.shape[1], np.int64)
    rows, labels = (np.full((n, top), -1) for _ in range(2))
    values = np.zeros((n, top), np.float32)
    for start in range(0, len(activations), _BLOCK):
        x, embedding = (
            torch.from_numpy(np.array(array[start : start + _BLOCK])).to(device).float()
            for array in (activations, embeddings)
        )
        classes = (F.normalize(embedding, dim=-1) @ classifier).argmax(1).cpu().numpy()
        class_counts += np.bincount(classes, minlength=len(class_counts))
        code = sae.encode(x)
        value, latent = code.values.cpu().numpy().ravel(), code.indices.cpu().numpy().ravel()
        row = np.repeat(np.arange(len(x)), code.values.shape[1])
        active = value != 0
        counts += np.bincount(latent[active], minlength=n)
        sums += np.bincount(latent[active], value[active], minlength=n)
        # Of equally strong images the earlier one is kept, so a later image must be stronger than the weakest one.
        strong = np.abs(value) > np.abs(values[latent, -1])
        _merge((rows, values, labels), latent[strong], (start + row[strong], value[strong], classes[row[strong]]))
        progress(len(x))
    means = sums / np.maximum(counts, 1)
    return LatentStatistics(len(activations), counts, means, rows, values, labels, class_counts)


def _merge(best: tuple[np.ndarray, ...], latent: np.ndarray, block: tuple[np.ndarray, ...]) -> None:
    """Merge a block's activations of latents into ``best``; both hold arrays of rows, values and classes."""
    top = best[0].shape[1]
    touched = np.unique(latent)
    owner = np.concatenate([np.repeat(touched, top), latent])
    rows, values, classes = (
        np.concatenate([old[touched].ravel(), new]) for old, new in zip(best, block, strict=True)
    )  # fmt: skip
    # By latent, then by strength, then the earlier image first, so that results do not depend on the block size.
    order = np.lexsort((np.where(rows < 0, np.iinfo(rows.dtype).max, rows), -np.abs(values), owner))
    starts = np.searchsorted(owner[order], touched)
    first = order[starts[:, None] + np.arange(top)]
    for old, merged in zip(best, (rows, values, classes), strict=True):
        old[touched] = merged[first]


def kinds(frequencies: np.ndarray, k: int) -> np.ndarray:
    """Return the kind of each latent ``[n]``: ``dead`` (never active), ``rare`` (frequency below a tenth of k/n),
    ``dense`` (active in more than a tenth of the images), or an empty text.

    k/n is the mean frequency: all latents would have it if they were active equally often.
    """
    least = k / len(frequencies) / _APART
    return np.select([frequencies == 0, frequencies < least, frequencies > DENSE], ["dead", "rare", "dense"], "")


def chance(class_counts: np.ndarray, top: int) -> np.ndarray:
    """Return the distribution of the purity of images drawn at random: ``[top + 1, top + 1]``.

    Entry ``[t, m]`` is the probability that of t images, drawn with the classes' shares p_c, the most frequent class
    has exactly m. Exact: ``P(all classes ≤ m) = t! [z^t] Π_c Σ_{i ≤ m} (p_c z)^i / i!``.
    """
    shares = class_counts[class_counts > 0] / class_counts.sum()
    factorials = np.array([math.factorial(i) for i in range(top + 1)], dtype=float)
    terms = shares[:, None] ** np.arange(top + 1) / factorials
    at_most = np.zeros((top + 1, top + 1))  # [t, m]
    for m in range(top + 1):
        product = np.eye(1, top + 1)[0]
        for term in terms:
            product = np.convolve(product, term[: m + 1])[: top + 1]
        at_most[:, m] = product * factorials
    return np.diff(at_most, axis=1, prepend=0)


def choose(statistics: LatentStatistics, limit: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Choose latents to show, in four ways, up to ``limit`` in all, none of them dead.

    ``random`` latents are drawn evenly from all that are alive, and so represent the SAE; ``frequent`` ones are active
    in the most images (the densest), ``strong`` ones have the largest mean activation by magnitude, and ``pure`` ones
    the most top images of one class, among latents with the full number of top images (a single image is always pure).
    A latent may be chosen in several ways.
    """
    alive = np.flatnonzero(statistics.counts)
    each = [len(part) for part in np.array_split(np.arange(limit), 4)]
    full = np.flatnonzero(statistics.full)
    pure = statistics.purity[1]
    return {
        "random": np.random.default_rng(seed).permutation(alive)[: each[0]],
        "frequent": alive[np.lexsort((alive, -statistics.counts[alive]))][: each[1]],
        "strong": alive[np.lexsort((alive, -np.abs(statistics.means[alive])))][: each[2]],
        "pure": full[np.lexsort((full, -statistics.counts[full], -pure[full]))][: each[3]],
    }
