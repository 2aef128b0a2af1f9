"""Steers activations that are given as a tensor or an array, outside of a tower."""

from __future__ import annotations

from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from vs2_plugin.clip.edits import in_float32
from vs2_plugin.clip.sites import ClipModel, Sites, embedding_from
from vs2_plugin.data.given import FLOATS
from vs2_plugin.errors import DataError
from vs2_plugin.model.place import Place
from vs2_plugin.model.places import Places
from vs2_plugin.steering.batch import Batch

__all__ = ["Activations", "steer_activations"]

#: A torch tensor or a NumPy array; steered activations are returned as the type that was passed in.
Activations = TypeVar("Activations", Tensor, np.ndarray)


def steer_activations(
    model: ClipModel, sites: Sites, places: Places, activations: Activations, block: int | None
) -> Activations:
    """Return activations ``[batch, d]`` as one of the places steers them; see :meth:`SteeredCLIP.steer`.

    Raises:
        DataError: activations of another type or shape, or not finite; or no place, or several, at ``block``.
    """
    place = _place_at(places, block)
    if isinstance(activations, np.ndarray) and activations.dtype not in FLOATS:
        raise DataError(f"activations of type {activations.dtype}; expected native float16, float32 or float64")
    try:
        tensor = torch.as_tensor(np.array(activations) if isinstance(activations, np.ndarray) else activations)
    except (TypeError, ValueError, RuntimeError):
        kind = type(activations).__name__
        raise DataError(f"activations of type {kind}; expected a tensor or an array of floats") from None
    if tensor.ndim != 2 or tensor.shape[1] != place.site.width or not tensor.is_floating_point():
        hint = "; one alone is x[None]" if tensor.ndim == 1 else ""
        raise DataError(
            f"activations of shape {list(tensor.shape)} and type {str(tensor.dtype).removeprefix('torch.')}; expected "
            f"floats [batch, {place.site.width}], as they are at {place.site}{hint}"
        )
    x = tensor.to(next(model.parameters()).device, torch.float32)
    wrong = ~x.isfinite().all(1)
    if wrong.any():
        raise DataError(f"row {int(wrong.int().argmax())} of the activations holds NaN or infinity, as float32")
    # After an earlier place the activation is steered already, so it does not determine the plain embedding.
    plain = sites.at_end(place.site) and place is places[0]
    batch = Batch(embed=(lambda: embedding_from(model, place.site, x)) if plain else None)
    steered = in_float32(partial(place.steer, batch=batch), x).to(tensor)
    return steered.detach().numpy() if isinstance(activations, np.ndarray) else steered


def _place_at(places: Places, block: int | None) -> Place:
    matching = [place for place in places if block is None or place.site.block == block]
    if len(matching) == 1:
        return matching[0]
    steered = " and ".join(str(place.site) for place in places)
    asked = "block= is missing" if matching else f"block={block}"
    raise DataError(f"{asked}: the model steers at {steered}; expected the number of one of its blocks")
