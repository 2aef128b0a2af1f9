"""What a steered model makes of one image: embeddings, activations, contributions of latents, FVU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vs2_plugin.clip.edits import reading
from vs2_plugin.harness.model import SteeredCLIP
from vs2_plugin.harness.places import Place
from vs2_plugin.inspection.attribution import Attribution, Movement, attribute, movement, tail
from vs2_plugin.sae.topk import TopKSAE, sample_fvu
from vs2_plugin.steering.batch import Batch

__all__ = ["activations", "contributions", "embeddings", "fvu_at", "logits_of", "sae_at"]


def logits_of(embedding: Tensor, texts: Tensor) -> Tensor:
    """Return the logits ``[batch, classes]`` of embeddings ``[batch, e]``, as clip_benchmark has them."""
    return 100.0 * F.normalize(embedding.float(), dim=-1) @ texts.T


@torch.no_grad()
def embeddings(model: SteeredCLIP, image: Tensor) -> tuple[Tensor, Tensor]:
    """Return the plain and the steered embedding ``[1, e]`` of an image ``[1, 3, height, width]``."""
    with model.unsteered():
        plain: Tensor = _clip(model).encode_image(image)
    return plain, model.encode_image(image)


@torch.no_grad()
def activations(model: SteeredCLIP, index: int, image: Tensor) -> tuple[Tensor, Tensor]:
    """Return the activation ``[1, d]`` at the place ``index`` without and with the steering there.

    Earlier places steer, later ones do not.
    """
    site = model.places[index].site

    def read(first: int) -> Tensor:
        with reading(model.model, [site]) as activation, model.unsteered(first):
            _clip(model).encode_image(image)
        return activation[site].float()

    return read(index), read(index + 1)


def contributions(
    model: SteeredCLIP, index: int, batch: Batch, x: Tensor, steered: Tensor, texts: Tensor
) -> tuple[Movement, Attribution] | None:
    """Return how the steering at a place moves an image along latents, and what that does to its logits.

    Args:
        model: the steered model.
        index: of the place.
        batch: the image.
        x: its activation there ``[1, d]``; ``steered``, the same after the steering.
        texts: the classes whose logits are meant, ``[classes, e]``.

    Returns:
        None for a method that has no sparse code.
    """
    place = model.places[index]
    with torch.no_grad():
        move = place.move(x, batch)
    if move is None or batch.images is None:
        return None
    moved = movement(move)
    steps = moved.amounts[:, None] * move.code.sae.W_dec[moved.latents].detach()
    with model.unsteered(index):
        rest_of_tower = tail(model.model, model.sites, place.site, batch.images)
        return moved, attribute(lambda z: logits_of(rest_of_tower(z), texts), x[0], steps, steered[0])


def _clip(model: SteeredCLIP) -> Any:
    return model.model


def sae_at(place: Place) -> tuple[TopKSAE, Tensor]:
    """Return the SAE at a place that has one, and its mean activation ``[d]``."""
    if place.gate is None:
        raise ValueError(f"no SAE at {place.site}")
    return place.gate.sae, place.gate.mean


def fvu_at(place: Place, x: Tensor) -> float:
    """Return the FVU of an activation ``[1, d]`` by the SAE at a place."""
    sae, mean = sae_at(place)
    return float(sample_fvu(x, sae(x), mean))
