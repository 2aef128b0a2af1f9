"""The SAEs of a checkpoint, written for other libraries. No heavy imports."""

from __future__ import annotations

from pathlib import Path

from vs2_plugin.checkpoint.checkpoint import Checkpoint
from vs2_plugin.errors import CheckpointError, DataError
from vs2_plugin.files import atomic_folder

__all__ = ["FORMATS", "export"]

#: Format -> the other library's function that reads a folder of it.
FORMATS = {"sparsify": "sparsify.SparseCoder.load_many(FOLDER, local=True)", "saelens": "sae_lens.SAE.load_from_disk"}


def export(checkpoint: Checkpoint, folder: Path, format: str) -> list[Path]:
    """Write each SAE of a checkpoint for another library, into a folder of its own. All are written, or none.

    The weights are those of the checkpoint, so that reconstructions are the same up to the order of sums. The formats
    have no place for the contents of ``vs2.json`` and of the gallery.

    Args:
        checkpoint: the checkpoint with the SAEs.
        folder: the new folder, which must not exist yet.
        format: one of :data:`FORMATS`.

    Returns:
        The folders of the SAEs.

    Raises:
        CheckpointError: the format cannot represent an SAE, or a file of the checkpoint is damaged.
        DataError: ``folder`` exists already, or cannot be written.
    """
    from vs2_plugin.sae.foreign import WRITERS

    if folder.exists():
        raise DataError(f"{folder} already exists; remove it, or name another folder")
    try:
        with atomic_folder(folder) as scratch:
            for site in checkpoint.sites:
                sae, _ = checkpoint.sae(site)
                try:
                    WRITERS[format](sae, scratch / site.folder, model=checkpoint.model, block=site.block)
                except CheckpointError as error:
                    raise CheckpointError(f"checkpoint {checkpoint.name!r}, {site.folder}: {error}") from error
    except OSError as error:
        raise DataError(f"cannot write into {folder}: {error.strerror or error}; name another folder") from error
    return [folder / site.folder for site in checkpoint.sites]
