"""The figures of a dictionary, by the package's own functions, and what steering along it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array, vstack
from sources import Data
from torch import Tensor

from vs2_plugin.quality.codes import Codes
from vs2_plugin.quality.dictionary import agreement, nearest_cosines
from vs2_plugin.quality.meaning import monosemanticity, sparse_probes
from vs2_plugin.sae.topk import Latents, TopKSAE
from vs2_plugin.steering.builtin import STRENGTH, P
from vs2_plugin.steering.selective import class_selectivity, latent_weights
from vs2_plugin.strength import choose, neighbour_graph

STRENGTHS = (0.25, 0.5, 1.05, 2.0, 3.0, 5.0)
#: What ``auto`` chooses from.
ALPHAS, PS = STRENGTH[2].auto or (), P.auto or ()


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


def judge(found: Dictionary, data: Data) -> dict[str, float]:
    """Return the figures on test images, none of which a training has seen, and what steering gives there."""
    return {**figures(found, data), **steered(found, data)}


@torch.no_grad()
def figures(found: Dictionary, data: Data) -> dict[str, float]:
    """Return the figures on test images."""
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
    accuracy, constant = data.accuracy(x), data.accuracy(data.unlabeled.mean(0).expand_as(x))
    return {
        "explained": 1 - ((x - rebuilt).square().sum() / (x - x.mean(0)).square().sum()).item(),
        "l0": codes.l0, "dead": codes.dead, "dense": codes.dense,
        "ms": float(meaning.scores[there].mean()) if there.any() else float("nan"),
        "ms_above": float((meaning.scores[there] > np.quantile(meaning.shuffled[there], 0.95)).mean())
        if there.any() else float("nan"),
        "probe_1": probes[1].auc, "probe_5": probes[5].auc,
        "collinear": float(cosines.mean()), "doubled": float((cosines > 0.9).mean()),
        "kept": float((data.classes(rebuilt) == plain).mean()),
        "recovered": (data.accuracy(rebuilt) - constant) / (accuracy - constant),
        "zero_shot": accuracy,
    }  # fmt: skip


@torch.no_grad()
def steered(found: Dictionary, data: Data) -> dict[str, float]:
    """Return the accuracy with VS2, vs2s and centring, at each strength and at the one that unlabeled images tell."""
    mean, weights = data.unlabeled.mean(0), selective(found, data)
    both = data.unlabeled, data.test
    codes = [found.code(x) for x in both]
    plain = [code @ found.directions for code in codes]
    ways = {
        "vs2": {PS[0]: plain},
        "vs2s": {PS[0]: plain, PS[-1]: [code * weights @ found.directions for code in codes]},
        "centring": {PS[0]: [x - mean for x in both]},
    }
    told, graph = {}, neighbour_graph(data.embed(data.unlabeled))
    for name, by_p in ways.items():
        _, direction = by_p[max(by_p)]
        for alpha in STRENGTHS:
            told[f"{name}_{alpha:g}"] = data.accuracy(steer(data.test, direction, alpha))
        told[f"{name}_auto"] = automatic(by_p, data, graph)
    return told


def selective(found: Dictionary, data: Data) -> Tensor:
    """Return the factors ``[n]`` of latents in vs2s, which keep the mean length of the steering vectors."""
    code = found.code(data.unlabeled)
    probabilities = (100 * F.normalize(data.embed(data.unlabeled), dim=-1) @ data.classifier).softmax(1)
    every = torch.arange(code.shape[1]).expand_as(code)
    weights = latent_weights(class_selectivity(iter([(Latents(code, every), probabilities)]), code.shape[1]), PS[-1])
    before, after = ((one @ found.directions).norm(dim=1).mean() for one in (code, code * weights))
    return weights * before / after


def automatic(ways: Mapping[float, list[Tensor]], data: Data, graph: Tensor) -> float:
    """Return the accuracy at what ``auto`` chooses.

    Args:
        ways: p -> the directions of the unlabeled images and of the test images, ``[m, d]`` each.
        data: the images.
        graph: neighbours of the unlabeled ones.
    """
    candidates = [{"p": p, "alpha": alpha} for p, alpha in product(ways, ALPHAS)]
    classes = [data.classes(steer(data.unlabeled, ways[one["p"]][0], one["alpha"])) for one in candidates]
    chosen = choose(candidates, list(map(torch.from_numpy, classes)), graph, data.classifier.shape[1]).values
    return data.accuracy(steer(data.test, ways[float(chosen["p"])][1], float(chosen["alpha"])))


def together(dictionaries: list[Dictionary], data: Data) -> tuple[float, float, float]:
    """Return the mean cosine of assigned directions over all pairs, the share of at least 0.7, and the mean cosine of
    a random dictionary. Latents that no unlabeled image activates are left out."""
    alive = [found.directions[(found.code(data.unlabeled) != 0).any(0)] for found in dictionaries]
    pairs = [agreement(one, other) for number, one in enumerate(alive) for other in alive[number + 1 :]]
    values = [(pair.cosines.mean(), (pair.cosines >= 0.7).mean(), pair.random.mean()) for pair in pairs]
    mean, share, random = np.mean(values, axis=0).tolist()
    return mean, share, random
