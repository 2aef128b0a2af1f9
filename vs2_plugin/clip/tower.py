"""The identity of a vision tower. No heavy imports, since checkpoints are read before a model is loaded."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Tower"]

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")  # of a function in a transform; differs between processes
#: Python modules that define activation functions.
_FUNCTIONS = ("torch.nn.modules.activation", "transformers.activations")


@dataclass(frozen=True)
class Tower:
    """The identity of a vision tower. An SAE fits only the tower that it was trained on."""

    parameters: str
    """SHA-256 over names, shapes, dtypes and bytes of the vision tower's parameters and buffers."""
    activations: list[str]
    """Sorted class names of the tower's activation functions (QuickGELU, GELU, …), which its weights do not show."""
    preprocessing: dict[str, Any]
    """Preprocessing of images: size, mean, std, interpolation, resize mode."""

    @classmethod
    def of(cls, model: nn.Module, transform: object) -> Tower:
        """Return the tower of an open_clip ``model`` whose images ``transform`` prepares."""
        from vs2_plugin.arrays import digest_of

        visual: Any = model.visual
        kinds = {
            type(module).__name__
            for module in visual.modules()
            if type(module).__name__ == "QuickGELU" or type(module).__module__ in _FUNCTIONS
        }
        preprocessing = getattr(visual, "preprocess_cfg", None) or {"transform": _ADDRESS.sub("", str(transform))}
        return cls(
            parameters=digest_of(visual.state_dict()),
            activations=sorted(kinds - {"MultiheadAttention"}),
            preprocessing=_plain(preprocessing),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the identity as plain JSON values."""
        return asdict(self)

    def difference(self, other: Tower) -> str | None:
        """Return words on how ``other``, the tower in use, differs from this one; None if the towers are the same."""
        if self.activations != other.activations:
            return (
                f"it was trained on a tower with {' and '.join(self.activations)}, this one has "
                f"{' and '.join(other.activations)}"
            )
        ours, theirs = self.preprocessing, other.preprocessing
        if ours != theirs:
            keys = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
            parts = [f"{key} {ours.get(key)}, not {theirs.get(key)}" for key in keys]
            return f"its images were preprocessed with {'; '.join(parts)}"
        if self.parameters != other.parameters:
            return (
                f"its vision tower had other parameters (SHA-256 {self.parameters[:12]}, this one has "
                f"{other.parameters[:12]})"
            )
        return None


def _plain(value: Any) -> Any:
    """Return ``value`` as JSON would give it back: tuples become lists, keys and other objects strings."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)
