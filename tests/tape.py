"""What stands for a CUDA graph where there is no GPU: the operations of some work, done again on the same tensors.

``pytest --replayed`` has it stand for all: models are then replayed from the third batch on, as on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_in_torch_dispatch_mode

from vs2_plugin.gallery.search import ExactSearch

#: Where it is looked up whether a batch can be replayed.
ASKING = ("model.steered", "testing.checks")


class _Recorder(TorchDispatchMode):
    """Does what it is told, and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        self.done.append((function, args, kwargs or {}, found))
        return found


def _tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, (list, tuple)):
        for part in found:
            yield from _tensors(part)


class Tape:
    """Stands for :class:`vs2_plugin.devices.Replayed`. As there, work is done twice and recorded; from then on its
    operations are done again without its Python, so that what this decides stays as it was."""

    def __init__(self, room: Any = None) -> None:
        self._calls = 0
        self._done: list[tuple[Any, Any, Any, Any]] = []
        self._thens: list[tuple[int, Callable[[], None]]] = []
        self._recorder: _Recorder | None = None

    @property
    def is_told(self) -> bool:
        return bool(self._done)

    def __call__(self, work: Callable[[], None]) -> None:
        self._calls += 1
        if self._calls < 3:
            return work()
        if not self.is_told:
            self._recorder = _Recorder()
            with self._recorder:
                work()
            self._done, self._recorder = self._recorder.done, None
        at = 0
        for until, then in [*self._thens, (len(self._done), lambda: None)]:
            for function, args, kwargs, before in self._done[at:until]:
                self._again(function, args, kwargs, before)
            then()
            at = until
        return None

    @staticmethod
    def _again(function: Any, args: Any, kwargs: Any, before: Any) -> None:
        returns = function._schema.returns
        if any(one.alias_info is not None and not one.alias_info.is_write for one in returns):
            return  # a view of what is there already
        with torch.autocast("cpu", enabled=False):  # what it had cast was
            found = function(*args, **kwargs)
        for old, new in zip(_tensors(before), _tensors(found), strict=True):
            if old is not new:  # else it was done in place
                old.copy_(new)

    def pause(self, then: Callable[[], None]) -> None:
        """See there; while it is recorded, nothing is waited for."""
        if self._recorder is None:
            return then()
        self._thens.append((len(self._recorder.done), then))
        return None


def stand_in(patch: pytest.MonkeyPatch) -> None:
    """Have tapes stand for graphs."""
    patch.setattr("torch.cuda.current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    patch.setattr("torch.cuda.graph_pool_handle", lambda: None)
    patch.setattr("torch.cuda.get_sync_debug_mode", lambda: 0)
    patch.setattr("torch.cuda.set_sync_debug_mode", lambda mode: None)
    patch.setattr("vs2_plugin.selection.partitions_fast", lambda: False)  # numpy's selection is no operation of torch's
    patch.setattr("vs2_plugin.model.replay.Replayed", Tape)


def replay_all(patch: pytest.MonkeyPatch) -> None:
    """Have all models replayed that a GPU would replay."""
    stand_in(patch)
    patch.setattr("vs2_plugin.steering.retriever.ScreenedSearch", ExactSearch)
    for module in ASKING:
        patch.setattr(f"vs2_plugin.{module}.can_replay", _can_replay)


def _can_replay(images: Tensor) -> bool:
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or is_in_torch_dispatch_mode())
