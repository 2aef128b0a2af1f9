"""The words that a latent's direction is nearest to, in the space that CLIP's images and texts share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vs2_plugin.clip.sites import ClipModel, Site, embedding_from

__all__ = ["latent_embeddings", "nearest", "text_embeddings"]

_AT_ONCE = 256


@torch.no_grad()
def text_embeddings(
    model: Any, tokenizer: Callable[[list[str]], Tensor], words: list[str], prompts: list[str] | dict[str, list[str]]
) -> Tensor:
    """Return the mean embedding of each word's prompts, of unit norm, as clip_benchmark's zero-shot classifier has it.

    Args:
        model: the CLIP.
        tokenizer: its tokenizer.
        words: class names or concepts.
        prompts: with ``{c}`` in the word's place; or each word's own.

    Returns:
        float32 ``[words, e]``.
    """
    device = next(model.parameters()).device
    embeddings = []
    for word in words:
        texts = prompts[word] if isinstance(prompts, dict) else [prompt.format(c=word) for prompt in prompts]
        tokens = tokenizer(texts).to(device)
        embedded = torch.cat([model.encode_text(part) for part in torch.split(tokens, _AT_ONCE)])
        embeddings.append(F.normalize(embedded.float(), dim=-1).mean(0))
    return F.normalize(torch.stack(embeddings), dim=-1)


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
