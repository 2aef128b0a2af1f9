"""Reads SAEs of other libraries as SAEs of this package, or says why it cannot, and writes SAEs for these libraries.

- EleutherAI sparsify: ``cfg.json`` and ``sae.safetensors``, which is how this package stores SAEs too;
- SAELens (top-k and abs-top-k): ``cfg.json`` and ``sae_weights.safetensors``, the encoder transposed;
- Prisma (top-k): ``config.json`` and ``weights.pt``, which is unpickled without executing code.

A converted SAE reconstructs as in its library, but for the order of sums (tests/sae/test_foreign.py).
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vs2_plugin.errors import CheckpointError, SettingError
from vs2_plugin.sae.files import CONFIG_FILE, WEIGHTS_FILE, assembled, load_sae, save_sae, write_files
from vs2_plugin.sae.topk import SaeConfig, TopKSAE

__all__ = ["WRITERS", "ForeignSAE", "find_foreign", "read_foreign", "write_saelens", "write_sparsify"]

_SAELENS_WEIGHTS = "sae_weights.safetensors"
_PRISMA_CONFIG, _PRISMA_WEIGHTS = "config.json", "weights.pt"
_EXPECTED = (
    f"{CONFIG_FILE} with {WEIGHTS_FILE} (sparsify) or {_SAELENS_WEIGHTS} (SAELens), or {_PRISMA_CONFIG} with "
    f"{_PRISMA_WEIGHTS} (Prisma)"
)
#: TransformerLens's names of the residual stream before and after a layer.
_RESIDUAL = re.compile(r"blocks\.(\d{1,4})\.hook_resid_(pre|post)")
#: The number of a block, at the end of a module's name.
_BLOCK = re.compile(r"(?:^|\.)(?:h|layers?|blocks?|resblocks)\.(\d{1,4})$")


@dataclass(frozen=True)
class ForeignSAE:
    """An SAE from the files of another library."""

    sae: TopKSAE
    library: str
    """Name of the library."""
    block: int | None
    """The block of the tower whose output the SAE reads, counted from 0; None where its files do not say."""
    model: str | None
    """Name of the model in the SAE's files; None where there is none."""

    def __str__(self) -> str:
        of = f", of {self.model}" if self.model else ""
        after = "" if self.block is None else f", of the activations after block {self.block}"
        return f"the SAE by {self.library}{of}{after}"

    def require_width(self, width: int) -> None:
        """Raise CheckpointError unless the SAE takes activations of this width."""
        own, other = self.sae.config.d_in, "--blocks or --model" if self.block is None else "--model"
        if own != width:
            raise CheckpointError(
                f"the SAE by {self.library} takes activations of width {own}, but those at this site have {width}; "
                f"expected an SAE for this site, or another {other}"
            )


def read_foreign(path: Path) -> ForeignSAE:
    """Read an SAE from its folder.

    Args:
        path: the folder of one SAE, or one that holds it, not the folder around several.

    Raises:
        CheckpointError: there is no SAE, its files are damaged, or this package cannot represent it.
    """
    if not path.is_dir():
        raise CheckpointError(f"no folder {str(path)!r}; expected one with {_EXPECTED}")
    libraries = find_foreign(path)
    if len(libraries) == 1:
        ((folder, library),) = libraries.items()
        return _LIBRARIES[library][1](folder)
    if libraries:
        names = ", ".join(folder.name for folder in libraries)
        raise CheckpointError(f"{path} holds several SAEs; name the folder of one: {names}")
    raise CheckpointError(f"no SAE in {path}: expected {_EXPECTED}")


def find_foreign(path: Path) -> dict[Path, str]:
    """Return each SAE folder, ``path`` itself or else those in it -> the library, recognised by its file names."""
    for folders in ([path], sorted(path.iterdir()) if path.is_dir() else []):
        libraries = {
            folder: library
            for folder in folders
            for library, (names, _) in _LIBRARIES.items()
            if all((folder / name).is_file() for name in names)
        }
        if libraries:
            return libraries
    return {}


def _read_sparsify(path: Path) -> ForeignSAE:
    match = _BLOCK.search(path.name.removesuffix(".pass"))  # this package's suffix for SAEs trained by PASS
    return ForeignSAE(load_sae(path), "sparsify", int(match[1]) if match else None, None)


def _read_saelens(path: Path) -> ForeignSAE:
    facts = _facts(path / CONFIG_FILE)
    facts = {**facts, **facts["metadata"]} if isinstance(facts.get("metadata"), dict) else facts
    try:
        weights = load_file(path / _SAELENS_WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path / _SAELENS_WEIGHTS} is not a readable weights file: {error}") from error
    return _convert(path / CONFIG_FILE, "SAELens", facts, weights)


def _read_prisma(path: Path) -> ForeignSAE:
    facts = _facts(path / _PRISMA_CONFIG)
    try:
        weights = torch.load(path / _PRISMA_WEIGHTS, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling an arbitrary file can raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path / _PRISMA_WEIGHTS} is not a readable weights file: {reason}") from error
    weights = weights.get("state_dict", weights) if isinstance(weights, dict) else {}
    return _convert(path / _PRISMA_CONFIG, "Prisma", facts, weights)


def _facts(file: Path) -> dict[str, Any]:
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not a readable SAE configuration: {error}") from error
    if not isinstance(facts, dict):
        raise CheckpointError(f"{file} holds {type(facts).__name__}; expected an object")
    return facts


def _convert(file: Path, library: str, facts: Mapping[str, Any], weights: Mapping[str, Any]) -> ForeignSAE:
    """Build the SAE of the weights ``W_enc`` ``[d, n]``, ``W_dec`` ``[n, d]``, ``b_enc`` and ``b_dec``."""
    activation, k = _activation(file, facts)
    block = _block(file, facts)
    _refuse_other_kinds(file, facts)
    config = _shape(file, weights, k, activation, str(facts.get("normalize_activations") or "none"))
    encoder, decoder, bias, b_dec = (weights[name].float() for name in ("W_enc", "W_dec", "b_enc", "b_dec"))
    encoder = encoder.T
    scaled = weights.get("scaling_factor")  # SAELens before version 6 multiplies codes by it, after fine-tuning
    if facts.get("finetuning_scaling_factor") and isinstance(scaled, Tensor) and not (scaled == 1).all():
        raise CheckpointError(
            f"the SAE in {file.parent} cannot be represented: it scales each latent by a factor of fine-tuning"
        )
    if not facts.get("apply_b_dec_to_input", True):  # W x + b is W (x - b_dec) + (b + W b_dec)
        bias = bias + encoder @ b_dec
    if facts.get("rescale_acts_by_decoder_norm"):  # the same SAE, with decoder rows of unit norm
        norm = decoder.norm(dim=1, keepdim=True)
        encoder, bias, decoder = encoder * norm, bias * norm[:, 0], decoder / norm
    values = {"encoder.weight": encoder, "encoder.bias": bias, "W_dec": decoder, "b_dec": b_dec}
    sae, model = assembled(config, values, f"the SAE in {file.parent}"), facts.get("model_name")
    return ForeignSAE(sae, library, block, model if isinstance(model, str) else None)


#: Library -> the files of its SAEs, and the function that reads them.
_LIBRARIES: dict[str, tuple[tuple[str, str], Callable[[Path], ForeignSAE]]] = {
    "sparsify": ((CONFIG_FILE, WEIGHTS_FILE), _read_sparsify),
    "SAELens": ((CONFIG_FILE, _SAELENS_WEIGHTS), _read_saelens),
    "Prisma": ((_PRISMA_CONFIG, _PRISMA_WEIGHTS), _read_prisma),
}


def _activation(file: Path, facts: Mapping[str, Any]) -> tuple[str, Any]:
    """Return this package's name for the SAE's activation, and its k. Raises CheckpointError for any other kind."""
    function = facts.get("activation_fn") or facts.get("activation_fn_str")
    arguments = facts.get("activation_fn_kwargs")
    arguments = arguments if isinstance(arguments, dict) else {}
    architecture = facts.get("architecture", "standard")
    if architecture == "standard" and function == "topk":  # SAELens before version 6, and Prisma
        architecture = "topk"
    names = {"topk": "relu", "abstopk": "abs"}
    if not isinstance(architecture, str) or architecture not in names:
        what = reprlib.repr(architecture) + (f" with {function}" if architecture == "standard" and function else "")
        raise CheckpointError(
            f"the SAE in {file.parent} has the architecture {what}, which does not keep a fixed number of active "
            "latents; expected topk or abstopk"
        )
    return names[architecture], facts.get("k", arguments.get("k"))


def _block(file: Path, facts: Mapping[str, Any]) -> int | None:
    """Return the block whose output the SAE reads; None where its files do not say. Raises CheckpointError for hooks
    that are not the residual stream after a block."""
    hook = facts.get("hook_name") or facts.get("hook_point")
    if not isinstance(hook, str) or not hook:
        return None
    match = _RESIDUAL.fullmatch(hook)
    if match and (match[2] == "post" or int(match[1])):
        return int(match[1]) - (match[2] == "pre")
    if "hook_" in hook:
        raise CheckpointError(
            f"the SAE in {file.parent} is for {hook}; expected one for the residual stream after a block, such as "
            "blocks.11.hook_resid_post"
        )
    match = _BLOCK.search(hook)
    return int(match[1]) if match else None


def _refuse_other_kinds(file: Path, facts: Mapping[str, Any]) -> None:
    reasons = {
        "is_transcoder": "it is a transcoder",
        "transcoder_with_skip_connection": "it has a skip connection",
        "use_patches_only": "it was trained on patches, but the CLS token is steered here",
    }
    reason = next((why for name, why in reasons.items() if facts.get(name)), None)
    if facts.get("reshape_activations", "none") != "none":
        reason = f"it reshapes activations ({reprlib.repr(facts['reshape_activations'])})"
    if facts.get("normalize_activations") in ("expected_average_only_in", True):
        reason = (
            "its activations are scaled by a factor that is not in its files; fold it in, with "
            "fold_activation_norm_scaling_factor of SAELens, and save it again"
        )
    if reason:
        raise CheckpointError(f"the SAE in {file.parent} cannot be represented: {reason}")


def _shape(file: Path, weights: Mapping[str, Any], k: Any, activation: str, normalized: str) -> SaeConfig:
    """Return the config of an SAE with these weights. Raises CheckpointError if their shapes do not fit together."""
    names = ("W_enc", "W_dec", "b_enc", "b_dec")
    lacking = [name for name in names if not isinstance(weights.get(name), Tensor)]
    if lacking:
        raise CheckpointError(f"the weights beside {file} lack {', '.join(lacking)}; expected {', '.join(names)}")
    shapes = {name: tuple(weights[name].shape) for name in names}
    latents, width = shapes["W_dec"] if len(shapes["W_dec"]) == 2 else (0, 0)
    if shapes != {"W_enc": (width, latents), "W_dec": (latents, width), "b_enc": (latents,), "b_dec": (width,)}:
        raise CheckpointError(f"the weights beside {file} do not match each other: {shapes}")
    if type(k) is not int:
        raise CheckpointError(f"{file}: k is {reprlib.repr(k)}; expected the number of active latents")
    try:
        return SaeConfig(width, latents, k, activation, normalized)
    except SettingError as error:
        raise CheckpointError(f"{file}: {error}") from error


def write_sparsify(sae: TopKSAE, folder: Path, *, model: str = "", block: int | None = None) -> None:
    """Write an SAE for sparsify, whose ``SparseCoder.load_from_disk`` reads the folder.

    ``model`` and ``block`` are ignored, since the format has no place for them: the folder's name tells the site.

    Raises:
        CheckpointError: sparsify cannot represent the SAE.
    """
    config = sae.config
    reason = ""
    if config.normalize_activations != "none":
        reason = f"normalises activations ({config.normalize_activations}), but sparsify's SAEs take them as they are"
    elif config.activation != "relu":
        reason = "keeps latents of largest magnitude with their signs, but sparsify's SAEs keep positive ones"
    if reason:
        raise CheckpointError(f"the SAE cannot be represented for sparsify: it {reason}; expected --format saelens")
    save_sae(sae, folder)


def write_saelens(sae: TopKSAE, folder: Path, *, model: str, block: int | None) -> None:
    """Write an SAE for SAELens, whose ``SAE.load_from_disk`` reads the folder.

    Args:
        sae: the SAE.
        folder: created if it is missing.
        model: SAELens's name of the model.
        block: the block whose output the SAE reads; None for the output embedding.
    """
    config = sae.config
    weights = {"W_enc": sae.encoder.weight.T, "b_enc": sae.encoder.bias, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    facts = {
        "architecture": "topk" if config.activation == "relu" else "abstopk",
        "d_in": config.d_in,
        "d_sae": config.num_latents,
        "k": config.k,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": config.normalize_activations,
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {
            "model_name": model,
            "hook_name": None if block is None else f"blocks.{block}.hook_resid_post",
            "sae_lens_version": "6.0.0",
        },
    }
    write_files(folder, _SAELENS_WEIGHTS, weights, facts)


#: Name of a format -> the function that writes an SAE in it.
WRITERS: dict[str, Callable[..., None]] = {"sparsify": write_sparsify, "saelens": write_saelens}
