"""Latents by hand: chosen latents of each image are suppressed, weakened or boosted, and nothing else is changed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vs2_plugin.errors import ModelStringError
from vs2_plugin.files import json_digest
from vs2_plugin.sae.topk import TopKSAE
from vs2_plugin.settings import whole
from vs2_plugin.steering.batch import Batch
from vs2_plugin.steering.move import Code, Move

__all__ = ["ByHand", "factors_of"]

#: The factor of boosted latents, by default.
_BOOST = 2.0
#: The largest factor: beyond it, the rest of an activation is lost.
_LARGEST = 1000.0
#: The largest number of latents that results list one by one.
_LISTED = 100
_FORMAT = 'expected a JSON file such as {"12": 0, "99": 2.5}, which gives each latent its factor'


def factors_of(
    suppress: str | None, boost: str | None, factor: float | None, edits: str | None
) -> dict[int, float]:
    """Return latent -> the factor of its activation, from the options of a model string.

    Raises:
        ModelStringError: no latent is chosen, one is chosen twice, a value is wrong, or the file cannot be read.
    """
    if edits is not None:
        return _read(edits)
    if suppress is None and boost is None:
        raise ModelStringError("no latents are chosen; expected @suppress=12+99, @boost=5 or @edits=FILE.json")
    if factor is not None and boost is None:
        raise ModelStringError(f"option factor={factor:g} is for @boost=, and no latents to boost are given")
    pairs = [(latent, 0.0) for latent in (suppress or "").split("+") if latent]
    pairs += [(latent, _BOOST if factor is None else factor) for latent in (boost or "").split("+") if latent]
    return _each_once(pairs)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[int, float]:
    factors: dict[int, float] = {}
    for text, factor in pairs:
        latent = whole(text)
        if latent is None:
            raise ModelStringError(f"{text!r} is not the number of a latent")
        if latent in factors:
            raise ModelStringError(f"latent {latent} is chosen twice; expected each once")
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not abs(factor) <= _LARGEST:
            raise ModelStringError(
                f"latent {latent} has the factor {factor!r:.80}; expected a number from {-_LARGEST:g} to {_LARGEST:g}"
            )
        factors[latent] = float(factor)
    return factors


def _read(path: str) -> dict[int, float]:
    """Read latent -> factor from a JSON file. Raises ModelStringError if that is not possible."""
    try:
        pairs = json.loads(Path(os.path.expanduser(path)).read_text(encoding="utf-8"), object_pairs_hook=list)
        if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
            raise ModelStringError("it does not map latents to factors")
        if not pairs:
            raise ModelStringError("it names no latent")
        return _each_once(pairs)
    except (OSError, ValueError, RecursionError, ModelStringError) as error:
        raise ModelStringError(f"option edits={path!r}: {' '.join(str(error).split())}; {_FORMAT}") from None


class ByHand(nn.Module):
    """``x + Σ_j (f_j - 1) c_j w_j``: the activation c_j of each chosen latent times f_j; w_j is its decoder direction.

    A latent with f = 0 is suppressed. A latent that is not active in an image stays inactive, and an image in which no
    chosen latent is active is left alone, bit for bit. Unlike VS2, this does not restore the norm, which would scale
    the other latents too. At a tower's end that makes no difference, since a LayerNorm follows.
    """

    factors: Tensor
    chosen: Tensor
    replayable = True

    def __init__(self, sae: TopKSAE, factors: Mapping[int, float]) -> None:
        """Take ``factors``: latent -> f. Raises ModelStringError for a latent that the SAE does not have."""
        super().__init__()
        count, largest = sae.config.num_latents, max(factors)
        if largest >= count:
            raise ModelStringError(
                f"latent {largest} is chosen, but the SAE has {count} latents; expected numbers from 0 to {count - 1}, "
                "as vs2 inspect and vs2 latents show them"
            )
        latents = torch.tensor(list(factors), device=sae.W_dec.device)
        values = torch.tensor(list(factors.values()), device=sae.W_dec.device)
        self.sae = sae
        self.register_buffer("factors", values.new_ones(count).index_put((latents,), values))
        self.register_buffer("chosen", torch.zeros_like(self.factors, dtype=torch.bool).index_fill(0, latents, True))
        listed = {str(latent): factors[latent] for latent in sorted(factors)}
        words = "+".join(f"{latent}*{factor:g}" for latent, factor in listed.items())
        if len(listed) > _LISTED:
            words = f"{len(listed)} latents, sha256:{json_digest(listed)}"
        self.facts = {"factors": words}

    def forward(self, x: Tensor, batch: Batch) -> Move:
        """Return the move of activations ``[batch, d]``."""
        code = batch.code(self.sae, x)
        assert code.indices is not None  # the code of single activations has indices
        activations = code.values * self.chosen[code.indices]  # 0 for latents that are not chosen
        amounts = activations * (self.factors[code.indices] - 1)
        return Move(Code(self.sae, amounts, code.indices, activations), 1.0, keep_norm=False)
