"""Which settings the study looks at, and which methods it compares. No heavy imports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["CORRUPTIONS", "GROUPS", "HALVES", "METHODS", "SEEDS", "Setting", "Sizes", "settings"]

#: Half -> its sources, and its CLIPs beside the shipped one.
HALVES = {
    "development": (("printed digits", "capital letters"), ("small", "sans")),
    "report": (("handwritten digits", "small letters"), ("small", "serif")),
}
CORRUPTIONS = ("plain", "blurred", "noisy", "low contrast", "dimmed", "inverted", "rotated", "greyed")
GROUPS = ("centre", "CLIP", "classes", "gallery", "latents", "k")
SEEDS = 5

#: Name in the tables -> the model string without its backbone; None for what is no method of the package.
METHODS = {
    "zero-shot": None,
    "vs2": "vs2",
    "vs2 hindsight": None,
    "vs2 auto": "vs2@alpha=auto",
    "vs2 auto, prior": "vs2@alpha=auto",
    "vs2s": "vs2s",
    "vs2s p=2": "vs2s@p=2@alpha=auto",
    "pass": "pass",
    "pass auto": "pass@alpha=auto",
    "vs2pp": "vs2pp",
    "vs2pp brake": "vs2pp@n=10@brake=0.9",
    "vs2pp brake, auto": "vs2pp@n=10@brake=0.9@alpha=auto",
    "vs2pp brake, gate": "vs2pp@n=10@brake=0.9@gate=0.99",
    "vs2pp oracle": "vs2pp@n=10@labels=oracle",
    "knn": "knn@n=10",
    "linear probe": None,
    "centring": None,
}


class Sizes(NamedTuple):
    """How much is made."""

    steps: int
    """Training of a CLIP."""
    pool: int
    """Rendered images that galleries are drawn from."""
    test: int
    samples: int
    """Activations seen in the training of an SAE; 0 is the package's default."""


@dataclass(frozen=True)
class Setting:
    """One setting: what differs from the centre is what its group is about."""

    group: str
    clip: str
    source: str
    corruption: str
    size: int = 900
    """Unlabeled images in the gallery, as far as the pool has them."""
    classes: str = "balanced"
    """``1:10`` and ``1:100``: most to least frequent class, in gallery and test alike; ``half missing``."""
    latents: int = 512
    k: int = 16

    @property
    def name(self) -> str:
        """What it is called in files and tables."""
        factors = {
            "CLIP": f"CLIP {self.clip}",
            "classes": self.classes,
            "gallery": f"{self.size} images",
            "latents": f"{self.latents} latents",
            "k": f"k = {self.k}",
        }
        words = [self.source, self.corruption, *([factors[self.group]] if self.group in factors else [])]
        return ", ".join(words)


def settings(half: str, quick: bool = False) -> list[Setting]:
    """The settings of a half: one factor at a time around the centre. ``quick``: one or two of each group."""
    sources, clips = HALVES[half]
    found = []

    def add(group: str, corruptions: tuple[str, ...], clip: str = "tiny", **factor) -> None:
        for source in sources:
            found.extend(Setting(group, clip, source, corruption, **factor) for corruption in corruptions)

    add("centre", CORRUPTIONS)
    for clip in clips:
        add("CLIP", ("plain", "noisy", "rotated", "low contrast", "dimmed"), clip)
    for classes in ("1:10", "1:100", "half missing"):
        add("classes", ("plain", "dimmed", "rotated"), classes=classes)
    for size in (50, 100, 300):
        add("gallery", ("noisy", "rotated"), size=size)
    for latents in (128, 1024):
        add("latents", ("noisy", "rotated"), latents=latents)
    for k in (8, 32):
        add("k", ("noisy", "rotated"), k=k)
    if not quick:
        return found
    few = [setting for setting in found if setting.source == sources[0] and setting.corruption in ("plain", "noisy")]
    taken = [next(setting for setting in few if setting.group == group) for group in GROUPS]
    return [*taken, next(setting for setting in found if setting.source == sources[1])]
