"""An SAE on disk: a folder with ``cfg.json`` and ``sae.safetensors``, as EleutherAI sparsify reads and writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from vs2_plugin.errors import CheckpointError, SettingError
from vs2_plugin.sae.topk import SaeConfig, TopKSAE

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "load_sae", "save_sae"]

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae.safetensors"
# sparsify calls the ReLU variant "topk". It has no name for the other one, so it refuses such an SAE, as it should.
_ACTIVATION_NAMES = {"relu": "topk", "abs": "abs"}


def save_sae(sae: TopKSAE, folder: Path) -> None:
    """Write ``sae`` into ``folder``, which is made if need be."""
    config = sae.config
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().float().cpu().contiguous() for name, tensor in sae.state_dict().items()}
    (folder / WEIGHTS_FILE).write_bytes(save(weights))  # save_file's error on a full disk is no OSError
    facts = {
        "activation": _ACTIVATION_NAMES[config.activation],
        "expansion_factor": max(1, config.num_latents // config.d_in),
        "normalize_decoder": True,
        "num_latents": config.num_latents,
        "k": config.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": config.d_in,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(facts, indent=2) + "\n")


def load_sae(folder: Path | str) -> TopKSAE:
    """Read an SAE that this package or sparsify wrote, as float32 on the CPU, in evaluation mode.

    Raises:
        CheckpointError: a file is missing or damaged, the shapes disagree, or it is no plain top-k SAE.
    """
    folder = Path(folder)
    try:
        facts = json.loads((folder / CONFIG_FILE).read_text())
        weights = load_file(folder / WEIGHTS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"no readable SAE in {folder} ({CONFIG_FILE} and {WEIGHTS_FILE}): {error}") from error
    if not isinstance(facts, dict):
        raise CheckpointError(f"{folder / CONFIG_FILE} holds {type(facts).__name__}; expected an object")

    config = _config(folder, facts)
    with torch.device("meta"):
        sae = TopKSAE(config)
    expected = {name: tuple(tensor.shape) for name, tensor in sae.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if expected != found:
        raise CheckpointError(f"{folder / WEIGHTS_FILE} holds {found}; expected {expected}")
    if not all(torch.isfinite(tensor).all() for tensor in weights.values()):
        raise CheckpointError(f"{folder / WEIGHTS_FILE} holds values that are not finite; train the SAE again")
    sae.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    return sae.eval().requires_grad_(False)


def _config(folder: Path, facts: dict[str, Any]) -> SaeConfig:
    activation = str(facts.get("activation", "topk"))
    unsupported = [key for key in ("skip_connection", "transcode") if facts.get(key)]
    known = {name: ours for ours, name in _ACTIVATION_NAMES.items()}
    if unsupported or activation not in known:
        what = unsupported[0] if unsupported else f"activation {activation!r}"
        raise CheckpointError(f"the SAE in {folder} has {what}; expected a plain top-k SAE (activation topk or abs)")
    try:
        d_in = facts["d_in"]
        # sparsify writes 0 for "d_in times expansion_factor"
        num_latents = facts.get("num_latents") or d_in * facts["expansion_factor"]
        return SaeConfig(d_in, num_latents, facts["k"], known[activation])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} lacks {error}; expected d_in, num_latents and k") from error
    except SettingError as error:
        raise CheckpointError(f"{folder / CONFIG_FILE}: {error}") from error
