"""The files of a checkpoint that are copied into another folder, or to and from a hub."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from vs2_plugin.checkpoint.card import CARD
from vs2_plugin.checkpoint.manifest import MANIFEST
from vs2_plugin.checkpoint.records import SiteSAE

__all__ = ["GALLERY", "PATTERNS", "copy_files"]

#: The folder of the gallery, beside the first SAE's files.
GALLERY = "gallery"
#: The files that are fetched from a repository; none of them holds code.
PATTERNS = (CARD, MANIFEST, "*/cfg.json", "*/sae.safetensors", f"*{GALLERY}/*.npy", f"*{GALLERY}/*.npy.sha256")


def copy_files(source: Path, sites: Sequence[SiteSAE], gallery: Path | None, target: Path) -> None:
    """Copy the SAEs and, if its folder is given, the gallery, without files that can be made from it again."""
    for site in sites:
        (target / site.folder).mkdir()
        for name in site.files:
            shutil.copyfile(source / site.folder / name, target / site.folder / name)
    for file in sorted(gallery.glob("*/*.npy*") if gallery is not None else ()):
        folder = target / sites[0].folder / GALLERY / file.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / file.name)
