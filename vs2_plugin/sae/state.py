"""Saves the state of a training to disk, from which an interrupted training continues."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vs2_plugin.arrays import digest_of
from vs2_plugin.files import atomic_file

__all__ = ["SavedState"]

_LOG = logging.getLogger(__name__)


class SavedState:
    """A file of tensors, which is rewritten at intervals.

    The file holds a digest of the tensors: a damaged file is treated as missing.
    """

    def __init__(self, path: Path, seconds: float, writes: bool = True) -> None:
        """
        Args:
            path: the file; its folder is created if it is missing.
            seconds: least time between two writes.
            writes: whether this process writes the file. All processes of a training read it.
        """
        self.path, self._seconds, self._writes = path, seconds, writes
        self._last, self._worth = time.monotonic(), False

    def read(self) -> dict[str, Tensor]:
        """Return the tensors by name, on the CPU; an empty dict if the file is missing or damaged."""
        try:
            with safe_open(self.path, "pt") as file:
                tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                written = file.metadata() or {}
        except (OSError, SafetensorError, ValueError):
            return {}
        self._worth = written.get("sha256") == digest_of(tensors)
        return tensors if self._worth else {}

    def is_due(self, last: bool) -> bool:
        """Return whether to write now: after the interval, and at the ``last`` step if there is a file already."""
        return self._writes and (time.monotonic() - self._last >= self._seconds or (last and self._worth))

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the tensors. A failure is only logged: the training goes on without a saved state."""
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(self.path) as scratch:
                save_file(held, scratch, {"sha256": digest_of(held)})
        except (OSError, SafetensorError) as error:
            _LOG.warning("the state of the training could not be saved: %s", error)
        self._last, self._worth = time.monotonic(), True
