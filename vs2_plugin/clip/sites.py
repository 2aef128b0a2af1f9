"""Sites: where in a vision tower an activation is read or edited.

A site is named by its hookpoint, the path under the model of the module whose output holds the activation:

- ``visual.transformer.resblocks.11``: the CLS token after block 11 (counted from 0) of an open_clip
  ``VisionTransformer`` that pools by its CLS token;
- ``visual``: the tower's output embedding, for every other tower (average or attention pooling, timm trunks,
  ResNets), which have no CLS token to speak of.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor, nn

from vs2_plugin.errors import PluginError, TowerError

__all__ = [
    "OUTPUT",
    "Site",
    "Sites",
    "block_sites",
    "default_site",
    "Edit",
    "edit",
    "editing",
    "embedding_from",
    "find_site",
    "finish",
    "in_float32",
    "output_site",
    "paused",
    "reading",
]

OUTPUT = "visual"
_BLOCKS = "visual.transformer.resblocks"
#: Name, before a number, under which a steering module is attached to the module it steers; see :func:`edit`.
_ATTACHED = "vs2_steering"
#: Name under which a steered module holds the numbers of its edits that are switched off; see :func:`paused`.
_PAUSED = "_vs2_paused"
_NUMBERS = count()

Steering = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Site:
    """One place in one tower."""

    hookpoint: str
    """Path of the module under the model."""
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
        return "the output embedding" if self.token_dim is None else f"block {self.block}"

    def module(self, model: nn.Module) -> nn.Module:
        """The module of ``model`` whose output holds the activation."""
        return model.get_submodule(self.hookpoint)

    def read(self, output: Tensor | tuple) -> Tensor:
        """The activation ``[batch, d]`` in the module's output."""
        if self.token_dim is None:
            return output[0] if isinstance(output, tuple) else output
        return output.select(self.token_dim, 0)

    def write(self, output: Tensor | tuple, activation: Tensor) -> Tensor | tuple:
        """A copy of the module's output with the activation replaced."""
        if self.token_dim is None:
            return (activation, *output[1:]) if isinstance(output, tuple) else activation
        output = output.clone()
        output.select(self.token_dim, 0).copy_(activation)
        return output


def block_sites(model: nn.Module) -> list[Site]:
    """A site per transformer block, first to last; empty for a tower without a CLS token that is pooled."""
    visual = model.visual
    blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
    pools_cls = (
        blocks is not None
        and getattr(visual, "class_embedding", None) is not None
        and getattr(visual, "attn_pool", None) is None
        # open_clip before 2.21 has a flag in place of pool_type
        and getattr(visual, "pool_type", "avg" if getattr(visual, "global_average_pool", False) else "tok") == "tok"
    )
    if not pools_cls:
        return []
    # Blocks got [tokens, batch, d] in every open_clip 2.x before the attribute appeared, and do so when it is False.
    token_dim = 1 if getattr(visual.transformer, "batch_first", False) else 0
    width = visual.class_embedding.shape[-1]
    return [Site(f"{_BLOCKS}.{index}", width, token_dim) for index in range(len(blocks))]


def output_site(model: nn.Module) -> Site:
    """The tower's output embedding."""
    width = getattr(model.visual, "output_dim", None)
    return Site(OUTPUT, width if isinstance(width, int) else _probe_width(model))


def default_site(model: nn.Module) -> Site:
    """The last block, before the final LayerNorm and the projection; without a pooled CLS token, the output."""
    return (block_sites(model) or [output_site(model)])[-1]


def find_site(model: nn.Module, hookpoint: str) -> Site:
    """The site of that hookpoint.

    Raises:
        TowerError: this tower has no such site.
    """
    return output_site(model) if hookpoint == OUTPUT else _named(hookpoint, block_sites(model))


def _named(hookpoint: str, blocks: Sequence[Site]) -> Site:
    for site in blocks:
        if site.hookpoint == hookpoint:
            return site
    offered = (
        f"{blocks[0].hookpoint} to {blocks[-1].hookpoint}, and {OUTPUT}"
        if blocks
        else f"only {OUTPUT} (it pools no CLS token)"
    )
    raise TowerError(f"this vision tower has no site {hookpoint!r}; it has {offered}")


@dataclass(frozen=True)
class Sites:
    """All sites of one tower."""

    blocks: tuple[Site, ...]
    """As :func:`block_sites` gives them."""
    output: Site
    """The output embedding."""

    @classmethod
    def of(cls, model: nn.Module) -> Sites:
        """Those of a model."""
        return cls(tuple(block_sites(model)), output_site(model))

    @property
    def default(self) -> Site:
        """As :func:`default_site` gives it."""
        return self.blocks[-1] if self.blocks else self.output

    def find(self, hookpoint: str) -> Site:
        """As :func:`find_site`, with its error."""
        return self.output if hookpoint == OUTPUT else _named(hookpoint, self.blocks)

    def in_order(self, chosen: Collection[Site]) -> list[Site]:
        """The chosen sites, each once, in the order of the tower."""
        return [site for site in (*self.blocks, self.output) if site in chosen]


def embedding_from(model: nn.Module, site: Site, x: Tensor) -> Tensor:
    """The tower's output embedding ``[batch, embed_dim]`` (float32) from the activation ``[batch, d]`` at its default
    site: what is left of the tower after it."""
    if site.token_dim is None:
        return x.float()
    visual = model.visual
    dtype = next(visual.parameters()).dtype
    with torch.autocast(x.device.type, enabled=False):
        pooled = visual.ln_post(x.to(dtype)).float()
        return pooled if visual.proj is None else pooled @ visual.proj.float()


def finish(model: nn.Module, site: Site, x: Tensor) -> Tensor:
    """What ``encode_image`` makes of the activation ``[batch, d]`` at the tower's end: the default site or the output.

    The same operations on the same numbers as in the tower, but for the other tokens, so that the features are the
    same bit for bit, inside autocast and outside. (Where they are not, callers run the tower.)
    """
    if site.token_dim is None:
        return x
    pooled = model.visual.ln_post(x)
    return pooled if model.visual.proj is None else pooled @ model.visual.proj


@torch.no_grad()
def _probe_width(model: nn.Module) -> int:
    size = getattr(model.visual, "image_size", 224)
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    like = next(model.visual.parameters())
    was_training = model.visual.training
    output = model.visual.eval()(torch.zeros(1, 3, height, width, dtype=like.dtype, device=like.device))
    model.visual.train(was_training)
    return (output[0] if isinstance(output, tuple) else output).shape[-1]


def in_float32(steering: Steering, x: Tensor) -> Tensor:
    """Apply ``steering`` to ``[batch, d]`` in float32, inside any autocast, and return the dtype of ``x``."""
    with torch.autocast(x.device.type, enabled=False):
        steered = steering(x.float())
    if not isinstance(steered, Tensor) or steered.shape != x.shape:
        got = tuple(steered.shape) if isinstance(steered, Tensor) else type(steered).__name__
        raise PluginError(
            f"the steering method returned {got} for activations {tuple(x.shape)}; expected the same shape"
        )
    return steered.to(x.dtype)


def edit(model: nn.Module, site: Site, steering: Steering) -> Edit:
    """Steer the activation at ``site`` in every forward pass until the handle's ``remove()``.

    A steering that is an ``nn.Module`` is attached to the module it steers, so that it moves between devices with
    the model and that ``DataParallel`` replicates both together. It stays in float32 when the model is cast.
    """
    module = site.module(model)
    name = None
    if isinstance(steering, nn.Module):
        name = next(name for name in (f"{_ATTACHED}_{n}" for n in count()) if name not in module._modules)
        module.add_module(name, _Float32(steering))

    number = next(_NUMBERS)
    handle = Edit(module, name, number)

    def hook(module: nn.Module, args: object, output: Tensor | tuple) -> Tensor | tuple:
        if number in getattr(module, _PAUSED, ()):  # the module's own: a copy of the model is paused by itself
            return output
        current = module._modules[name] if name else steering  # the replica's own under DataParallel
        return site.write(output, in_float32(current, site.read(output)))

    handle.hook = module.register_forward_hook(hook)
    return handle


class _Float32(nn.Module):
    """A steering module that follows the model to another device, but not to another dtype."""

    def __init__(self, steering: nn.Module) -> None:
        super().__init__()
        self.steering = steering

    def _apply(self, fn: Callable, recurse: bool = True) -> _Float32:
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    def forward(self, x: Tensor) -> Tensor:
        return self.steering(x)


class Edit:
    """A steering in place. :meth:`remove` takes it out again."""

    def __init__(self, module: nn.Module, attached: str | None, number: int) -> None:
        self._module, self._attached, self._number = module, attached, number

    @property
    def paused(self) -> bool:
        """Whether the tower is, for now, as if this were not there."""
        return self._number in getattr(self._module, _PAUSED, ())

    @paused.setter
    def paused(self, value: bool) -> None:
        others = getattr(self._module, _PAUSED, frozenset()) - {self._number}
        setattr(self._module, _PAUSED, others | {self._number} if value else others)

    def remove(self) -> None:
        """Take out the hook and what was attached."""
        self.hook.remove()
        if self._attached:
            self._module._modules.pop(self._attached, None)


@contextmanager
def editing(model: nn.Module, site: Site, steering: Steering) -> Iterator[None]:
    """Steer at ``site`` within a ``with`` block."""
    handle = edit(model, site, steering)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def paused(edits: Sequence[Edit]) -> Iterator[None]:
    """Within the ``with`` block the tower is as if ``edits`` were not there."""
    before = [handle.paused for handle in edits]
    for handle in edits:
        handle.paused = True
    try:
        yield
    finally:
        for handle, was in zip(edits, before, strict=True):
            handle.paused = was


@contextmanager
def reading(
    model: nn.Module, sites: Iterable[Site], whole: bool = False
) -> Iterator[dict[Site, Tensor | tuple[Tensor, ...]]]:
    """Within the ``with`` block, each forward pass leaves the activations ``[batch, d]`` of ``sites`` in the dict; or,
    with ``whole``, all that their modules put out."""
    found: dict[Site, Tensor | tuple] = {}

    def recorder(site: Site):
        def hook(module: nn.Module, args: object, output: Tensor | tuple) -> None:
            found[site] = output if whole else site.read(output).detach()

        return hook

    handles = [site.module(model).register_forward_hook(recorder(site)) for site in sites]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
