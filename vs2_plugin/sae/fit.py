"""How well an SAE fits activations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vs2_plugin.errors import DataError
from vs2_plugin.sae.source import Source
from vs2_plugin.sae.topk import TopKSAE, sample_fvu

__all__ = ["DENSE", "HELD_OUT", "PCA_MAX", "QUANTILES", "Fit", "fit_of", "held_out_fvu", "parted", "pca_fvu"]

#: Quantiles of the held-out per-sample FVU that a checkpoint stores.
QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995)
#: Activations that are held out, at most.
HELD_OUT = 10_000
#: A latent is dense if more than this share of the activations activates it.
DENSE = 0.1
#: Activations that principal components are found on, at most.
PCA_MAX = 10_000
_NONE = 1e-10  # of the largest eigenvalue: what rounding leaves of none
_DEAD_MAX = 100_000  # activations looked at to count dead and dense latents


@dataclass(frozen=True)
class Fit:
    """How well an SAE fits."""

    fvu: float
    """``Σ‖x - x̃‖² / Σ‖x - mean‖²`` over held-out activations."""
    fvu_quantiles: dict[str, float]
    """Quantile, as text, -> per-sample FVU over held-out activations."""
    dead: float
    """Share of latents that no other activation (of at most 100,000) activates."""
    dense: float
    """Share of latents that more than a tenth of them activates."""
    l0: float
    """Active latents per activation, the mean over them."""
    pca_fvu: float
    """FVU over held-out activations of k principal components, found on at most 10,000 others."""
    gamma: float
    """``‖μ‖/‖σ‖``, the mean activation's norm over the root of the total variance (arXiv 2605.31518)."""


def parted(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which of ``count`` activations a training by that seed holds out, and the others, in random order."""
    numbers = np.arange(count, dtype=np.int32 if count < 2**31 else np.int64)  # all that grows with the images
    order = np.random.default_rng(seed).permutation(numbers)
    held = min(HELD_OUT, count // 10)
    return order[:held], order[held:]


def fit_of(sae: TopKSAE, source: Source, held: np.ndarray, calibrated: np.ndarray, others: np.ndarray) -> Fit:
    """Measure how well an SAE fits activations of these numbers, int64 ``[m]`` each.

    Args:
        sae: on the device of the source.
        source: the activations.
        held: those that the FVU is of.
        calibrated: those that its quantiles are of.
        others: those, in any order, by which dead and dense latents are counted.

    Raises:
        DataError: there are none to calibrate on, or all are equal.
    """
    if not len(calibrated):
        raise DataError("none of the activations to calibrate on is held out; take more images of those data sets")
    of_samples = _samples_fvu(sae, source, calibrated)
    frequencies = _frequencies(sae, source, np.sort(others[:_DEAD_MAX]))
    quantiles = torch.quantile(of_samples, torch.tensor(QUANTILES, dtype=torch.double)).tolist()
    return Fit(
        fvu=round(held_out_fvu(sae, source, held), 6),
        fvu_quantiles={f"{q:g}": round(value, 6) for q, value in zip(QUANTILES, quantiles, strict=True)},
        dead=round((frequencies == 0).double().mean().item(), 6),
        dense=round((frequencies > DENSE).double().mean().item(), 6),
        l0=round(frequencies.sum().item(), 4),
        pca_fvu=round(pca_fvu(source, np.sort(others[:PCA_MAX]), held, sae.config.k), 6),
        gamma=round(source.mean.double().norm().item() / source.variance**0.5, 6),
    )


@torch.no_grad()
def held_out_fvu(sae: TopKSAE, source: Source, held: np.ndarray, scale: float = 1.0) -> float:
    """FVU on the activations of the numbers ``held``, divided by ``scale``.

    Raises:
        DataError: they are all equal.
    """
    origin = (source.read(held[:1]) / scale).double()  # sums around it keep their digits
    total = torch.zeros_like(origin[0])
    unexplained, squares = 0.0, 0.0
    for rows in source.every(held):
        x = rows / scale
        unexplained += (x - sae(x)).double().pow(2).sum().item()
        shifted = x.double() - origin
        total, squares = total + shifted.sum(0), squares + shifted.pow(2).sum().item()
    variance = float(squares - (total.pow(2).sum() / len(held)).item())
    if variance <= 0:
        raise DataError(f"all {len(held)} held-out activations are equal; expected more, and more varied, images")
    return unexplained / variance


@torch.no_grad()
def _samples_fvu(sae: TopKSAE, source: Source, chosen: np.ndarray) -> Tensor:
    """Per-sample FVU of the activations of the numbers ``chosen``: float64 on the CPU, ``[len(chosen)]``."""
    mean = source.mean.to(source.device)
    return torch.cat([sample_fvu(x, sae(x), mean) for x in source.every(chosen)]).double().cpu()


@torch.no_grad()
def _frequencies(sae: TopKSAE, source: Source, chosen: np.ndarray) -> Tensor:
    """Share of the activations of the numbers ``chosen`` that activate each latent: float64 on the CPU, ``[n]``."""
    counts = torch.zeros(sae.config.num_latents, dtype=torch.long, device=source.device)
    for x in source.every(chosen):
        latents = sae.encode(x)
        counts += torch.bincount(latents.indices[latents.values != 0], minlength=len(counts))
    return counts.double().cpu() / len(chosen)


def pca_fvu(source: Source, fitted: np.ndarray, held: np.ndarray, components: int) -> float:
    """FVU on the activations of the numbers ``held`` of the principal components of those of the numbers ``fitted``."""
    known, rows = (source.read(numbers).double().cpu() for numbers in (fitted, held))
    mean = known.mean(0)
    centred = known - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    vectors = vectors[:, -components:][:, values[-components:] > _NONE * values[-1]]  # of few images there are few
    rest = rows - mean
    rest = rest - rest @ vectors @ vectors.T
    unexplained: float = (rest.square().sum() / (rows - rows.mean(0)).square().sum()).item()
    return unexplained
