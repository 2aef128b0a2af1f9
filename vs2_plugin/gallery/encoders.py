"""Retrieval encoders beside CLIP itself: any timm model, fed with the images that the harness has preprocessed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from vs2_plugin.arrays import digest_of
from vs2_plugin.errors import CheckpointError, DataError
from vs2_plugin.gallery.contents import RetrievalEncoder
from vs2_plugin.hub import require_hub
from vs2_plugin.seeds import seeded
from vs2_plugin.text import reason_of

__all__ = ["TimmEncoder", "load_encoder"]


class TimmEncoder(nn.Module):
    """A timm model without its classifier.

    Input images have passed CLIP's preprocessing. They are converted back to colours from 0 to 1, and then to this
    model's own size and normalisation.
    """

    clip_mean: Tensor
    clip_std: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        """``mean`` and ``std``: of CLIP's normalisation, one number per colour."""
        super().__init__()
        self.model = model
        config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
        self.size = tuple(config["input_size"][-2:])
        self.mode = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
        for name, values in (("clip_mean", mean), ("clip_std", std), ("mean", config["mean"]), ("std", config["std"])):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        with torch.no_grad():  # timm's models name their width in several ways
            #: e, the width of the embedding.
            self.width: int = model.eval()(torch.zeros(1, 3, *self.size)).shape[-1]

    def forward(self, images: Tensor) -> Tensor:
        """Return embeddings ``[batch, e]`` of images ``[batch, 3, height, width]``."""
        colours = (images.float() * self.clip_std + self.clip_mean).clamp(0, 1)
        if colours.shape[-2:] != self.size:
            colours = F.interpolate(colours, self.size, mode=self.mode, antialias=True, align_corners=False).clamp(0, 1)
        embeddings: Tensor = self.model((colours - self.mean) / self.std)
        return embeddings.float()

    def identity(self, name: str, weights: str | None) -> RetrievalEncoder:
        """Return the record with which :func:`load_encoder` loads the same encoder again."""
        return RetrievalEncoder(self.width, name, weights, digest_of(self.model.state_dict()))


def load_encoder(
    name: str,
    weights: str | None,
    preprocessing: Mapping[str, Any],
    device: str | torch.device,
    expected: RetrievalEncoder | None = None,
) -> TimmEncoder:
    """Load a timm model as a retrieval encoder.

    Args:
        name: timm's name of the model.
        weights: a file of weights; None for the weights that timm fetches; empty for random ones.
        preprocessing: CLIP's preprocessing, with ``mean`` and ``std``.
        device: device of the encoder.
        expected: the encoder that a gallery was made with.

    Raises:
        DataError: timm does not know the model, or its weights cannot be loaded.
        CheckpointError: the weights are not those of the expected encoder.
    """
    if weights and not Path(weights).is_file():
        raise DataError(f"no file {weights!r} with weights for the retrieval encoder {name}")
    try:
        model = _create(name, weights)
    except Exception as error:  # whatever timm, the hub client or the network raised
        raise DataError(f"could not load the retrieval encoder {name}{_why(name, weights, error)}") from error
    if weights:
        _check_file(model, name, weights)
    encoder = TimmEncoder(model, preprocessing["mean"], preprocessing["std"]).to(device).eval()
    if expected is not None:
        parameters = digest_of(model.state_dict())
        if expected.parameters != parameters:
            raise CheckpointError(
                f"the retrieval encoder {name} has other weights than the one that the gallery was made with (SHA-256 "
                f"{parameters[:12]}, expected {str(expected.parameters)[:12]})"
            )
    return encoder


def _why(name: str, weights: str | None, error: Exception) -> str:
    """Return words on why an encoder could not be loaded, and on what mends it."""
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        close = ", ".join(timm.list_models(f"*{architecture}*")[:5] or ["resnet50", "vit_small_patch14_dinov2"])
        return f", which timm does not know; expected one of timm.list_models(), for example {close}"
    if weights:
        return f" from {weights} ({reason_of(error)}); expected a file with weights of this model"
    return f": {reason_of(error)}; without a network, give a file of weights: {name},FILE"


def _create(name: str, weights: str | None) -> nn.Module:
    config = timm.get_pretrained_cfg(name) if weights is None else None
    if config and config.hf_hub_id:
        require_hub(config.hf_hub_id)
    source: dict[str, Any] = {"pretrained": weights != ""}
    if weights:  # timm reads its own files, with or without a classifier, in older and newer formats
        source["pretrained_cfg_overlay"] = {"file": weights}
    with seeded(0):  # the same random weights each time
        model: nn.Module = timm.create_model(name, num_classes=0, **source)
    return model


def _check_file(model: nn.Module, name: str, weights: str) -> None:
    """Raise DataError for a file that does not fill the model, since timm loads what fits and ignores the rest."""
    untrained = _create(name, "").state_dict()
    left = [key for key, tensor in model.state_dict().items() if tensor.ndim > 1 and tensor.equal(untrained[key])]
    if left:
        raise DataError(
            f"{weights} does not hold the weights of the retrieval encoder {name}: {left[0]} and {len(left) - 1} more "
            "are not in it"
        )
