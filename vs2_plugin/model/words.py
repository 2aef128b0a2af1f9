"""The words that a latent's direction is nearest to, in the space that CLIP's images and texts share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vs2_plugin.clip.sites import ClipModel, Site, embedding_from

__all__ = ["latent_embeddings", "nearest"]


@torch.no_grad()
def latent_embeddings(model: ClipModel, site: Site, mean: Tensor, steps: Tensor) -> Tensor:
    """Return what a latent adds to the embedding of the mean image: ``e(μ + t w_j) - e(μ)``, ``[m, e]``.

    Args:
        model: the CLIP.
        site: the tower's default site or its output; ``e`` is what comes after it.
        mean: μ ``[d]``.
        steps: ``t w_j``, ``[m, d]``, with t a usual activation of latent j.
    """
    return embedding_from(model, site, mean + steps) - embedding_from(model, site, mean[None])


def nearest(directions: Tensor, texts: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Find the texts with the largest ``cos(direction, text - mean text)``.

    What all texts have in common (the prompt, say) tells none from another, so it is taken off. With fewer than two
    texts there is nothing to tell apart.

    Args:
        directions: ``[m, e]``.
        texts: ``[words, e]``, of unit norm.
        top: how many.

    Returns:
        Cosines and indices, ``[m, top]``, best first.
    """
    cosines = F.normalize(directions, dim=-1) @ F.normalize(texts - texts.mean(0), dim=-1).T
    best = cosines.topk(min(top, len(texts)), dim=-1)
    return best.values, best.indices
