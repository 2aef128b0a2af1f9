"""Sites: the places in a vision tower where an activation is read or edited.

A site is named by its hookpoint, the path within the model of the module whose output holds the activation:

- ``visual.transformer.resblocks.11``: the CLS token after block 11 (counted from 0) of an open_clip
  ``VisionTransformer`` that pools by its CLS token;
- ``visual``: the tower's output embedding, for every other tower (average or attention pooling, timm trunks,
  ResNets), which pools no CLS token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vs2_plugin.errors import TowerError

__all__ = ["OUTPUT", "ClipModel", "Output", "Site", "Sites", "embedding_from", "finish", "pooled_from",
           "pooled_mixtures"]  # fmt: skip

OUTPUT = "visual"
_BLOCKS = "visual.transformer.resblocks"

#: Output of a site's module: a tensor, or a tuple that begins with one.
Output = Tensor | tuple[Any, ...]


class ClipModel(nn.Module):
    """An open_clip model, or one with its interface. Declares these attributes for type checkers, as torch does not."""

    visual: Any
    encode_image: Callable[..., Tensor]
    encode_text: Callable[..., Tensor]


@dataclass(frozen=True)
class Site:
    """A place in a vision tower where an activation is read or edited."""

    hookpoint: str
    """Path of the module within the model."""
    width: int
    """d, the width of the activation."""
    token_dim: int | None = None
    """Which dimension of the output ``[batch, tokens, d]`` or ``[tokens, batch, d]`` counts tokens (1 or 0);
    None where the output is the embedding ``[batch, d]`` itself."""

    @property
    def block(self) -> int | None:
        """Number of the block, counted from 0; None at the output embedding."""
        return None if self.token_dim is None else int(self.hookpoint.rsplit(".", 1)[1])

    def __str__(self) -> str:
        if self.token_dim is not None:
            return f"block {self.block}"
        return "the output embedding" if self.hookpoint == OUTPUT else self.hookpoint

    def module(self, model: nn.Module) -> nn.Module:
        """Return the module of ``model`` whose output holds the activation."""
        return model.get_submodule(self.hookpoint)

    def read(self, output: Output) -> Tensor:
        """Return the activation ``[batch, d]`` in the module's output."""
        first: Tensor = output[0] if isinstance(output, tuple) else output
        return first if self.token_dim is None else first.select(self.token_dim, 0)

    def write(self, output: Output, activation: Tensor) -> Output:
        """Return a copy of the module's output with the activation replaced."""
        if self.token_dim is None:
            return (activation, *output[1:]) if isinstance(output, tuple) else activation
        assert isinstance(output, Tensor)
        output = output.clone()
        output.select(self.token_dim, 0).copy_(activation)
        return output


@dataclass(frozen=True)
class Sites:
    """All sites of one tower."""

    blocks: tuple[Site, ...]
    """Sites after the transformer blocks, first to last; empty for a tower that pools no CLS token."""
    output: Site

    @classmethod
    def of(cls, model: ClipModel) -> Sites:
        """Return the sites of an open_clip model. A tower that does not declare its output width is run once."""
        width = getattr(model.visual, "output_dim", None)
        output = Site(OUTPUT, width if isinstance(width, int) else _probe_width(model))
        return cls(_block_sites(model), output)

    @property
    def default(self) -> Site:
        """Site after the last block, before final LayerNorm and projection; the output if no CLS token is pooled."""
        return self.blocks[-1] if self.blocks else self.output

    def at_end(self, site: Site) -> bool:
        """Tell whether at most the final LayerNorm and the projection come after ``site``."""
        return site in (self.default, self.output)

    def find(self, hookpoint: str) -> Site:
        """Return the site with this hookpoint.

        Raises:
            TowerError: the tower has no such site.
        """
        for site in (*self.blocks, self.output):
            if site.hookpoint == hookpoint:
                return site
        offered = (
            f"{self.blocks[0].hookpoint} to {self.blocks[-1].hookpoint}, and {OUTPUT}"
            if self.blocks
            else f"only {OUTPUT} (it pools no CLS token)"
        )
        raise TowerError(f"this vision tower has no site {hookpoint!r}; it has {offered}")

    def in_order(self, chosen: Collection[Site]) -> list[Site]:
        """Return the chosen sites, each once, in the order of the tower."""
        return [site for site in (*self.blocks, self.output) if site in chosen]


def _block_sites(model: ClipModel) -> tuple[Site, ...]:
    visual = model.visual
    blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
    has_cls = getattr(visual, "class_embedding", None) is not None and getattr(visual, "attn_pool", None) is None
    if blocks is None or not has_cls or visual.pool_type != "tok":
        return ()
    # Without batch_first, the blocks' tensors are [tokens, batch, d].
    token_dim = 1 if getattr(visual.transformer, "batch_first", False) else 0
    width = visual.class_embedding.shape[-1]
    return tuple(Site(f"{_BLOCKS}.{index}", width, token_dim) for index in range(len(blocks)))


def embedding_from(model: ClipModel, site: Site, x: Tensor) -> Tensor:
    """Return the tower's output embedding ``[batch, embed_dim]`` (float32), from the activation ``x`` ``[batch, d]`` at
    its default site, by the final LayerNorm and the projection."""
    pooled = pooled_from(model, site, x)
    projection = None if site.token_dim is None else model.visual.proj
    with torch.autocast(x.device.type, enabled=False):
        return pooled if projection is None else pooled @ projection.float()


def pooled_from(model: ClipModel, site: Site, x: Tensor) -> Tensor:
    """Return the pooled activation ``[batch, d]`` (float32), after the final LayerNorm and before the projection."""
    if site.token_dim is None:
        return x.float()
    dtype = next(model.visual.parameters()).dtype
    with torch.autocast(x.device.type, enabled=False):
        pooled: Tensor = model.visual.ln_post(x.to(dtype)).float()
        return pooled


def pooled_mixtures(model: ClipModel, site: Site, vectors: Tensor, amounts: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return what :func:`pooled_from` makes of mixtures of a few vectors, again as mixtures, but for LayerNorm's bias.

    The mean is subtracted from each vector, and the variance of a mixture follows from inner products. None where the
    tower's last module has not the weight and eps of a LayerNorm.

    Args:
        vectors: float32 ``[images, m, d]``.
        amounts: ``[images, mixtures, m]``, of the vectors in each mixture.

    Returns:
        The new vectors and amounts, of the same shapes.
    """
    if site.token_dim is None:
        return vectors, amounts
    weight, eps = (getattr(model.visual.ln_post, name, None) for name in ("weight", "eps"))
    if weight is None or eps is None:
        return None
    centred = vectors - vectors.mean(2, keepdim=True)
    products = torch.bmm(centred, centred.mT) / vectors.shape[2]
    variance = (torch.bmm(amounts, products) * amounts).sum(2, keepdim=True)
    return centred * weight.float(), amounts / (variance + eps).sqrt()


def finish(model: ClipModel, site: Site, x: Tensor) -> Tensor:
    """Return the image features as ``encode_image`` does, from the activation ``[batch, d]`` at the tower's end.

    The operations are those of the tower, without the other tokens, so that the features are the same bit for bit,
    inside autocast and outside. (Where the bits differ, callers run the tower.)
    """
    if site.token_dim is None:
        return x
    pooled: Tensor = model.visual.ln_post(x)
    return pooled if model.visual.proj is None else pooled @ model.visual.proj


@torch.no_grad()
def _probe_width(model: ClipModel) -> int:
    size = getattr(model.visual, "image_size", 224)
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    like = next(model.visual.parameters())
    was_training = model.visual.training
    output = model.visual.eval()(torch.zeros(1, 3, height, width, dtype=like.dtype, device=like.device))
    model.visual.train(was_training)
    return int((output[0] if isinstance(output, tuple) else output).shape[-1])
