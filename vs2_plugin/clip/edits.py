"""Read and edit the activations at a site of a vision tower while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import count
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vs2_plugin.clip.sites import Output, Site

__all__ = ["Edit", "editing", "in_float32", "is_hooked", "outputs", "paused", "reading"]

T = TypeVar("T")
#: Name, before a number, under which an edit is attached to the module whose output it changes.
_ATTACHED = "vs2_steering"


def in_float32(steer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply ``steer`` to ``[batch, d]`` in float32, inside any autocast, and return the dtype of ``x``."""
    with torch.autocast(x.device.type, enabled=False):
        return steer(x.float()).to(x.dtype)


class Edit(nn.Module):
    """An installed steering: a child of the module whose output it changes, and the handle that removes it.

    As a child, an edit moves between devices with the model, is replicated by ``DataParallel`` and copied with the
    model. It keeps its dtype when the model is cast, and adds nothing to the model's ``state_dict``.
    """

    def __init__(self, model: nn.Module, site: Site, steer: Callable[[Tensor], Tensor]) -> None:
        """Steer the activations ``[batch, d]`` at ``site`` in every forward pass until :meth:`remove`."""
        super().__init__()
        module = site.module(model)
        self.site, self.steer = site, steer
        #: While True, the edit changes nothing.
        self.paused = False
        #: Whether a forward pass has used the edit since this flag was last set to False.
        self.ran = False
        #: Whether to keep the activation as it was before the edit, in the tower's dtype, as :attr:`before`.
        self.keeping = False
        self.before: Tensor | None = None
        self.name = next(name for name in (f"{_ATTACHED}_{n}" for n in count()) if name not in module._modules)
        self._parent = (module,)  # in a tuple, as torch would make a module that is an attribute a child
        self._register_state_dict_hook(_leave_out)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_do_not_miss)  # type: ignore[no-untyped-call]
        module.add_module(self.name, self.train(module.training))
        self._handle = module.register_forward_hook(_Hook(self.name))

    @property
    def path(self) -> str:
        """Path of this edit within the model."""
        return f"{self.site.hookpoint}.{self.name}"

    def forward(self, output: Output) -> Output:
        """Return the module's output with the activation steered."""
        self.ran = True
        activation = self.site.read(output)
        if self.keeping:
            self.before = activation.detach()
        return self.site.write(output, in_float32(self.steer, activation))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Edit:
        super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)  # type: ignore[no-untyped-call]
        return self

    def remove(self) -> None:
        """Take the edit out of the model."""
        self._handle.remove()
        self._parent[0]._modules.pop(self.name, None)


class _Hook:
    """The forward hook of an edited module. It looks up the edit by name, since a copied module has its own edit."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, args: object, output: Output) -> Output:
        edit = module._modules[self.name]
        assert edit is not None
        return output if edit.paused else edit(output)


def is_hooked(module: nn.Module) -> bool:
    """Tell whether a module has hooks that every forward pass must call. Edits do not count if they treat all batches
    alike, which a true attribute ``replayable`` of the steering declares, and are neither paused nor keeping."""
    if module._forward_pre_hooks:
        return True
    for hook in module._forward_hooks.values():
        edit = module._modules[hook.name] if isinstance(hook, _Hook) else None
        if not isinstance(edit, Edit) or edit.paused or edit.keeping or not getattr(edit.steer, "replayable", False):
            return True
    return False


def _leave_out(edit: nn.Module, destination: dict[str, Any], prefix: str, metadata: object) -> None:
    for key in [key for key in destination if key.startswith(prefix)]:
        del destination[key]


def _do_not_miss(edit: nn.Module, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if _ATTACHED not in key]


@contextmanager
def editing(model: nn.Module, site: Site, steer: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Steer the activations at ``site`` within a ``with`` block."""
    handle = Edit(model, site, steer)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def paused(edits: Sequence[Edit]) -> Iterator[None]:
    """Switch ``edits`` off within a ``with`` block."""
    before = [handle.paused for handle in edits]
    for handle in edits:
        handle.paused = True
    try:
        yield
    finally:
        for handle, was in zip(edits, before, strict=True):
            handle.paused = was


def outputs(model: nn.Module, sites: Iterable[Site]) -> AbstractContextManager[dict[Site, Output]]:
    """Collect, within a ``with`` block, the whole outputs of the modules of ``sites`` in the latest forward pass."""
    return _recording(model, sites, lambda site, output: output)


def reading(model: nn.Module, sites: Iterable[Site]) -> AbstractContextManager[dict[Site, Tensor]]:
    """Collect, within a ``with`` block, the activations ``[batch, d]`` at ``sites`` in the latest forward pass."""
    return _recording(model, sites, lambda site, output: site.read(output).detach())


@contextmanager
def _recording(model: nn.Module, sites: Iterable[Site], take: Callable[[Site, Output], T]) -> Iterator[dict[Site, T]]:
    seen: dict[Site, T] = {}

    def keep(site: Site, module: nn.Module, args: object, output: Output) -> None:
        seen[site] = take(site, output)

    handles = [site.module(model).register_forward_hook(partial(keep, site)) for site in sites]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
