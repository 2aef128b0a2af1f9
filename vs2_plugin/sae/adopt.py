"""Adopts an existing SAE in place of training one, and measures how well it fits the activations at hand."""

from __future__ import annotations

import time

import numpy as np

from vs2_plugin.errors import DataError
from vs2_plugin.sae.fit import HELD_OUT, fit_of
from vs2_plugin.sae.foreign import ForeignSAE
from vs2_plugin.sae.source import Device, Rows, Source
from vs2_plugin.sae.train import Figures, Trained

__all__ = ["adopt"]

#: The fewest activations on which an SAE is measured: two in each half.
_LEAST = 4


def adopt(found: ForeignSAE, activations: Rows, calibration: np.ndarray, *, device: Device = "cpu") -> Trained:
    """Return an existing SAE with its fit to activations ``[count, d]``, none of which it was trained on.

    FVU and its quantiles are measured on half of the activations, at most 10,000, drawn at random; dead latents are
    counted on the others, and principal components are of these, so that they too have not seen what they explain.

    Args:
        found: the SAE.
        activations: the activations that the SAE is to steer.
        calibration: bool ``[count]``: which activations the FVU quantiles are taken over.
        device: where to measure.

    Raises:
        CheckpointError: the SAE is for activations of another width.
        DataError: there are fewer than four activations, no drawn activation is in ``calibration``, all are equal, or
            some are not finite.
    """
    started = time.monotonic()
    source = Source(activations, device)
    found.require_width(source.shape[1])
    source.check()
    if len(activations) < _LEAST:
        raise DataError(f"{len(activations)} activations to measure the SAE on; expected at least {_LEAST}")
    order = np.random.default_rng(0).permutation(len(activations))
    half = min(HELD_OUT, -(-len(order) // 2))
    held, others = np.sort(order[:half]), order[half:]
    fit = fit_of(found.sae.to(device), source, held, held[calibration[held]], others)
    seconds = round(time.monotonic() - started, 2)
    figures = Figures(**vars(fit), train_count=0, held_out_count=len(held), steps=0, seconds=seconds)
    return Trained(found.sae.cpu(), source.mean, figures)
