"""The decoder's directions: how near they come to each other, and whether other seeds find them again."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from vs2_plugin.arrays import spread

__all__ = ["Agreement", "agreement", "nearest_cosines"]

_ENTRIES = 1 << 24  # of a matrix of cosines that is assigned: 128 MB, some seconds
_BLOCK = 1 << 25  # of one that is looked at: 128 MB
_LOOKED_AT = 1 << 28  # in all: a large dictionary is stood for by some of its directions


def nearest_cosines(directions: Tensor, signed: bool = True) -> np.ndarray:
    """Return each direction's largest cosine with another one: ``[m]``, of all n, or of m that are evenly spread.

    Args:
        directions: ``[n, d]``, n at least 2.
        signed: whether the opposite direction is another one; where a latent's activation may be negative, it is not.
    """
    unit = F.normalize(directions.float(), dim=1)
    chosen = spread(len(unit), max(1, _LOOKED_AT // len(unit)))
    found = []
    for part in chosen.split(max(1, _BLOCK // len(unit))):
        cosines = unit[part] @ unit.T
        cosines = cosines if signed else cosines.abs()
        cosines[torch.arange(len(part)), part] = -torch.inf
        found.append(cosines.amax(1))
    return torch.cat(found).numpy()


class Agreement(NamedTuple):
    """Cosines of directions of one dictionary with the ones of another that they are assigned to."""

    cosines: np.ndarray
    """``[m]``."""
    random: np.ndarray
    """``[m]``: the same with random directions in place of the other dictionary's, as many and of the same mean and
    covariance."""


def agreement(one: Tensor, other: Tensor, signed: bool = True) -> Agreement:
    """Assign each direction of ``one`` another one of ``other``, so that the sum of cosines is the largest.

    Where the matrix of cosines would take more than 16.8 million entries, evenly spread directions stand for ``one``.

    Args:
        one: ``[n, d]``.
        other: ``[m, d]``.
        signed: as of :func:`nearest_cosines`.
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
