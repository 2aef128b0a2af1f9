"""Steers activations by themselves, outside of a tower: those that Python code has at hand."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from vs2_plugin.clip.sites import ClipModel, Sites, embedding_from
from vs2_plugin.data.given import FLOATS
from vs2_plugin.errors import DataError
from vs2_plugin.model.place import Place
from vs2_plugin.model.places import Places
from vs2_plugin.steering.batch import Batch

__all__ = ["Activations", "steer_activations"]

#: A torch tensor or a NumPy array; what comes back is of the same kind.
Activations = TypeVar("Activations", Tensor, np.ndarray)


def steer_activations(
    model: ClipModel, sites: Sites, places: Places, activations: Activations, block: int | None
) -> Activations:
    """Steer activations ``[batch, d]`` at one of the places; see :meth:`SteeredCLIP.steer`.

    Raises:
        DataError: they are no such activations, or the model is not steered at that block.
    """
    place = _place_at(places, block)
    if isinstance(activations, np.ndarray) and activations.dtype not in FLOATS:
        raise DataError(f"activations of type {activations.dtype}; expected native float16, float32 or float64")
    given = torch.as_tensor(np.array(activations) if isinstance(activations, np.ndarray) else activations)
    if given.ndim != 2 or given.shape[1] != place.site.width or not given.is_floating_point():
        hint = "; one alone is x[None]" if given.ndim == 1 else ""
        raise DataError(
            f"activations of shape {list(given.shape)} and type {str(given.dtype).removeprefix('torch.')}; expected "
            f"floats [batch, {place.site.width}], as they are at {place.site}{hint}"
        )
    x = given.to(next(model.parameters()).device, torch.float32)
    wrong = ~x.isfinite().all(1)
    if wrong.any():
        raise DataError(f"row {int(wrong.int().argmax())} of the activations holds NaN or infinity, as float32")
    # Behind another place, the activation is steered already, and does not tell the plain embedding.
    plain = sites.at_end(place.site) and place is places[0]
    batch = Batch(embed=(lambda: embedding_from(model, place.site, x)) if plain else None)
    steered = place.steer(x, batch).to(given)
    return steered.detach().numpy() if isinstance(activations, np.ndarray) else steered


def _place_at(places: Places, block: int | None) -> Place:
    found = [place for place in places if block is None or place.site.block == block]
    if len(found) == 1:
        return found[0]
    steered = " and ".join(str(place.site) for place in places)
    asked = "block= is missing" if found else f"block={block}"
    raise DataError(f"{asked}: the model steers at {steered}; expected the number of one of its blocks")
