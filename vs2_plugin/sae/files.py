"""An SAE on disk: a folder with ``cfg.json`` and ``sae.safetensors``, as EleutherAI sparsify reads and writes it."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from vs2_plugin.errors import CheckpointError, SettingError
from vs2_plugin.sae.topk import SaeConfig, TopKSAE

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "assembled", "load_sae", "save_sae", "write_files"]

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae.safetensors"
# Activation and normalisation -> the name in cfg.json. "topk" is sparsify's, for top-k with a ReLU. The other names are
# ours: sparsify does not know them, and so rightly refuses such an SAE.
_NAMES = {
    (activation, normalized): name + ("" if normalized == "none" else f"+{normalized}")
    for activation, name in (("relu", "topk"), ("abs", "abs"))
    for normalized in ("none", "layer_norm", "constant_norm_rescale")
}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_LARGEST = 2**31 - 1  # width, or number of latents, at most


def save_sae(sae: TopKSAE, folder: Path) -> None:
    """Write ``sae`` into ``folder``, which is created if it is missing."""
    config = sae.config
    facts = {
        "activation": _NAMES[config.activation, config.normalize_activations],
        "expansion_factor": max(1, config.num_latents // config.d_in),
        "normalize_decoder": True,
        "num_latents": config.num_latents,
        "k": config.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": config.d_in,
    }
    write_files(folder, WEIGHTS_FILE, sae.state_dict(), facts)


def write_files(folder: Path, file: str, weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write weights, as float32, to ``file`` and facts to ``cfg.json`` in ``folder``, which is created if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in weights.items()}
    (folder / file).write_bytes(save(tensors))  # save_file's error on a full disk is no OSError
    (folder / CONFIG_FILE).write_text(json.dumps(facts, indent=2) + "\n")


def load_sae(folder: Path | str) -> TopKSAE:
    """Read an SAE that this package or sparsify wrote, as float32 on the CPU, in evaluation mode.

    Raises:
        CheckpointError: a file is missing or damaged, the shapes disagree, or the SAE is no plain top-k SAE.
    """
    folder = Path(folder)
    try:
        facts = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS_FILE)
    except (OSError, ValueError, RecursionError, SafetensorError, AttributeError) as error:  # Attribute: a new dtype
        raise CheckpointError(f"no readable SAE in {folder} ({CONFIG_FILE} and {WEIGHTS_FILE}): {error}") from error
    if not isinstance(facts, dict):
        raise CheckpointError(f"{folder / CONFIG_FILE} holds {type(facts).__name__}; expected an object")

    config = _config(folder, facts)
    _require_shapes(folder / WEIGHTS_FILE, config, weights)
    return assembled(config, weights, f"{folder / WEIGHTS_FILE}")


def assembled(config: SaeConfig, weights: Mapping[str, Tensor], where: str) -> TopKSAE:
    """Build an SAE in evaluation mode from weights of the right shapes. Raises CheckpointError if any is not finite."""
    weights = {name: tensor.float().contiguous() for name, tensor in weights.items()}
    if not all(torch.isfinite(tensor).all() for tensor in weights.values()):
        raise CheckpointError(f"{where} holds values that are not finite; train the SAE again")
    with torch.device("meta"):
        sae = TopKSAE(config)
    sae.load_state_dict(weights, assign=True)
    return sae.eval().requires_grad_(False)


def _config(folder: Path, facts: dict[str, Any]) -> SaeConfig:
    activation = facts.get("activation", "topk")
    if facts.get("signed") and activation == "topk":  # how early versions of sparsify write "abs"
        activation = "abs"
    unsupported = [key for key in ("skip_connection", "transcode") if facts.get(key)]
    supported = {name: ours for ours, name in _NAMES.items()}
    if unsupported or not isinstance(activation, str) or activation not in supported:
        what = unsupported[0] if unsupported else f"activation {reprlib.repr(activation)}"
        raise CheckpointError(f"the SAE in {folder} has {what}; expected a plain top-k SAE (activation topk or abs)")
    d_in = _whole(folder, facts, "d_in")
    # sparsify writes num_latents 0 where the number is d_in times expansion_factor
    size_key = "num_latents" if facts.get("num_latents") else "expansion_factor"
    num_latents = _whole(folder, facts, size_key) * (1 if size_key == "num_latents" else d_in)
    try:
        return SaeConfig(d_in, num_latents, _whole(folder, facts, "k"), *supported[activation])
    except SettingError as error:
        raise CheckpointError(f"{folder / CONFIG_FILE}: {error}") from error


def _whole(folder: Path, facts: dict[str, Any], name: str) -> int:
    """Return ``facts[name]``. Raises CheckpointError unless it is a positive int: a str times an int is no error."""
    if name not in facts:
        raise CheckpointError(f"{folder / CONFIG_FILE} lacks {name!r}; expected d_in, num_latents and k")
    value = facts[name]
    if type(value) is not int or not 0 < value <= _LARGEST:
        shown = reprlib.repr(value)
        raise CheckpointError(f"{folder / CONFIG_FILE}: {name} is {shown}; expected a whole number, 1 to {_LARGEST}")
    return value


def _require_shapes(path: Path, config: SaeConfig, weights: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if the weights do not have the shapes of ``config``, before memory for an SAE is taken."""
    latents, width = config.num_latents, config.d_in
    expected = {"W_dec": (latents, width), "encoder.weight": (latents, width), "encoder.bias": (latents,)}
    expected["b_dec"] = (width,)
    for name in sorted(expected.keys() | weights.keys()):
        shape = tuple(weights[name].shape) if name in weights else "nothing"
        if shape != expected.get(name):
            raise CheckpointError(f"{path}: {name} holds {shape}; expected {expected.get(name, 'no such tensor')}")
        if weights[name].dtype not in _FLOATS:
            raise CheckpointError(f"{path}: {name} holds {weights[name].dtype}; expected floating-point numbers")
