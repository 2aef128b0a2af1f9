"""Measures how well an SAE fits activations."""

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
#: Activations on which principal components are computed, at most.
PCA_MAX = 10_000
_NONE = 1e-10  # of the largest eigenvalue: rounding can make a zero eigenvalue as large as this
_FEWEST = 4  # activations whose FVU gives quantiles
_DEAD_MAX = 100_000  # activations on which dead and dense latents are counted, at most


@dataclass(frozen=True)
class Fit:
    """Figures of how well an SAE fits activations."""

    fvu: float
    """``Σ‖x - x̃‖² / Σ‖x - mean‖²`` over held-out activations."""
    fvu_quantiles: dict[str, float]
    """Quantile, as text, -> per-sample FVU over held-out activations."""
    dead: float
    """Share of latents that are active in none of the activations not held out (at most 100,000 of them)."""
    dense: float
    """Share of latents that are active in more than a tenth of the activations that ``dead`` is counted on."""
    l0: float
    """Mean number of active latents per activation, over the activations that ``dead`` is counted on."""
    pca_fvu: float
    """FVU of k principal components over held-out activations; the components are of at most 10,000 others."""
    gamma: float
    """``‖μ‖/‖σ‖``, the mean activation's norm over the root of the total variance (arXiv 2605.31518)."""


def parted(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of the activations that a training with this seed holds out, and of the others, shuffled."""
    numbers = np.arange(count, dtype=np.int32 if count < 2**31 else np.int64)  # the largest array here
    order = np.random.default_rng(seed).permutation(numbers)
    held = min(HELD_OUT, count // 10)
    return order[:held], order[held:]


def fit_of(sae: TopKSAE, source: Source, held: np.ndarray, calibrated: np.ndarray, others: np.ndarray) -> Fit:
    """Measure how well an SAE fits activations, which are chosen by their numbers, int64 ``[m]`` each.

    Args:
        sae: on the device of the source.
        source: the activations.
        held: activations that the FVU is measured on.
        calibrated: activations that the FVU quantiles are taken over.
        others: shuffled activations, to count dead and dense latents on and to compute principal components of.

    Raises:
        DataError: ``calibrated`` has too few activations, or all activations in ``held`` are equal.
    """
    if len(calibrated) < min(_FEWEST, len(held)):
        raise DataError(
            f"{len(calibrated) or 'none'} of the held-out activations can be calibrated on, and quantiles need "
            f"{_FEWEST} or more; take more images of those data sets, or omit --calibrate_on"
        )
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
    """Return the FVU on the activations of the numbers ``held``, each divided by ``scale``.

    Raises:
        DataError: the activations are all equal.
    """
    origin = (source.read(held[:1]) / scale).double()  # sums of differences from it lose no digits
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
    """Return the FVU of each activation of the numbers ``chosen``: float64 on the CPU, ``[len(chosen)]``."""
    mean = source.mean.to(source.device)
    return torch.cat([sample_fvu(x, sae(x), mean) for x in source.every(chosen)]).double().cpu()


@torch.no_grad()
def _frequencies(sae: TopKSAE, source: Source, chosen: np.ndarray) -> Tensor:
    """Return the share of the activations numbered ``chosen`` in which each latent is active: float64 CPU, ``[n]``."""
    counts = torch.zeros(sae.config.num_latents, dtype=torch.long, device=source.device)
    for x in source.every(chosen):
        latents = sae.encode(x)
        counts += torch.bincount(latents.indices[latents.values != 0], minlength=len(counts))
    return counts.double().cpu() / len(chosen)


def pca_fvu(source: Source, fitted: np.ndarray, held: np.ndarray, components: int) -> float:
    """Return the FVU, on the activations numbered ``held``, of principal components of those numbered ``fitted``."""
    sample, rows = (source.read(numbers).double().cpu() for numbers in (fitted, held))
    mean = sample.mean(0)
    centred = sample - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    vectors = vectors[:, -components:][:, values[-components:] > _NONE * values[-1]]  # few images have fewer than k
    residual = rows - mean
    residual = residual - residual @ vectors @ vectors.T
    unexplained: float = (residual.square().sum() / (rows - rows.mean(0)).square().sum()).item()
    return unexplained
