"""The CLIPs and images of the study. What takes long to make is kept in the study's folder."""

from __future__ import annotations

import contextlib
import copy
import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
import train_tiny_clip
from settings import Sizes
from torch import Tensor

from vs2_plugin.clip.backbone import Loaded, load_backbone
from vs2_plugin.clip.edits import reading
from vs2_plugin.clip.sites import Sites
from vs2_plugin.demo import digits

__all__ = ["Images", "classifier", "draw", "images", "load_clip", "train_clip"]

ALL_FONTS = train_tiny_clip.FONT_PATTERNS


class Variant(NamedTuple):
    """Another tiny CLIP, trained here."""

    fonts: tuple[str, ...]
    """It is trained on these."""
    test_fonts: tuple[str, ...]
    """Images for it are rendered in these."""
    width: int
    layers: int
    seed: int


VARIANTS = {
    "small": Variant(ALL_FONTS, ALL_FONTS, 64, 3, 2),
    "sans": Variant(("DejaVuSans*.ttf",), ("DejaVuSerif*.ttf", "STIXGeneral*.ttf", "cm[brst][10st]*.ttf"), 128, 4, 0),
    "serif": Variant(
        ("DejaVuSerif*.ttf", "STIXGeneral*.ttf", "cm[br]*.ttf"), ("DejaVuSans*.ttf", "cm[st][st]*.ttf"), 128, 4, 1
    ),
}
_GLYPHS = [name for _, name in train_tiny_clip.GLYPHS]
#: Source -> its classes among the glyphs.
SOURCES = {
    "printed digits": range(10),
    "handwritten digits": range(10),
    "capital letters": range(10, 36),
    "small letters": range(36, 62),
}
_BATCH = 500


class Images(NamedTuple):
    """The activations of a source's images at the tower's last site."""

    pool: np.ndarray
    """``[count, d]``, float16 as in a checkpoint: galleries are drawn from these."""
    pool_labels: np.ndarray
    test: np.ndarray
    """``[count, d]``, float32."""
    test_labels: np.ndarray


@contextlib.contextmanager
def _recipe(fonts: tuple[str, ...], width: int = 128, layers: int = 4) -> Iterator[None]:
    """Within the block, the module that trains tiny CLIPs has other settings."""
    kept = train_tiny_clip.FONT_PATTERNS, copy.deepcopy(train_tiny_clip.CONFIG)
    train_tiny_clip.FONT_PATTERNS = fonts
    train_tiny_clip.CONFIG["model_cfg"]["vision_cfg"].update(width=width, layers=layers)
    try:
        yield
    finally:
        train_tiny_clip.FONT_PATTERNS = kept[0]
        train_tiny_clip.CONFIG.update(kept[1])


def _folder(root: Path, clip: str) -> Path:
    return digits.TINY_CLIP if clip == "tiny" else root / "clips" / clip


def train_clip(root: Path, clip: str, steps: int) -> None:
    """Train a CLIP, unless it lies there."""
    folder = _folder(root, clip)
    if folder.exists():
        return
    variant = VARIANTS[clip]
    scratch = folder.with_suffix(".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    with (
        open(folder.with_suffix(".log"), "w", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
        _recipe(variant.fonts, variant.width, variant.layers),
    ):
        train_tiny_clip.train(scratch, steps, 128, variant.seed)
    scratch.replace(folder)


@functools.lru_cache(maxsize=2)
def load_clip(root: Path, clip: str) -> Loaded:
    """The CLIP, which :func:`train_clip` made."""
    return load_backbone(f"local-dir:{_folder(root, clip)}", "")


@torch.no_grad()
def classifier(loaded: Loaded, source: str) -> Tensor:
    """The zero-shot classifier ``[embed_dim, classes]``."""
    texts = loaded.tokenizer([f"a photo of the {_GLYPHS[index]}" for index in SOURCES[source]])
    return F.normalize(loaded.model.encode_text(texts), dim=-1).T.contiguous()


@functools.lru_cache(maxsize=2)
def _cells(fonts: tuple[str, ...]) -> Tensor:
    with _recipe(fonts), contextlib.redirect_stdout(None):
        return train_tiny_clip.draw_glyphs()


def _rendered(source: str, fonts: tuple[str, ...], count: int, seed: int) -> tuple[Tensor, np.ndarray]:
    torch.manual_seed(seed)
    cells, glyphs = _cells(fonts), torch.tensor(SOURCES[source])
    labels, chosen = torch.randint(len(glyphs), (count,)), torch.randint(len(cells), (count,))
    views = [
        train_tiny_clip.random_views(cells[chosen[rows], glyphs[labels[rows]]])
        for rows in torch.arange(count).split(_BATCH)
    ]
    return torch.cat(views), labels.numpy()


def _handwritten(loaded: Loaded, split: str) -> tuple[Tensor, np.ndarray]:
    pictures, labels = digits.read_digits(split)
    return torch.stack([loaded.transform(one.convert("RGB")) for one in pictures]), np.array(labels, np.int64)


def corrupt(images: Tensor, kind: str, seed: int) -> Tensor:
    """Images ``[count, 3, height, width]`` in -1 to 1, corrupted."""
    unit = (images + 1) / 2
    if kind == "blurred":
        unit = TF.gaussian_blur(unit, 9, 2.0)
    elif kind == "noisy":
        generator = torch.Generator().manual_seed(seed)
        unit = unit + 0.25 * torch.randn(unit[:, :1].shape, generator=generator)
    elif kind == "low contrast":
        unit = 0.5 + (unit - 0.5) * 0.25
    elif kind == "dimmed":
        unit = 0.3 * unit
    elif kind == "inverted":
        unit = 1 - unit
    elif kind == "rotated":
        unit = TF.rotate(unit, 35)
    elif kind == "greyed":
        unit = 0.6 + 0.4 * unit
    elif kind != "plain":
        raise ValueError(f"no corruption {kind!r}")
    return unit.clamp(0, 1) * 2 - 1


@torch.no_grad()
def _activations(loaded: Loaded, views: Tensor, kind: str, seed: int) -> np.ndarray:
    site, found = Sites.of(loaded.model).default, []
    for batch in corrupt(views, kind, seed).split(_BATCH):
        with reading(loaded.model, [site]) as read:
            loaded.model.encode_image(batch)
        found.append(read[site])
    return torch.cat(found).numpy()


def images(root: Path, clip: str, source: str, corruption: str, sizes: Sizes) -> Images:
    """Activations of pool and test images: encoded once, and then read from a file."""
    path = root / "activations" / f"{clip} {source} {corruption}.npz".replace(" ", "-")
    if not path.exists():
        loaded = load_clip(root, clip)
        if source == "handwritten digits":
            pool = _handwritten(loaded, "train")
            test = [one[: sizes.test] for one in _handwritten(loaded, "test")]
        else:
            fonts = VARIANTS[clip].test_fonts if clip in VARIANTS else ALL_FONTS
            pool = _rendered(source, fonts, sizes.pool, 1)
            test = _rendered(source, fonts, sizes.test, 2)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".partial.npz")
        np.savez(
            scratch,
            pool=_activations(loaded, pool[0], corruption, 1).astype(np.float16), pool_labels=pool[1],
            test=_activations(loaded, test[0], corruption, 2), test_labels=test[1],
        )  # fmt: skip
        scratch.replace(path)
    with np.load(path) as file:
        return Images(**{name: file[name] for name in Images._fields})


def draw(labels: np.ndarray, count: int, shares: str, size: int, seed: int) -> np.ndarray:
    """Row numbers of at most ``size`` images whose classes have the shares of a setting, in random order.

    Shares fall geometrically from the most to the least frequent class. Which class is which, and which half is
    missing, is the same in all settings. Where a class has too few images, there are fewer of all.
    """
    rng = np.random.default_rng(seed)
    if shares == "balanced":
        return rng.permutation(len(labels))[:size]
    if shares == "half missing":
        weights = np.ones(count)
        weights[np.random.default_rng(8).permutation(count)[: count // 2]] = 0
    else:
        ratio = float(shares.removeprefix("1:"))
        weights = (ratio ** (-np.arange(count) / (count - 1)))[np.random.default_rng(7).permutation(count)]
    there = np.bincount(labels, minlength=count)
    scale = min(size / weights.sum(), (there[weights > 0] / weights[weights > 0]).min())
    wanted = (scale * weights).round().astype(int)
    rows = [rng.permutation(np.flatnonzero(labels == label))[: wanted[label]] for label in range(count)]
    return rng.permutation(np.concatenate(rows))[:size]
