"""The files of a checkpoint that travel: into another folder, to a hub and from there."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from vs2_plugin.checkpoint.card import CARD
from vs2_plugin.checkpoint.manifest import MANIFEST
from vs2_plugin.checkpoint.records import SiteSAE
from vs2_plugin.gallery.contents import GalleryContents

__all__ = ["GALLERY", "PATTERNS", "are_there", "copy_files"]

#: The folder of the gallery, beside the first SAE's files.
GALLERY = "gallery"
#: All that is fetched of a repository: nothing there that a program could run.
PATTERNS = (CARD, MANIFEST, "*/cfg.json", "*/sae.safetensors", f"*{GALLERY}/*.npy", f"*{GALLERY}/*.npy.sha256")


def copy_files(source: Path, sites: Sequence[SiteSAE], gallery: Path | None, target: Path) -> None:
    """Copy the SAEs and, if one is named, the folder of the gallery, without what can be made of it again."""
    for site in sites:
        (target / site.folder).mkdir()
        for name in site.files:
            shutil.copyfile(source / site.folder / name, target / site.folder / name)
    for file in sorted(gallery.glob("*/*.npy*") if gallery is not None else ()):
        folder = target / sites[0].folder / GALLERY / file.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / file.name)


def are_there(folder: Path, sites: Sequence[SiteSAE], gallery: GalleryContents | None, gallery_folder: Path) -> bool:
    """Tell whether all files are there, whatever is in them."""
    files = [folder / site.folder / name for site in sites for name in site.files]
    for number, part in enumerate(() if gallery is None else gallery.parts):
        files += [gallery_folder / str(number) / f"{name}.npy" for name in part.contents or ()]
    return all(file.is_file() for file in files)
