"""The figures of a dictionary, by the package's own functions, and what steering along it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array, vstack
from sources import Data
from torch import Tensor

from vs2_plugin.quality.codes import Codes
from vs2_plugin.quality.dictionary import agreement, nearest_cosines
from vs2_plugin.quality.meaning import monosemanticity, sparse_probes
from vs2_plugin.sae.topk import TopKSAE

STRENGTHS = (0.25, 0.5, 1.05, 2.0, 3.0, 5.0)


@dataclass(frozen=True)
class Dictionary:
    """An SAE of any kind."""

    code: Callable[[Tensor], Tensor]
    """``[batch, d]`` to dense codes ``[batch, n]``."""
    directions: Tensor
    """``[n, d]``, unit norm."""
    bias: Tensor
    """``[d]``."""

    @classmethod
    def of(cls, sae: TopKSAE) -> Dictionary:
        """Return that of one of this package."""

        def code(x: Tensor) -> Tensor:
            latents = sae.encode(x)
            return x.new_zeros(len(x), sae.config.num_latents).scatter_(1, latents.indices, latents.values)

        return cls(code, sae.W_dec.detach(), sae.b_dec.detach())


def steer(x: Tensor, direction: Tensor, alpha: float) -> Tensor:
    """``x + alpha v``, with the norm of x."""
    moved = x + alpha * direction
    return F.normalize(moved, dim=-1) * x.norm(dim=-1, keepdim=True)


@torch.no_grad()
def judge(found: Dictionary, data: Data) -> dict[str, float]:
    """Return the figures on test images, none of which a training has seen."""
    x = data.test
    dense = found.code(x)
    rebuilt = dense @ found.directions + found.bias
    known = csr_array(found.code(data.unlabeled).numpy())
    codes = Codes(csr_array(dense.numpy()))
    meaning = monosemanticity(codes.matrix, data.embed(x).numpy())
    there = ~np.isnan(meaning.scores)
    labels = np.concatenate([data.unlabeled_labels, data.labels])
    fitted = np.arange(len(labels)) < len(data.unlabeled_labels)
    probes = sparse_probes(csr_array(vstack([known, codes.matrix])), labels, fitted, ~fitted, least=2)
    cosines = nearest_cosines(found.directions)
    plain = data.classes(x)
    figures = {
        "explained": 1 - ((x - rebuilt).square().sum() / (x - x.mean(0)).square().sum()).item(),
        "l0": codes.l0, "dead": codes.dead, "dense": codes.dense,
        "ms": float(meaning.scores[there].mean()) if there.any() else float("nan"),
        "ms_above": float((meaning.scores[there] > np.quantile(meaning.shuffled[there], 0.95)).mean())
        if there.any() else float("nan"),
        "probe_1": probes[1].auc, "probe_5": probes[5].auc,
        "collinear": float(cosines.mean()), "doubled": float((cosines > 0.9).mean()),
        "kept": float((data.classes(rebuilt) == plain).mean()),
    }  # fmt: skip
    mean = data.unlabeled.mean(0)
    figures["zero_shot"] = data.accuracy(x)
    for alpha in STRENGTHS:
        figures[f"vs2_{alpha:g}"] = data.accuracy(steer(x, dense @ found.directions, alpha))
        figures[f"centring_{alpha:g}"] = data.accuracy(steer(x, x - mean, alpha))
    return figures


def together(dictionaries: list[Dictionary], data: Data) -> tuple[float, float, float]:
    """Return the mean cosine of assigned directions over all pairs, the share of at least 0.7, and the mean cosine of
    a random dictionary. Latents that no unlabeled image activates are left out."""
    alive = [found.directions[(found.code(data.unlabeled) != 0).any(0)] for found in dictionaries]
    pairs = [agreement(one, other) for number, one in enumerate(alive) for other in alive[number + 1 :]]
    values = [(pair.cosines.mean(), (pair.cosines >= 0.7).mean(), pair.random.mean()) for pair in pairs]
    mean, share, random = np.mean(values, axis=0).tolist()
    return mean, share, random
