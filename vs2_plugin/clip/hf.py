"""CLIPs of the package ``transformers``, with the interface of open_clip's, so that what reads a tower reads theirs.

    hf:openai/clip-vit-base-patch32              the main branch of a hub's repository
    hf:google/siglip-base-patch16-224#REVISION   a branch, tag or commit of it
    hf:./folder                                  what ``save_pretrained`` wrote into a folder

Images and texts are prepared by the processors of the folder. No code of a repository is run: ``trust_remote_code`` is
never given, and of a pickle only tensors are read.
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
_FIRST = 5  # the major version whose blocks put out a tensor, whose layout of a folder is read here
#: The kinds of models that are known, as ``model_type`` of a config names them.
_KINDS = ("clip", "siglip")
_CONFIG = "config.json"
_PREPROCESSING = ("preprocessor_config.json", "processor_config.json")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
_INDEX = "model.safetensors.index.json"
_WEIGHTS = ("model.safetensors", _INDEX)
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
#: The files of a repository that are fetched, and those that are where there are no others.
_WANTED = (
    _CONFIG, *_PREPROCESSING, *_VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "merges.txt", *_WEIGHTS, "model-*.safetensors",
)  # fmt: skip
_ELSE = (*_WANTED, *_PICKLES, "pytorch_model-*.bin")


class _Blocks(nn.Module):
    """The transformer blocks of a tower, by open_clip's name for them."""

    batch_first = True

    def __init__(self, blocks: nn.Module) -> None:
        super().__init__()
        self.resblocks = blocks


class _Vision(nn.Module):
    """A vision tower, with the attributes by which open_clip's ``VisionTransformer`` is read."""

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
        """What holds the blocks. It is made for each caller: as a child, it would count the weights twice."""
        return _Blocks(self.trunk.encoder.layers)

    @property
    def class_embedding(self) -> Tensor | None:
        """What the CLS token begins as ``[d]``; None for a tower without one."""
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
        """The embedding ``[batch, embed_dim]`` of images ``[batch, 3, height, width]``."""
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
        """The embedding ``[batch, embed_dim]`` of images ``[batch, 3, height, width]``."""
        features: Tensor = self.visual(image)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """The embedding ``[batch, embed_dim]`` of what the tokenizer gives."""
        tokens, mask = (text, None) if text.ndim == 2 else text.unbind(1)
        features: Tensor = self.text(input_ids=tokens, attention_mask=mask).pooler_output
        features = features if self.text_projection is None else self.text_projection(features)
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> tuple[Any, Any, Tensor]:
        """The embeddings of images and texts, of length 1, and the scale of logits, as open_clip gives them."""
        images = None if image is None else self.encode_image(image, normalize=True)
        texts = None if text is None else self.encode_text(text, normalize=True)
        return images, texts, self.logit_scale.exp()


class _Transform:
    """Prepares an image as the processor of a folder does. (No closure, so that loader workers can pickle it.)"""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Image.Image) -> Tensor:
        """The preprocessed image ``[3, height, width]``."""
        values: Tensor = self.processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        return values

    def __repr__(self) -> str:
        return f"{type(self.processor).__name__}({self.told})"

    @property
    def told(self) -> dict[str, Any]:
        """What is done to an image, in plain values, by open_clip's names where it has one."""
        names = {"image_mean": "mean", "image_std": "std", "resample": "interpolation"}
        switches = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
        wanted = (*names, "rescale_factor", "size", "crop_size")
        values: dict[str, Any] = {name: getattr(self.processor, name, None) for name in wanted}
        values = {names.get(name, name): value for name, value in values.items()}
        if values["interpolation"] is not None:
            values["interpolation"] = Image.Resampling(values["interpolation"]).name.lower()
        for name in ("size", "crop_size"):
            values[name] = {key: one for key, one in dict(values[name] or {}).items() if one is not None}
        return {**values, **{name: bool(getattr(self.processor, name, False)) for name in switches}}


class _Tokenizer:
    """Makes tokens of texts, all of one length, as the tokenizer of a folder does."""

    def __init__(self, tokenizer: Any, length: int, masked: bool) -> None:
        self.tokenizer, self.length = tokenizer, length
        #: Whether the attention mask goes with the tokens.
        self.masked = masked

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """The tokens ``[texts, length]``, or with the attention mask ``[texts, 2, length]``."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        made = self.tokenizer(
            texts, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        tokens: Tensor = made["input_ids"]
        return torch.stack([tokens, made["attention_mask"]], dim=1) if self.masked else tokens


def load_library(
    model_name: str, pretrained: str = "", cache_dir: str | None = None, device: str | torch.device = "cpu"
) -> tuple[LibraryCLIP, _Transform, _Tokenizer]:
    """Load a model of transformers as clip_benchmark's loader loads one of open_clip.

    Args:
        model_name: ``hf:owner/name[#revision]``, or ``hf:FOLDER``.
        pretrained: of no meaning: the weights come with the name.
        cache_dir: where the hub's client keeps what it fetches.
        device: where the model shall be.

    Returns:
        The model in float32, its image preprocessing and its tokenizer.

    Raises:
        TowerError: what is wrong, and what was expected.
        HubError: the repository cannot be had.
    """
    library = _library()
    folder = find_folder(model_name, cache_dir)
    check_folder(model_name, folder)
    source: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with _silent(library):
            tokenizer = library.AutoTokenizer.from_pretrained(folder, **source)
            transform = _Transform(library.AutoImageProcessor.from_pretrained(folder, **source))
            model, told = library.AutoModel.from_pretrained(
                folder, dtype=torch.float32, weights_only=True, output_loading_info=True, **source
            )
    except ImportError as error:
        raise TowerError(
            f"could not load {model_name}: it needs a package that is not installed ({one_line(str(error), 80)}); "
            f"install it with: {_INSTALL}"
        ) from error
    except Exception as error:  # whatever the library, safetensors or torch raised
        raise TowerError(f"could not load {model_name}: {reason_of(error)}") from error
    _check_parts(model_name, model, told, transform, tokenizer)
    text = model.config.text_config
    # What comes after a text's end is not seen by it where attention is causal.
    masked = model.config.model_type != "clip" and "attention_mask" in tokenizer.model_input_names
    tokens = _Tokenizer(tokenizer, min(tokenizer.model_max_length, text.max_position_embeddings), masked)
    return LibraryCLIP(model, transform.told).to(device).eval(), transform, tokens


def _library() -> Any:
    """Return the package. Raises TowerError where it is missing or too old."""
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
    """Keep the library's progress bars and remarks to itself within the ``with`` block: what matters is checked."""
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
    """Return the folder of a model: the one that is named, or that in the hub's cache, fetched if it is not there.

    Raises:
        HubError: the repository cannot be had.
    """
    place = library_place(model_name)
    if isinstance(place, str):
        return Path(place)
    assert place is not None
    name, revision = place
    folder = download(name, revision, _WANTED, _is_whole, cache_dir=cache_dir)
    return folder if _has_weights(folder) else download(name, revision, _ELSE, _is_whole, cache_dir=cache_dir)


def revision_of(model_name: str, cache_dir: str | None = None) -> str | None:
    """Return the commit of a model that a hub's repository gave; None for one in a folder."""
    return None if isinstance(library_place(model_name), str) else find_folder(model_name, cache_dir).name


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (*_WEIGHTS, *_PICKLES))


def _is_whole(folder: Path) -> bool:
    """Tell whether a folder of the hub's cache holds all files of a model."""
    return _lacks(folder) is None


def _lacks(folder: Path) -> str | None:
    """Say in words what a folder lacks of a model that can be used; None if nothing."""
    there = {name for name in (*_WANTED, *_PICKLES) if (folder / name).is_file()}
    if _CONFIG not in there:
        return f"no {_CONFIG}"
    if not _has_weights(folder):
        return f"no {_WEIGHTS[0]}"
    if not there.intersection(_PREPROCESSING):
        return f"no {_PREPROCESSING[0]}"
    if not there.intersection(_VOCABULARIES):
        return "no tokenizer.json"
    for index in there.intersection((_INDEX, _PICKLES[1])):
        for name in sorted(set(_read(folder / index).get("weight_map", {}).values())):
            if not (folder / name).is_file():
                return f"no {name}, which {index} names"
    return None


def check_folder(model_name: str, folder: Path) -> None:
    """Refuse, without loading anything, a folder that holds no CLIP that can be used.

    Raises:
        TowerError: saying what is missing, or what is there instead.
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
    """Read a JSON file of a model. Raises TowerError."""
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise TowerError(f"{file} cannot be read ({reason_of(error)}); expected what save_pretrained wrote") from error
    if not isinstance(values, dict):
        raise TowerError(f"{file} holds {type(values).__name__}; expected what save_pretrained wrote")
    return values


def _check_parts(name: str, model: Any, told: Mapping[str, Any], transform: _Transform, tokenizer: Any) -> None:
    """Refuse a model whose weights were not all there, or which does not fit its processors.

    Raises:
        TowerError: which the library would have passed over.
    """
    missing = sorted(told["missing_keys"])
    if missing:
        raise TowerError(
            f"could not load {name}: its weights lack {missing[0]} and {len(missing) - 1} more of the model that "
            f"{_CONFIG} describes; expected what save_pretrained wrote"
        )
    size, tokens = model.config.vision_config.image_size, model.config.text_config.vocab_size
    given = list(transform(Image.new("RGB", (size + 8, size))).shape)
    if given != [3, size, size]:
        raise TowerError(
            f"{name}: its processor gives images {given}, but its tower takes {[3, size, size]}; expected the "
            "processor that belongs to it"
        )
    if len(tokenizer) > tokens:
        raise TowerError(
            f"{name}: its tokenizer has {len(tokenizer):,} tokens, but its text tower {tokens:,}; expected the "
            "tokenizer that belongs to it"
        )
