"""CLIP models of the package ``transformers`` with the interface of open_clip's models and vision towers.

    hf:openai/clip-vit-base-patch32              the main branch of a hub's repository
    hf:google/siglip-base-patch16-224#REVISION   a branch, tag or commit of a repository
    hf:./folder                                  a folder that ``save_pretrained`` wrote

Images and texts are prepared by the processors of the folder. No code of a repository is run: ``trust_remote_code`` is
never set, and only tensors are read from a pickle.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vs2_plugin.clip.sites import ClipModel
from vs2_plugin.errors import TowerError
from vs2_plugin.hub import download
from vs2_plugin.names import TRANSFORMERS, library_place
from vs2_plugin.text import one_line, reason_of

__all__ = ["LibraryCLIP", "check_folder", "find_folder", "load_library", "revision_of"]

_INSTALL = "pip install 'vs2-plugin[transformers]'"
_FIRST = 5  # lowest major version whose blocks return a tensor and whose folders have the layout below
#: Supported kinds of models: values of ``model_type`` in a config.
_KINDS = ("clip", "siglip")
_CONFIG = "config.json"
_PREPROCESSING = ("preprocessor_config.json", "processor_config.json")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
_INDEX = "model.safetensors.index.json"
_WEIGHTS = ("model.safetensors", _INDEX)
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
#: Files to fetch from a repository, and those to fetch if it has no weights as safetensors.
_WANTED = (
    _CONFIG, *_PREPROCESSING, *_VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "merges.txt", *_WEIGHTS, "model-*.safetensors",
)  # fmt: skip
_ELSE = (*_WANTED, *_PICKLES, "pytorch_model-*.bin")


class _Blocks(nn.Module):
    """The transformer blocks of a tower, under open_clip's name ``resblocks``."""

    batch_first = True

    def __init__(self, blocks: nn.Module) -> None:
        super().__init__()
        self.resblocks = blocks


class _Vision(nn.Module):
    """A vision tower with those attributes of open_clip's ``VisionTransformer`` that this package reads."""

    pool_type = "tok"

    def __init__(self, model: Any, preprocessing: Mapping[str, Any]) -> None:
        super().__init__()
        self.trunk = model.vision_model
        self.projection = getattr(model, "visual_projection", None)
        config = model.config.vision_config
        self.image_size: int = config.image_size
        #: Width of the embedding.
        self.output_dim: int = config.hidden_size if self.projection is None else self.projection.out_features
        self.preprocess_cfg = dict(preprocessing)

    @property
    def transformer(self) -> _Blocks:
        """Holder of the blocks, new at each call: as a child module, it would make the weights count twice."""
        return _Blocks(self.trunk.encoder.layers)

    @property
    def class_embedding(self) -> Tensor | None:
        """Embedding ``[d]`` of the CLS token; None for a tower without one."""
        return getattr(self.trunk.embeddings, "class_embedding", None)

    @property
    def ln_post(self) -> nn.Module:
        """The final LayerNorm."""
        norm: nn.Module = self.trunk.post_layernorm
        return norm

    @property
    def proj(self) -> Tensor | None:
        """The projection ``[d, embed_dim]``; None for a tower without one."""
        return None if self.projection is None else self.projection.weight.T

    def forward(self, images: Tensor) -> Tensor:
        """Return the embeddings ``[batch, embed_dim]`` of images ``[batch, 3, height, width]``."""
        pooled: Tensor = self.trunk(pixel_values=images).pooler_output
        return pooled if self.projection is None else self.projection(pooled)


class LibraryCLIP(ClipModel):
    """A ``CLIPModel`` or ``SiglipModel``, with the methods of an open_clip model."""

    def __init__(self, model: Any, preprocessing: Mapping[str, Any]) -> None:
        super().__init__()
        self.visual = _Vision(model, preprocessing)
        self.text = model.text_model
        self.text_projection = getattr(model, "text_projection", None)
        self.logit_scale = model.logit_scale
        self.logit_bias = getattr(model, "logit_bias", None)

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Return the embeddings ``[batch, embed_dim]`` of images ``[batch, 3, height, width]``."""
        features: Tensor = self.visual(image)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Return the embeddings ``[batch, embed_dim]`` of the tokenizer's output (:class:`_Tokenizer`)."""
        tokens, mask = (text, None) if text.ndim == 2 else text.unbind(1)
        features: Tensor = self.text(input_ids=tokens, attention_mask=mask).pooler_output
        features = features if self.text_projection is None else self.text_projection(features)
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> tuple[Any, Any, Tensor]:
        """Return the unit-norm embeddings of images and of texts, and the logit scale, as open_clip's models do."""
        images = None if image is None else self.encode_image(image, normalize=True)
        texts = None if text is None else self.encode_text(text, normalize=True)
        return images, texts, self.logit_scale.exp()


class _Transform:
    """Prepares an image with the processor of a folder. (A class, since loader workers cannot pickle a closure.)"""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the preprocessed image ``[3, height, width]``."""
        values: Tensor = self.processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        return values

    def __repr__(self) -> str:
        return f"{type(self.processor).__name__}({self.told})"

    @property
    def told(self) -> dict[str, Any]:
        """Preprocessing as plain values, under open_clip's names where open_clip has one."""
        names = {"image_mean": "mean", "image_std": "std", "resample": "interpolation"}
        switches = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
        attributes = (*names, "rescale_factor", "size", "crop_size")
        values: dict[str, Any] = {name: getattr(self.processor, name, None) for name in attributes}
        values = {names.get(name, name): value for name, value in values.items()}
        if values["interpolation"] is not None:
            values["interpolation"] = Image.Resampling(values["interpolation"]).name.lower()
        for name in ("size", "crop_size"):
            values[name] = {key: pixels for key, pixels in dict(values[name] or {}).items() if pixels is not None}
        return {**values, **{name: bool(getattr(self.processor, name, False)) for name in switches}}


class _Tokenizer:
    """Converts texts to tokens, padded or cut to one length, with the tokenizer of a folder."""

    def __init__(self, tokenizer: Any, length: int, masked: bool) -> None:
        self.tokenizer, self.length = tokenizer, length
        #: Whether the attention mask is returned with the tokens.
        self.masked = masked

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Return the tokens ``[texts, length]``, or tokens and attention mask ``[texts, 2, length]``."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        encoded = self.tokenizer(
            texts, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        tokens: Tensor = encoded["input_ids"]
        return torch.stack([tokens, encoded["attention_mask"]], dim=1) if self.masked else tokens


def load_library(
    model_name: str, pretrained: str = "", cache_dir: str | None = None, device: str | torch.device = "cpu"
) -> tuple[LibraryCLIP, _Transform, _Tokenizer]:
    """Load a model of transformers as clip_benchmark's loader loads one of open_clip.

    Args:
        model_name: ``hf:owner/name[#revision]``, or ``hf:FOLDER``.
        pretrained: ignored, since the name determines the weights.
        cache_dir: cache folder of the hub's client.
        device: device of the model.

    Returns:
        The model in float32, its image preprocessing and its tokenizer.

    Raises:
        TowerError: the model cannot be loaded, or does not fit its processors.
        HubError: the repository cannot be fetched.
    """
    library = _library()
    folder = find_folder(model_name, cache_dir)
    check_folder(model_name, folder)
    source: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with _silent(library):
            tokenizer = library.AutoTokenizer.from_pretrained(folder, **source)
            transform = _Transform(library.AutoImageProcessor.from_pretrained(folder, **source))
            model, loading_info = library.AutoModel.from_pretrained(
                folder, dtype=torch.float32, weights_only=True, output_loading_info=True, **source
            )
    except ImportError as error:
        raise TowerError(
            f"could not load {model_name}: it needs a package that is not installed ({one_line(str(error), 80)}); "
            f"install it with: {_INSTALL}"
        ) from error
    except Exception as error:  # whatever the library, safetensors or torch raised
        raise TowerError(f"could not load {model_name}: {reason_of(error)}") from error
    _check_parts(model_name, model, loading_info, transform, tokenizer)
    text = model.config.text_config
    # CLIP needs no mask: its attention is causal, so a text does not see the padding after its end.
    masked = model.config.model_type != "clip" and "attention_mask" in tokenizer.model_input_names
    tokens = _Tokenizer(tokenizer, min(tokenizer.model_max_length, text.max_position_embeddings), masked)
    return LibraryCLIP(model, transform.told).to(device).eval(), transform, tokens


def _library() -> Any:
    """Return the package ``transformers``. Raises TowerError if it is missing or too old."""
    try:
        import transformers
    except ImportError as error:
        raise TowerError(
            f"models called {TRANSFORMERS}NAME need the package transformers ({reason_of(error)}); install it with: "
            f"{_INSTALL}"
        ) from error
    if int(transformers.__version__.partition(".")[0]) < _FIRST:
        raise TowerError(
            f"models called {TRANSFORMERS}NAME need transformers {_FIRST} or newer, and {transformers.__version__} is "
            f"installed; update it with: {_INSTALL}"
        )
    return transformers


@contextmanager
def _silent(library: Any) -> Iterator[None]:
    """Silence the library's progress bars and log messages within a ``with`` block; this module checks for faults."""
    logging = library.utils.logging
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def find_folder(model_name: str, cache_dir: str | None = None) -> Path:
    """Return the folder of a model: the folder that is named, or the one in the hub's cache, fetched if missing.

    Raises:
        HubError: the repository cannot be fetched.
    """
    place = library_place(model_name)
    if isinstance(place, str):
        return Path(place)
    assert place is not None
    name, revision = place
    folder = download(name, revision, _WANTED, _is_whole, cache_dir=cache_dir)
    return folder if _has_weights(folder) else download(name, revision, _ELSE, _is_whole, cache_dir=cache_dir)


def revision_of(model_name: str, cache_dir: str | None = None) -> str | None:
    """Return the commit of a model from a hub's repository; None for a model in a local folder."""
    return None if isinstance(library_place(model_name), str) else find_folder(model_name, cache_dir).name


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (*_WEIGHTS, *_PICKLES))


def _is_whole(folder: Path) -> bool:
    """Tell whether a folder of the hub's cache holds all files of a model."""
    return _lacks(folder) is None


def _lacks(folder: Path) -> str | None:
    """Return words on the first file that a folder lacks to be a usable model; None if the folder is complete."""
    present = {name for name in (*_WANTED, *_PICKLES) if (folder / name).is_file()}
    if _CONFIG not in present:
        return f"no {_CONFIG}"
    if not _has_weights(folder):
        return f"no {_WEIGHTS[0]}"
    if not present.intersection(_PREPROCESSING):
        return f"no {_PREPROCESSING[0]}"
    if not present.intersection(_VOCABULARIES):
        return "no tokenizer.json"
    for index in present.intersection((_INDEX, _PICKLES[1])):
        for name in sorted(set(_read(folder / index).get("weight_map", {}).values())):
            if not (folder / name).is_file():
                return f"no {name}, which {index} names"
    return None


def check_folder(model_name: str, folder: Path) -> None:
    """Raise TowerError, without loading anything, if a folder holds no usable CLIP model.

    Raises:
        TowerError: saying what is missing, or what the folder holds instead.
    """
    if not folder.is_dir():
        raise TowerError(
            f"{model_name!r}: no folder {folder}; expected one that save_pretrained wrote, or {TRANSFORMERS}OWNER/NAME"
        )
    kind = _read(folder / _CONFIG).get("model_type") if (folder / _CONFIG).is_file() else None
    if kind is None and (folder / "open_clip_config.json").is_file():
        raise TowerError(f"{model_name!r} is a folder that open_clip wrote; name it local-dir:{folder}")
    if kind is not None and kind not in _KINDS:
        shapes = " (NaFlex: images of any shape, where models of a fixed size are of the kind 'siglip')"
        raise TowerError(
            f"{model_name!r} is of the kind {kind!r}{shapes if kind == 'siglip2' else ''}; expected a model of "
            f"images and texts, CLIPModel or SiglipModel (model_type {' or '.join(_KINDS)})"
        )
    lacking = _lacks(folder)
    if lacking is not None:
        raise TowerError(
            f"{model_name!r}: {lacking} in {folder}; expected the model and its processor, each written by its "
            "save_pretrained: model.save_pretrained(FOLDER); processor.save_pretrained(FOLDER)"
        )


def _read(file: Path) -> dict[str, Any]:
    """Read a JSON file of a model. Raises TowerError if it holds no JSON object."""
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise TowerError(f"{file} cannot be read ({reason_of(error)}); expected what save_pretrained wrote") from error
    if not isinstance(values, dict):
        raise TowerError(f"{file} holds {type(values).__name__}; expected what save_pretrained wrote")
    return values


def _check_parts(name: str, model: Any, told: Mapping[str, Any], transform: _Transform, tokenizer: Any) -> None:
    """Raise TowerError if weights of a model are missing, or its processors do not fit it; the library ignores that.

    Raises:
        TowerError: saying which weights are missing, or which processor does not fit.
    """
    missing = sorted(told["missing_keys"])
    if missing:
        raise TowerError(
            f"could not load {name}: its weights lack {missing[0]} and {len(missing) - 1} more of the model that "
            f"{_CONFIG} describes; expected what save_pretrained wrote"
        )
    size, tokens = model.config.vision_config.image_size, model.config.text_config.vocab_size
    shape = list(transform(Image.new("RGB", (size + 8, size))).shape)
    if shape != [3, size, size]:
        raise TowerError(
            f"{name}: its processor gives images {shape}, but its tower takes {[3, size, size]}; expected the "
            "processor that belongs to it"
        )
    if len(tokenizer) > tokens:
        raise TowerError(
            f"{name}: its tokenizer has {len(tokenizer):,} tokens, but its text tower {tokens:,}; expected the "
            "tokenizer that belongs to it"
        )
