"""The request of a training: the settings of ``vs2-train-sae``, checked before anything is loaded.

Every field is a flag of the command with the same name; see :func:`vs2_plugin.settings.flags_of`. No heavy imports.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from vs2_plugin.checkpoint.store import ENVIRONMENT_VARIABLE
from vs2_plugin.data.naming import DataSet
from vs2_plugin.documented import documented
from vs2_plugin.errors import SettingError, TowerError
from vs2_plugin.method import ENCODER_NAME
from vs2_plugin.names import is_steered, split
from vs2_plugin.sae.config import RECIPES, TrainConfig
from vs2_plugin.settings import like, setting, validate, words_of

__all__ = ["TrainRequest"]


@documented
@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """The settings of one training, which may write several checkpoints.

    Settings of :class:`vs2_plugin.sae.config.TrainConfig` that are None take the recipe's value. ``k``,
    ``expansion_factor``, ``pass_weight`` and ``seed`` take several values, and each combination becomes a checkpoint;
    a plain SAE (``pass_weight`` 0) and one by PASS share theirs.
    A setting that takes several values accepts a single one too.

    Raises:
        SettingError: a value is outside its range, or two values contradict each other.
        TowerError: the model is a steered one.
    """

    model: str = setting("ViT-B-32-quickgelu", help="model of open_clip, or of transformers (hf:NAME)")
    pretrained: str = setting("laion400m_e32", help="weights tag or file; '' for random weights")
    dataset: tuple[str, ...] = setting(
        (),
        help="a folder of images (photos/), a data set that clip_benchmark knows, or wds/NAME for webdataset shards; "
        "labels are not needed. With several, one SAE is trained for all, used by its name",
    )
    dataset_root: str = setting("root", help="folder of a data set that is given by name, or the URL of its shards")
    activations: str | None = setting(
        None,
        help="a .npy or .safetensors file of activations [count, width] to train on instead of images: those of "
        "--model at --blocks. Without --model, the SAE belongs to no CLIP and cannot steer one",
    )
    train_split: str | None = setting(None, help="the split to train on (default: the data set's training split)")
    transductive: bool = setting(
        False,
        help="allow training on the images that are evaluated, for data sets without a training split; "
        "marked in checkpoint and results",
    )
    max_images: int | None = setting(
        None, minimum=1,
        help="use at most this many images of each data set: a random subset, the same for all seeds (default: all)",
    )  # fmt: skip
    batch_size: int = setting(64, minimum=1, help="images per forward pass")
    num_workers: int = setting(min(4, os.cpu_count() or 1), minimum=0, help="image loader processes")
    amp: bool | None = setting(
        None, help="extract under autocast, not in float32 (default: autocast, unless this processor emulates it)"
    )
    seed: tuple[int, ...] | None = like(TrainConfig, "seed", help="random seed, or several")
    model_cache_dir: str | None = setting(None, help="where downloaded models are kept")
    wds_cache_dir: str | None = setting(None, help="where clip_benchmark keeps downloaded shards")
    quiet: bool = setting(False, help="no progress, only the result")

    recipe: str = setting(
        "default", choices=tuple(sorted(RECIPES)),
        help="named settings, which individual flags override; paper: those of arXiv 2506.01247",
    )  # fmt: skip
    blocks: tuple[str, ...] = setting(
        ("last",), pattern=("last|all|output|[0-9]{1,9}", "last, all, output, or block numbers counted from 0"),
        help="where: last, all, output (the embedding), or block numbers counted from 0; one SAE each",
    )  # fmt: skip
    sae: str | None = setting(
        None,
        help="the folder of an SAE by sparsify, SAELens or Prisma, to make the checkpoint from instead of training "
        "one; how well it fits is measured on the data set",
    )
    expansion_factor: tuple[int, ...] | None = like(TrainConfig, "expansion_factor")
    k: tuple[int, ...] | None = like(
        TrainConfig, "k", default=None,
        help="active latents per activation; by default 64, at most an eighth of the width",
    )  # fmt: skip
    activation: str | None = like(TrainConfig, "activation")
    lr: float | None = like(TrainConfig, "lr")
    warmup: float | None = like(TrainConfig, "warmup")
    samples: int | None = like(TrainConfig, "samples")
    sae_batch_size: int | None = like(TrainConfig, "sae_batch_size")
    auxk: float | None = like(TrainConfig, "auxk")
    init: str | None = like(TrainConfig, "init")
    pass_weight: tuple[float, ...] | None = like(TrainConfig, "pass_weight")
    pass_means: str | None = like(TrainConfig, "pass_means")
    dead_after: int | None = like(TrainConfig, "dead_after")
    calibrate_on: tuple[str, ...] = setting(
        (),
        help="with several data sets, those whose held-out activations set the thresholds of the gate (default: all)",
    )

    gallery: bool = setting(True, help="keep no gallery beside the checkpoint")
    gallery_labels: bool = setting(
        False, help="keep the training labels too, which oracles and vs2 sae read"
    )
    retrieval_encoder: tuple[str, ...] = setting(
        (),
        pattern=(rf"{ENCODER_NAME[0]}(,.*)?", "names of timm models, and after a comma a file of weights"),
        help="timm models whose embeddings can also be used to compare images (@encoder=MODEL), for example "
        "vit_small_patch14_dinov2, or MODEL,FILE with a file of weights (default: those that timm downloads)",
    )

    store: str | None = setting(
        None,
        help=f"folder of checkpoints and cached activations (default: ${ENVIRONMENT_VARIABLE}, else the platform's "
        "cache folder)",
    )
    name: str | None = setting(
        None,
        help="name of the checkpoint, for vs2:MODEL@NAME (default: made from --model, --pretrained and --dataset)",
    )
    overwrite: bool = setting(False, help="replace a checkpoint of that name")
    cache_dtype: str = setting("float16", choices=("float16", "float32"), help="precision of cached activations")
    refresh_cache: bool = setting(False, help="extract again, even if the activations are cached")
    save_every: float = setting(
        60.0, minimum=0, maximum=10**6,
        help="seconds between saved states of the training, from which the same command continues after an "
        "interruption",
    )  # fmt: skip

    def __post_init__(self) -> None:
        validate(self)
        if not self.dataset and self.activations is None:
            raise SettingError("--dataset is missing: name the images to train on, or --activations FILE")
        if not self.dataset:
            object.__setattr__(self, "dataset", ("activations",))
        if is_steered(self.model):
            backbone = shlex.quote(split(self.model).backbone or "ViT-B-32")
            raise TowerError(f"--model {self.model!r}: an SAE is trained on the plain backbone; use --model {backbone}")
        for dataset in self.calibrate_on:
            if dataset not in self.dataset:
                raise SettingError(
                    f"--calibrate_on {dataset!r}: expected some of --dataset: {' '.join(dict.fromkeys(self.dataset))}"
                )
        if (self.retrieval_encoder or self.gallery_labels) and not self.gallery:
            flag = "--retrieval_encoder" if self.retrieval_encoder else "--gallery_labels"
            raise SettingError(f"{flag} is for the gallery; leave out --no_gallery")

    @classmethod
    def of(cls, **given: Any) -> TrainRequest:
        """Return the request with these settings. With ``activations``, the default is no model."""
        usual = {"model": "", "pretrained": ""} if given.get("activations") else {}
        names = {field.name for field in fields(cls)}
        for name in given:
            if name not in names:
                positive = name.removeprefix("no_")
                meant = f"{positive}=False" if positive in names else (*get_close_matches(name, names, 1), "")[0]
                hint = f"; did you mean {meant}?" if meant else ""
                raise SettingError(f"a training has no setting {name!r}{hint}")
        return cls(**{**usual, **given})

    @property
    def first_seed(self) -> int:
        """Seed of everything that the SAEs share: random weights and loaders."""
        return (self.seed or (0,))[0]

    @property
    def data_sets(self) -> tuple[DataSet, ...]:
        """Data sets to train on, each once. Raises DataError or SettingError if a name stands for none."""
        return self._named(self.dataset)

    @property
    def calibration_sets(self) -> tuple[DataSet, ...]:
        """Data sets whose held-out activations set the thresholds of the gate."""
        return self._named(self.calibrate_on or self.dataset)

    def _named(self, datasets: tuple[str, ...]) -> tuple[DataSet, ...]:
        return tuple(dict.fromkeys(DataSet.of(dataset, self.dataset_root) for dataset in datasets))

    def words(self) -> list[str]:
        """Return the command line of this request, as words, with only the settings that differ from the defaults."""
        return ["vs2-train-sae", *words_of(self)]
