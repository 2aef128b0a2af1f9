"""Finds the words nearest to a latent's direction, in CLIP's common space of images and texts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vs2_plugin.clip.sites import ClipModel, Site, embedding_from

__all__ = ["latent_embeddings", "nearest"]


@torch.no_grad()
def latent_embeddings(model: ClipModel, site: Site, mean: Tensor, steps: Tensor) -> Tensor:
    """Return each latent's change of the embedding of the mean activation: ``e(μ + t w_j) - e(μ)``, ``[m, e]``.

    Args:
        model: the CLIP model.
        site: the tower's default site or its output; ``e`` is the rest of the tower after it.
        mean: mean activation μ ``[d]``.
        steps: ``t w_j``, ``[m, d]``, with t a usual activation of latent j.
    """
    return embedding_from(model, site, mean + steps) - embedding_from(model, site, mean[None])


def nearest(directions: Tensor, texts: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Find the texts with the largest ``cos(direction, text - mean text)``.

    The mean text is subtracted since the part that all texts share, such as the prompt, distinguishes none of them. A
    single text is its own mean, so its cosine is 0.

    Args:
        directions: changes of the embedding, ``[m, e]``.
        texts: embeddings of the words, ``[words, e]``, of unit norm.
        top: number of texts per direction.

    Returns:
        Cosines and indices of the texts, ``[m, top]`` (fewer columns for fewer texts), best first.
    """
    cosines = F.normalize(directions, dim=-1) @ F.normalize(texts - texts.mean(0), dim=-1).T
    best = cosines.topk(min(top, len(texts)), dim=-1)
    return best.values, best.indices
