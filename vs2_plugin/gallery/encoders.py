"""Retrieval encoders beside CLIP itself: any timm model, fed with the images that the harness has preprocessed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vs2_plugin.arrays import digest_of
from vs2_plugin.errors import CheckpointError, DataError
from vs2_plugin.text import reason_of

__all__ = ["TimmEncoder", "load_encoder", "split_name"]


def split_name(text: str) -> tuple[str, str | None]:
    """The model and the weights of ``MODEL`` (timm's own weights), ``MODEL,FILE``, or ``MODEL,`` (random weights).

    >>> split_name("vit_small_patch14_dinov2"), split_name("resnet10t,"), split_name("resnet10t,w.safetensors")
    (('vit_small_patch14_dinov2', None), ('resnet10t', ''), ('resnet10t', 'w.safetensors'))
    """
    model, comma, weights = text.partition(",")
    return model, weights if comma else None


class TimmEncoder(nn.Module):
    """A timm model without its classifier.

    The images come as CLIP's preprocessing leaves them. They are brought back to colours from 0 to 1 and to this
    model's own size and normalisation.
    """

    def __init__(self, model: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        import timm

        self.model = model
        config = timm.data.resolve_model_data_config(model)
        self.size = tuple(config["input_size"][-2:])
        self.mode = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
        for name, values in (("clip_mean", mean), ("clip_std", std), ("mean", config["mean"]), ("std", config["std"])):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        with torch.no_grad():  # timm's models tell their width in several ways
            #: e, the width of the embedding.
            self.width: int = model.eval()(torch.zeros(1, 3, *self.size)).shape[-1]

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings ``[batch, e]`` of images ``[batch, 3, height, width]``."""
        colours = (images.float() * self.clip_std + self.clip_mean).clamp(0, 1)
        if colours.shape[-2:] != self.size:
            colours = F.interpolate(colours, self.size, mode=self.mode, antialias=True, align_corners=False).clamp(0, 1)
        return self.model((colours - self.mean) / self.std).float()

    def facts(self, name: str, weights: str | None) -> dict[str, Any]:
        """What :func:`load_encoder` needs to load the very same encoder again."""
        return {
            "model": name,
            "weights": weights,
            "width": self.width,
            "parameters": digest_of(self.model.state_dict()),
        }


def load_encoder(
    name: str,
    weights: str | None,
    preprocessing: Mapping[str, Any],
    device: str | torch.device,
    expected: Mapping[str, Any] | None = None,
) -> TimmEncoder:
    """Load a timm model as a retrieval encoder.

    Args:
        name: its name.
        weights: a file; None for the weights that timm fetches; empty for random ones.
        preprocessing: CLIP's, with ``mean`` and ``std``.
        device: where it shall be.
        expected: the facts of the encoder that a gallery was made with.

    Raises:
        DataError: timm does not know it, or its weights cannot be had.
        CheckpointError: it is not the one that is expected.
    """
    import timm

    if weights and not Path(weights).is_file():
        raise DataError(f"no file {weights!r} with weights for the retrieval encoder {name}")
    # timm knows its own files, with or without a classifier, in older formats and newer ones.
    source = (
        {"pretrained": weights is None}
        if not weights
        else {"pretrained": True, "pretrained_cfg_overlay": {"file": weights}}
    )
    try:
        untrained = _create(name)
        model = _create(name, **source) if source["pretrained"] else untrained
    except Exception as error:  # whatever timm, the hub client or the network raised
        close = ", ".join(timm.list_models(f"*{name.split('.')[0]}*")[:5])
        known = f" (timm knows: {close})" if close else ", which timm does not know"
        raise DataError(
            f"could not load the retrieval encoder {name}{known}: {reason_of(error)}; without a network, "
            f"give a file of weights: {name},FILE"
        ) from error
    if weights:
        # timm takes what fits of a file, and says nothing of the rest.
        start = untrained.state_dict()
        left = [key for key, tensor in model.state_dict().items() if tensor.ndim > 1 and tensor.equal(start[key])]
        if left:
            raise DataError(
                f"{weights} does not hold the weights of the retrieval encoder {name}: {left[0]} and "
                f"{len(left) - 1} more are not in it"
            )
    encoder = TimmEncoder(model, preprocessing["mean"], preprocessing["std"]).to(device).eval()
    found = digest_of(model.state_dict())
    if expected is not None and expected["parameters"] != found:
        raise CheckpointError(
            f"the retrieval encoder {name} has other weights than the one that the gallery was made with (SHA-256 "
            f"{found[:12]}, expected {expected['parameters'][:12]})"
        )
    return encoder


def _create(name: str, **source: Any) -> nn.Module:
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # random weights are the same ones every time
        return timm.create_model(name, num_classes=0, **source)
