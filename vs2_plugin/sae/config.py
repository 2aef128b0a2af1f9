"""The settings of a training of SAEs, with their defaults."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from vs2_plugin.errors import SettingError

__all__ = ["RECIPES", "TrainConfig"]


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training. Each is a flag of ``vs2-train-sae`` of the same name.

    Raises:
        SettingError: a value outside its range.
    """

    expansion_factor: int = 4
    """Latents per dimension of the activations: n = expansion_factor · d."""
    k: int = 64
    """Active latents per activation."""
    activation: str = "relu"
    """relu, or abs: top-k of the magnitude, without ReLU and encoder bias."""
    lr: float = 3e-3
    """Peak learning rate of Adam."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises from 0; it then falls linearly to 0."""
    samples: int = 0
    """Activations seen in training, repeats included; 0 means 200 per stored activation, 200,000 to 1,000,000."""
    sae_batch_size: int = 0
    """Activations per step; 0 means an eighth of the stored ones, 64 to 1024. At least 2."""
    init: str = "data"
    """Decoder directions to start from. data: differences of random training activations, with an encoder of half
    their length, so that overlapping latents do not overshoot; random: random ones, equal in encoder and decoder."""
    auxk: float = 1 / 32
    """Weight of the auxiliary loss that revives dead latents (arXiv 2406.04093); 0 switches it off."""
    dead_after: int = 100
    """Steps of silence after which a latent counts as dead in training."""
    pass_weight: float = 0.0
    """Weight of the PASS term, which pulls the codes of a class towards their mean; 0 switches it off."""
    pass_means: str = "batch"
    """The means of PASS: those of the batch, or running ones, for batches with few images per class."""
    rescale: bool = True
    """Train on activations scaled to unit variance, and scale back afterwards: one learning rate fits all towers."""
    seed: int = 0
    """Seed of the initialisation, the held-out choice and the order."""

    def __post_init__(self) -> None:
        ranges = {
            "expansion_factor": (1, 1024),
            "k": (1, 1_000_000),
            "lr": (1e-9, 1.0),
            "warmup": (0.0, 1.0),
            "samples": (0, 10**12),
            "sae_batch_size": (0, 10**7),
            "auxk": (0.0, 100.0),
            "dead_after": (1, 10**9),
            "pass_weight": (0.0, 1000.0),
            "seed": (0, 2**32 - 1),
        }
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise SettingError(f"{name} is {getattr(self, name)}; expected {low:g} to {high:g}")
        if self.activation not in ("relu", "abs"):
            raise SettingError(f"activation is {self.activation!r}; expected relu or abs")
        if self.init not in ("data", "random"):
            raise SettingError(f"init is {self.init!r}; expected data or random")
        if self.pass_means not in ("batch", "running"):
            raise SettingError(f"pass_means is {self.pass_means!r}; expected batch or running")
        if self.sae_batch_size == 1:
            raise SettingError(
                "sae_batch_size is 1; expected at least 2, since the loss is relative to the batch's variance"
            )

    def for_size(self, count: int) -> TrainConfig:
        """These settings with the zeros filled in for ``count`` stored activations."""
        batch = self.sae_batch_size or min(1024, max(64, count // 8))
        samples = self.samples or min(1_000_000, max(200_000, 200 * count))
        return TrainConfig(**{**asdict(self), "sae_batch_size": min(batch, count), "samples": samples})


#: Named settings. ``paper`` is what arXiv 2506.01247 states; where it is silent, as EleutherAI sparsify does.
RECIPES = {
    "default": {},
    "paper": {"lr": 5e-4, "init": "random", "auxk": 0.0, "rescale": False},
}
