"""The settings of an SAE's training, with their defaults."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from vs2_plugin.documented import documented
from vs2_plugin.errors import SettingError
from vs2_plugin.settings import setting, validate

__all__ = ["RECIPES", "TrainConfig"]


@documented
@dataclass(frozen=True)
class TrainConfig:
    """The settings of an SAE's training.

    Raises:
        SettingError: a value outside its range.
    """

    expansion_factor: int = setting(4, minimum=1, maximum=1024, help="latents per dimension of the activations")
    """n = expansion_factor · d latents."""
    k: int = setting(64, minimum=1, maximum=1_000_000, help="active latents per activation")
    activation: str = setting(
        "relu", choices=("relu", "abs"), help="relu, or abs: top-k of the magnitude, without ReLU and encoder bias"
    )
    lr: float = setting(3e-3, minimum=1e-9, maximum=1, help="peak learning rate of Adam")
    warmup: float = setting(
        0.05, minimum=0, maximum=1,
        help="share of the steps over which the rate rises from 0; it then falls linearly to 0",
    )  # fmt: skip
    samples: int = setting(
        0, minimum=0, maximum=10**12,
        help="activations seen in training, repeats included; 0: set by the size of the data set",
    )  # fmt: skip
    """0 means 200 per stored activation, but at least 200,000 and at most 1,000,000."""
    sae_batch_size: int = setting(
        0, minimum=0, maximum=10**7, help="activations per step; 0: set by the size of the data set"
    )
    """0 means an eighth of the stored activations, but at least 64 and at most 1024. Any other value is at least 2."""
    auxk: float = setting(
        1 / 32, minimum=0, maximum=100, help="weight of the loss that revives dead latents (arXiv 2406.04093); 0: off"
    )
    init: str = setting(
        "data", choices=("data", "random"),
        help="decoder directions to start from: differences of activations (data), or random ones",
    )  # fmt: skip
    """data: unit-norm differences of random training activations, with encoder rows half as long, so that overlapping
    latents do not overshoot; random: random unit vectors, equal in encoder and decoder."""
    pass_weight: float = setting(
        0.0, minimum=0, maximum=1000,
        help="PASS (arXiv 2506.01247): pull the codes of a class towards their mean with this weight (the paper: 0.8); "
        "reads the training labels, and adds a second SAE, for pass:, to the checkpoint",
    )  # fmt: skip
    pass_means: str = setting(
        "batch", choices=("batch", "running"),
        help="the means of PASS: of the batch, or running ones for batches with few images per class",
    )  # fmt: skip
    dead_after: int = setting(
        100, minimum=1, maximum=10**9, help="steps without activation after which a latent counts as dead"
    )
    rescale: bool = setting(True)
    """Train on activations scaled to unit variance, and scale back afterwards: one learning rate fits all towers."""
    seed: int = setting(0, minimum=0, maximum=2**32 - 1, help="random seed")
    """Seed of the initialisation, of the choice of held-out activations and of the order of the batches."""

    def __post_init__(self) -> None:
        validate(self)
        if self.sae_batch_size == 1:
            raise SettingError(
                "sae_batch_size is 1; expected at least 2, since the loss is relative to the batch's variance"
            )

    def for_size(self, count: int) -> TrainConfig:
        """Return these settings with the zeros filled in for ``count`` stored activations."""
        batch = self.sae_batch_size or min(1024, max(64, count // 8))
        samples = self.samples or min(1_000_000, max(200_000, 200 * count))
        return replace(self, sae_batch_size=min(batch, count), samples=samples)


#: Named settings. ``paper`` follows arXiv 2506.01247 and, where that is silent, EleutherAI sparsify.
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {"lr": 5e-4, "init": "random", "auxk": 0.0, "rescale": False},
}
