"""How much each latent changed a logit: integrated gradients along the path from an activation to the steered one.

A steering that is a :class:`Move` moves an activation x by known amounts along decoder directions, and by a rest:

    x̂ = x + Σ_j a_j d_j + rest                  d_j = row j of W_dec

- VS2, PASS: ``a_j = α c_j``; the rest scales the sum back to the norm of x.
- VS2S: ``a_j = α s w_j c_j`` with the latents' weights w and their scale s; the rest as in VS2.
- REC, AMP: ``a_j = (γ - 1) c_j``; the rest removes ``x - x̃``, which the SAE does not explain. REC (γ = 1)
  changes x by the rest alone.
- VS2++: ``a_j = α c̄_j`` with ``c̄`` the mean code over S⁺ minus that over S⁻; the rest as in VS2.

A logit ``f`` is not linear in the activation: a LayerNorm, a projection, the normalisation of the embedding and, for a
site before the last block, whole blocks come after it. Yet at each point of the path, the change of ``f`` is exactly
the sum of the contributions of the latents' steps. On the first part of the path all amounts grow together from 0, and
latent j gets (arXiv 1703.01365, applied to the amounts; the Aumann-Shapley value)

    a_j ⟨d_j, ∫₀¹ ∇f(x + t Σ_i a_i d_i) dt⟩

These contributions sum to ``f(x + Σ a_i d_i) - f(x)``. The rest gets the difference that is left,
``f(x̂) - f(x + Σ a_i d_i)``. The integral is computed by Gauss-Legendre quadrature; the quadrature error is printed as
the remainder. A latent's contribution is not the change that leaving the latent out would make: the two agree where
``f`` is linear.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vs2_plugin.clip.edits import editing
from vs2_plugin.clip.sites import ClipModel, Site, Sites, embedding_from
from vs2_plugin.steering.move import Move

__all__ = ["Attribution", "Movement", "attribute", "movement", "tail"]

#: Points of the quadrature, and how many of them go through the tower at once.
_POINTS, _AT_ONCE = 32, 8


class Movement(NamedTuple):
    """The part of a steering along decoder directions, for one activation."""

    latents: Tensor
    """int64 ``[m]``: the active latents."""
    activations: Tensor
    """``[m]``: the activations c_j; for VS2++ the differences of mean codes c̄_j."""
    amounts: Tensor
    """``[m]``: the amounts a_j."""
    rest: str
    """The rest of the steering, in words."""


def movement(move: Move) -> Movement:
    """Return the part of a move along decoder directions, for the first activation of its batch."""
    latents, activations, amounts = move.code.active(0)
    return Movement(latents, activations, move.gain * amounts, move.rest)


def tail(model: ClipModel, sites: Sites, site: Site, image: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the tower after a site, as a function from activations ``[batch, d]`` there to embeddings ``[batch, e]``.

    Before the tower's end, the embeddings depend on the other tokens of ``image`` ``[1, 3, height, width]`` too, which
    stay unchanged.
    """
    if sites.at_end(site):
        return lambda z: embedding_from(model, site, z)

    def run(z: Tensor) -> Tensor:
        with editing(model, site, lambda x: z):
            embedding: Tensor = model.encode_image(image.expand(len(z), -1, -1, -1)).float()
            return embedding

    return run


@dataclass(frozen=True)
class Attribution:
    """The change of the logits of some classes, shared among latents."""

    latents: Tensor
    """``[m, classes]``: the contribution of each latent."""
    rest: Tensor
    """``[classes]``: the contribution of the rest."""
    total: Tensor
    """``[classes]``: the whole change, ``f(x̂) - f(x)``."""

    @property
    def remainder(self) -> Tensor:
        """``[classes]``: the change that the contributions leave unexplained, which is the quadrature error."""
        return self.total - self.latents.sum(0) - self.rest


def attribute(logits: Callable[[Tensor], Tensor], x: Tensor, steps: Tensor, steered: Tensor) -> Attribution:
    """Share the change of the logits among the latents, by the formula in the module's docstring.

    Args:
        logits: maps activations ``[batch, d]`` to logits ``[batch, classes]``.
        x: the activation ``[d]``.
        steps: the latents' steps ``a_j d_j``, ``[m, d]``.
        steered: the steered activation x̂ ``[d]``.
    """
    path = steps.sum(0)
    with torch.no_grad():
        before, between, after = logits(torch.stack([x, x + path, steered]))
    nodes, weights = np.polynomial.legendre.leggauss(_POINTS)
    times = torch.from_numpy((nodes + 1) / 2).to(x)
    gradient = x.new_zeros(len(before), len(x))  # averaged along the path
    for part, weight in zip(times.split(_AT_ONCE), torch.from_numpy(weights / 2).to(x).split(_AT_ONCE), strict=True):
        points = (x + part[:, None] * path).detach().requires_grad_()
        values = weight @ logits(points)
        for index, value in enumerate(values):
            gradient[index] += torch.autograd.grad(value, points, retain_graph=index + 1 < len(values))[0].sum(0)
    return Attribution((steps @ gradient.T).detach(), after - between, after - before)
