"""Which latents changed a logit, and by how much: integrated gradients along the way that steering takes.

A steering that is a :class:`Move` takes an activation by known amounts along decoder directions, and by a rest:

    x̂ = x + Σ_j a_j d_j + rest                  d_j = row j of W_dec

- VS2, PASS: ``a_j = α c_j``; the rest brings the sum back to the norm of x.
- VS2S: ``a_j = α s w_j c_j`` with the latents' weights w and their scale s; the rest as in VS2.
- REC, AMP: ``a_j = (γ - 1) c_j``; the rest takes away ``x - x̃``, which the SAE does not explain. Of REC's change,
  the rest is all.
- VS2++: ``a_j = α c̄_j`` with ``c̄`` the mean code over S⁺ minus that over S⁻; the rest as in VS2.

A logit ``f`` is not linear in the activation: a LayerNorm, a projection, the normalisation of the embedding and, for a
site before the last block, whole blocks come after it. What is linear, and exact, is that at each point of the way the
change of ``f`` is the sum of what each latent's step contributes to it. With the latents' part of the way first, all
amounts growing together from 0, latent j gets (arXiv 1703.01365, applied to the amounts; the Aumann-Shapley value)

    a_j ⟨d_j, ∫₀¹ ∇f(x + t Σ_i a_i d_i) dt⟩

and these sum to ``f(x + Σ a_i d_i) - f(x)``. The rest gets the difference that is left, ``f(x̂) - f(x + Σ a_i d_i)``.
The integral is taken by Gauss-Legendre quadrature; its error is what is printed as the remainder. What a latent gets
is not what leaving it out would change: the two agree where ``f`` is linear.
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

#: Points of the quadrature, and how many of them are run at once.
_POINTS, _AT_ONCE = 32, 8


class Movement(NamedTuple):
    """The part of a steering that goes along decoder directions, for one activation."""

    latents: Tensor
    """int64 ``[m]``: the latents that are active."""
    activations: Tensor
    """``[m]``: c_j; for VS2++ c̄_j."""
    amounts: Tensor
    """``[m]``: a_j."""
    rest: str
    """What the rest is, in words."""


def movement(move: Move) -> Movement:
    """Return the part along latents of a move, for the first activation of its batch."""
    latents, activations, amounts = move.code.active(0)
    return Movement(latents, activations, move.gain * amounts, move.rest)


def tail(model: ClipModel, sites: Sites, site: Site, image: Tensor) -> Callable[[Tensor], Tensor]:
    """The tower after a site: a function from activations ``[batch, d]`` there to embeddings ``[batch, e]``.

    Before the tower's end it depends on the other tokens of ``image`` ``[1, 3, height, width]``, which stay as they
    are.
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
    """``[classes]``: that of the rest."""
    total: Tensor
    """``[classes]``: the change, ``f(x̂) - f(x)``."""

    @property
    def remainder(self) -> Tensor:
        """``[classes]``: what is missing in the sum, the error of the quadrature."""
        return self.total - self.latents.sum(0) - self.rest


def attribute(logits: Callable[[Tensor], Tensor], x: Tensor, steps: Tensor, steered: Tensor) -> Attribution:
    """Share the change of the logits among the latents; see the module's formula.

    Args:
        logits: from activations ``[batch, d]`` to logits ``[batch, classes]``.
        x: the activation ``[d]``.
        steps: ``a_j d_j``, ``[m, d]``.
        steered: x̂ ``[d]``.
    """
    way = steps.sum(0)
    with torch.no_grad():
        before, between, after = logits(torch.stack([x, x + way, steered]))
    nodes, weights = np.polynomial.legendre.leggauss(_POINTS)
    times = torch.from_numpy((nodes + 1) / 2).to(x)
    gradient = x.new_zeros(len(before), len(x))  # averaged along the way
    for part, weight in zip(times.split(_AT_ONCE), torch.from_numpy(weights / 2).to(x).split(_AT_ONCE), strict=True):
        points = (x + part[:, None] * way).detach().requires_grad_()
        values = weight @ logits(points)
        for index, value in enumerate(values):
            gradient[index] += torch.autograd.grad(value, points, retain_graph=index + 1 < len(values))[0].sum(0)
    return Attribution((steps @ gradient.T).detach(), after - between, after - before)
