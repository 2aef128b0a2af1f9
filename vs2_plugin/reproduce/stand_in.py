"""Makes the offline stand-in of a table: the tiny CLIP replaces every model, handwritten digits every data set."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vs2_plugin.demo.digits import CLASSES, TINY_CLIP, write_digits
from vs2_plugin.errors import SettingError
from vs2_plugin.files import atomic_folder
from vs2_plugin.modelstring import ModelString
from vs2_plugin.reproduce.cells import Cell, Sae, Table
from vs2_plugin.settings import whole

__all__ = ["DATASET", "MODEL", "ROOT", "stand_in", "workplace"]

MODEL, DATASET, ROOT = "local-dir:tiny-clip", "wds/digits", "digits"
_BLOCKS, _WIDTH = 4, 128  # of the tiny CLIP
#: Activations seen in training: few, but enough for the digits.
_SAMPLES = 20_000


def workplace(folder: Path, write: bool) -> Path:
    """Return the folder to work in: ``folder``, into which missing digits and the tiny CLIP are written.

    Without ``write``, nothing is written, and a missing folder is replaced by the current one.
    """
    sources: dict[str, Callable[[Path], object]] = {
        ROOT: write_digits,
        "tiny-clip": lambda path: shutil.copytree(TINY_CLIP, path, dirs_exist_ok=True),
    }
    if not write:
        return folder.absolute() if folder.is_dir() else Path.cwd()
    for name, fill in sources.items():
        if not (folder / name).exists():
            with atomic_folder(folder / name) as scratch:
                fill(scratch)
    return folder.absolute()


def stand_in(table: Table) -> Table:
    """Return the table with every model and data set replaced, and without the published numbers.

    The title names the file and the stand-in, but neither the paper nor its models and data sets.

    Raises:
        SettingError: open_clip does not know a backbone, so that its size is unknown.
    """
    names = dict.fromkeys(cell.of_class for cell in table.cells if cell.of_class)
    classes = {name: CLASSES[number % len(CLASSES)] for number, name in enumerate(names)}
    cells = tuple(_cell(cell, classes) for cell in table.cells)
    title = f"The tiny CLIP on handwritten digits, by {table.path.name}"
    return replace(table, title=title, source="", cells=cells, stand_in=True)


def _cell(cell: Cell, classes: Mapping[str, str]) -> Cell:
    blocks, width = _size(cell.backbone)
    sae = cell.sae
    if sae is not None:
        flags = tuple(sorted(_flags(dict(sae.flags), blocks, width).items()))
        sae = Sae(MODEL, "", (DATASET,), flags)
    return replace(
        cell,
        published=None,
        model=None if cell.model is None else _model(cell.spec, blocks),
        backbone=MODEL,
        weights="",
        dataset=DATASET,
        sae=sae,
        of_class=classes.get(cell.of_class or ""),
    )


def _size(backbone: str) -> tuple[int, int]:
    """Return the number of blocks and the width of a vision tower."""
    if backbone == MODEL:
        return _BLOCKS, _WIDTH
    import open_clip

    vision = (open_clip.get_model_config(backbone) or {}).get("vision_cfg", {})
    if not isinstance(vision.get("layers"), int):
        raise SettingError(f"no stand-in for {backbone!r}: expected a ViT that open_clip knows")
    return vision["layers"], vision["width"]


def _model(spec: ModelString | None, blocks: int) -> str:
    if spec is None:
        return MODEL
    options = {key: value for key, value in spec.given.items() if key != "encoder"}  # not available offline
    if options.get("blocks", "all") != "all":
        numbers = sorted({_block(int(number), blocks) for number in str(options["blocks"]).split("+")})
        options["blocks"] = "+".join(map(str, numbers))
    return str(replace(spec, backbone=MODEL, given=options))


def _block(number: int, blocks: int) -> int:
    """Return the block of the tiny CLIP that is as far from the end as block ``number`` of ``blocks``.

    >>> _block(11, 12), _block(9, 12), _block(0, 12)
    (3, 1, 0)
    """
    return max(0, _BLOCKS - (blocks - number))


def _flags(flags: dict[str, Any], blocks: int, width: int) -> dict[str, Any]:
    for name in ("retrieval_encoder", "calibrate_on", "max_images"):
        flags.pop(name, None)
    if "blocks" in flags:
        words = (word if whole(word) is None else _block(int(word), blocks) for word in flags["blocks"])
        flags["blocks"] = tuple(dict.fromkeys(words))
    # The number of latents per dimension and the share of active latents stay the same.
    flags["k"] = max(1, min(_WIDTH, round(flags.get("k", 64) * _WIDTH / width)))
    # The paper's learning rate would need the paper's number of steps.
    return {**flags, "recipe": "default", "samples": _SAMPLES}
