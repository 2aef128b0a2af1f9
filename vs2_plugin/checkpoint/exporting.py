"""The SAEs of a checkpoint, written for other libraries. No heavy imports."""

from __future__ import annotations

from pathlib import Path

from vs2_plugin.checkpoint.checkpoint import Checkpoint
from vs2_plugin.errors import CheckpointError, DataError
from vs2_plugin.files import atomic_folder

__all__ = ["FORMATS", "export"]

#: The word for a format -> what reads a folder of it.
FORMATS = {"sparsify": "sparsify.SparseCoder.load_many(FOLDER, local=True)", "saelens": "sae_lens.SAE.load_from_disk"}


def export(checkpoint: Checkpoint, folder: Path, format: str) -> list[Path]:
    """Write each SAE of a checkpoint for another library, into a folder of its own. All are written, or none.

    The weights are those of the checkpoint, so that the SAEs reconstruct as here but for the order of sums. The formats
    have no place for what ``vs2.json`` and the gallery hold.

    Args:
        checkpoint: whose SAEs.
        folder: is made; there is none yet.
        format: one of :data:`FORMATS`.

    Returns:
        The folders of the SAEs.

    Raises:
        CheckpointError: an SAE that the format cannot represent, and why; or a file of the checkpoint is damaged.
        DataError: there is such a folder.
    """
    from vs2_plugin.sae.foreign import WRITERS

    if folder.exists():
        raise DataError(f"{folder} already exists; remove it, or name another folder")
    with atomic_folder(folder) as scratch:
        for site in checkpoint.sites:
            sae, _ = checkpoint.sae(site)
            try:
                WRITERS[format](sae, scratch / site.folder, model=checkpoint.model, block=site.block)
            except CheckpointError as error:
                raise CheckpointError(f"checkpoint {checkpoint.name!r}, {site.folder}: {error}") from error
    return [folder / site.folder for site in checkpoint.sites]
