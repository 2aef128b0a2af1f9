"""Compares the decoder's directions with each other, and with those of SAEs trained by other seeds."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from vs2_plugin.arrays import spread

__all__ = ["Agreement", "agreement", "nearest_cosines"]

_ENTRIES = 1 << 24  # most entries of a matrix of cosines to assign: 128 MB, some seconds
_BLOCK = 1 << 25  # most entries of a matrix of cosines at a time: 128 MB
_LOOKED_AT = 1 << 28  # most cosines in all: of a large dictionary, some directions are compared with all


def nearest_cosines(directions: Tensor, signed: bool = True) -> np.ndarray:
    """Return each direction's largest cosine with another one: ``[m]``, for all n, or for m evenly spread ones.

    Args:
        directions: ``[n, d]``, n at least 2.
        signed: whether opposite directions count as different; False for latents whose activation may be negative.
    """
    unit = F.normalize(directions.float(), dim=1)
    chosen = spread(len(unit), max(1, _LOOKED_AT // len(unit)))
    largest = []
    for part in chosen.split(max(1, _BLOCK // len(unit))):
        cosines = unit[part] @ unit.T
        cosines = cosines if signed else cosines.abs()
        cosines[torch.arange(len(part)), part] = -torch.inf
        largest.append(cosines.amax(1))
    return torch.cat(largest).numpy()


class Agreement(NamedTuple):
    """Cosines between the directions of one dictionary and those assigned to them from another."""

    cosines: np.ndarray
    """``[m]``: cosines with the other dictionary's directions."""
    random: np.ndarray
    """``[m]``: cosines with as many random directions of the same mean and covariance as the other dictionary's."""


def agreement(one: Tensor, other: Tensor, signed: bool = True) -> Agreement:
    """Assign each direction of ``one`` a different one of ``other``, so that the sum of cosines is largest.

    Where the matrix of cosines would have more than 16.8 million entries, only evenly spread directions of ``one`` are
    used.

    Args:
        one: directions ``[n, d]``.
        other: directions ``[m, d]``.
        signed: as in :func:`nearest_cosines`.
    """
    one, other = F.normalize(one.float(), dim=1), F.normalize(other.float(), dim=1)
    one = one[spread(len(one), max(1, _ENTRIES // len(other)))]
    return Agreement(*(_assigned(one, directions, signed) for directions in (other, _random_like(other))))


def _assigned(one: Tensor, other: Tensor, signed: bool) -> np.ndarray:
    cosines = (one @ other.T).numpy()
    cosines = cosines if signed else abs(cosines)
    return np.asarray(cosines[linear_sum_assignment(cosines, maximize=True)])


def _random_like(directions: Tensor) -> Tensor:
    """Return unit vectors drawn from the normal distribution with the mean and covariance of ``[m, d]``."""
    wide = directions.double()
    mean = wide.mean(0)
    centred = wide - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(wide))
    normal = torch.from_numpy(np.random.default_rng(0).standard_normal(tuple(wide.shape)))
    return F.normalize(mean + normal * values.clamp_min(0).sqrt() @ vectors.T, dim=1).float()
