"""The codes that an SAE gives to activations: one sparse matrix, from which most figures follow."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.sparse import csr_array

from vs2_plugin.sae.fit import DENSE
from vs2_plugin.sae.source import Source
from vs2_plugin.sae.topk import TopKSAE

__all__ = ["Codes", "encode"]


@dataclass(frozen=True)
class Codes:
    """Sparse codes of some activations, one per image."""

    matrix: csr_array
    """float32 ``[count, n]``; only active latents are stored."""

    @cached_property
    def counts(self) -> np.ndarray:
        """int64 ``[n]``: images in which a latent is active."""
        return np.bincount(self.matrix.indices, minlength=self.matrix.shape[1])

    @property
    def frequencies(self) -> np.ndarray:
        """``[n]``: share of the images in which a latent is active."""
        return np.asarray(self.counts / self.matrix.shape[0])

    @property
    def alive(self) -> np.ndarray:
        """bool ``[n]``: the latents that are active in some image."""
        return np.asarray(self.counts > 0)

    @property
    def l0(self) -> float:
        """Mean number of active latents per image."""
        return float(self.matrix.nnz / self.matrix.shape[0])

    @property
    def dead(self) -> float:
        """Share of the latents that are active in none of the images."""
        return float((self.counts == 0).mean())

    @property
    def dense(self) -> float:
        """Share of the latents that are active in more than a tenth of the images."""
        return float((self.frequencies > DENSE).mean())


@torch.no_grad()
def encode(sae: TopKSAE, source: Source, numbers: np.ndarray) -> Codes:
    """Encode some activations of a source.

    Args:
        sae: the SAE, on the device of the source.
        source: the activations.
        numbers: row numbers of the activations, int64 ``[count]``; the codes have the same order.
    """
    values, indices, lengths = [], [], []
    for x in source.every(numbers):
        latents = sae.encode(x)
        active = latents.values != 0
        values.append(latents.values[active].float().cpu().numpy())
        indices.append(latents.indices[active].to(torch.int32).cpu().numpy())
        lengths.append(active.sum(1).cpu().numpy())
    starts = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    shape = (len(numbers), sae.config.num_latents)
    return Codes(csr_array((np.concatenate(values), np.concatenate(indices), starts), shape=shape))
