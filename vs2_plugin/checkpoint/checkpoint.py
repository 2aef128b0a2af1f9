"""One checkpoint: a folder with an SAE per site, as EleutherAI sparsify lays them out, and ``vs2.json`` beside them.

<name>/
  vs2.json                                   this package's own facts
  visual.transformer.resblocks.11/           the plain SAE of a site
    cfg.json
    sae.safetensors
  visual.transformer.resblocks.11.pass/      the one trained by PASS, with labels
  gallery/                                   see checkpoint.gallery; may be absent
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vs2_plugin import __version__
from vs2_plugin.errors import CheckpointError, CheckpointNotFound
from vs2_plugin.files import atomic_folder

if TYPE_CHECKING:
    from torch import Tensor

    from vs2_plugin.clip.backbone import Tower
    from vs2_plugin.gallery.files import GalleryFiles
    from vs2_plugin.sae.topk import TopKSAE

__all__ = ["MANIFEST", "Checkpoint", "SiteFacts", "save_checkpoint"]

MANIFEST = "vs2.json"
GALLERY = "gallery"
_FORMAT = "vs2-checkpoint"
_VERSION = 1


@dataclass(frozen=True)
class SiteFacts:
    """One SAE of a checkpoint."""

    hookpoint: str
    """The site."""
    variant: str
    """``plain``, or ``pass`` for an SAE that was trained by PASS."""
    labels: str
    """The labels used in its training: ``none`` or ``train``."""
    width: int
    """d."""
    mean: list[float]
    """μ, ``d`` numbers: mean activation over the unlabeled training split."""
    fvu: float
    """FVU over held-out training activations."""
    fvu_quantiles: dict[str, float]
    """Quantile, as text, -> per-sample FVU over held-out training activations."""
    training: dict[str, Any]
    """The settings of the training, and its figures."""
    files: dict[str, str]
    """File name -> SHA-256, for each file of the SAE."""

    @property
    def folder(self) -> str:
        """The name of the SAE's folder in the checkpoint."""
        return self.hookpoint if self.variant == "plain" else f"{self.hookpoint}.{self.variant}"

    @property
    def block(self) -> int | None:
        """The number of the block, counted from 0; None at the output embedding."""
        number = self.hookpoint.rpartition(".")[2]
        return int(number) if number.isdigit() else None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, as ``vs2.json`` tells it. The SAEs themselves are read by :meth:`load`."""

    folder: Path
    """Where it lies."""
    digest: str
    """SHA-256 over what results depend on: tower, data, gallery, sites, means, quantiles and the SAEs' files."""
    backbone: str
    """open_clip model name that it was trained for."""
    pretrained: str
    """Weights tag or file."""
    tower: dict[str, Any]
    """What identifies the vision tower; see :class:`vs2_plugin.clip.backbone.Tower`."""
    data: dict[str, Any]
    """``datasets``, ``split``, ``images``, ``transductive``, ``amp``."""
    sites: list[SiteFacts]
    """One per SAE: the plain ones in the order of the tower, then those of other variants."""
    gallery: dict[str, Any] | None = None
    """What the gallery holds, if there is one; see :mod:`vs2_plugin.gallery.files`."""
    created: dict[str, Any] = field(default_factory=dict)
    """Versions of the software, and the command."""

    @classmethod
    def open(cls, folder: Path | str) -> Checkpoint:
        """Read ``vs2.json``.

        Raises:
            CheckpointNotFound: there is none.
            CheckpointError: it is damaged or of another format version.
        """
        folder = Path(folder)
        path = folder / MANIFEST
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise CheckpointNotFound(
                f"no SAE checkpoint in {folder}: no readable {MANIFEST} ({error.strerror})"
            ) from error
        try:
            facts = json.loads(raw)
            if not isinstance(facts, dict) or facts.get("format") != _FORMAT:
                raise CheckpointError(f"{path} is no {_FORMAT} file")
            if facts.get("format_version") != _VERSION:
                raise CheckpointError(
                    f"{path} has format version {facts.get('format_version')}, this vs2-plugin "
                    f"({__version__}) reads {_VERSION}; "
                    "train the checkpoint again or install the version that wrote it"
                )
            sites = [SiteFacts(**{f.name: site[f.name] for f in fields(SiteFacts)}) for site in facts["sites"]]
            names = ("backbone", "pretrained", "tower", "data", "created")
            found = cls(
                folder=folder,
                digest=_digest(facts),
                sites=sites,
                gallery=facts.get("gallery"),
                **{name: facts[name] for name in names},
            )
            whole = bool(sites) and all(len(site.mean) == site.width for site in sites)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} is damaged: {type(error).__name__} {error}; train the checkpoint again"
            ) from error
        if not whole:
            raise CheckpointError(
                f"{path} is damaged: no sites, or a mean of another width; train the checkpoint again"
            )
        return found

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def transductive(self) -> bool:
        """Whether it was trained on the images that are evaluated."""
        return bool(self.data.get("transductive"))

    def select(self, blocks: str | None = None, variant: str = "plain") -> list[SiteFacts]:
        """The SAEs of a variant at ``blocks``: numbers joined by ``+``, ``all``, or None for the last site there is.

        Raises:
            CheckpointError: it has none there.
        """
        sites = [site for site in self.sites if site.variant == variant]
        if not sites:
            there = " and ".join(sorted({site.variant for site in self.sites}))
            how = " and --pass_weight 0.8 (it reads the training labels)" if variant == "pass" else ""
            raise CheckpointError(
                f"checkpoint {self.name!r} has no {variant} SAE, only {there}; add one to it by vs2-train-sae with its "
                f"--model, --pretrained and --dataset{how}"
            )
        if blocks is None:
            return [sites[-1]]
        at_blocks = {site.block: site for site in sites if site.block is not None}
        wanted = sorted(at_blocks) if blocks == "all" else sorted({int(number) for number in blocks.split("+")})
        missing = [str(number) for number in wanted if number not in at_blocks]
        if missing or not wanted:
            there = " ".join(map(str, sorted(at_blocks))) or f"none, only {sites[-1].hookpoint}"
            raise CheckpointError(
                f"checkpoint {self.name!r} has no SAE at block {' '.join(missing) or blocks} (its blocks: "
                f"{there}); train them with "
                f"vs2-train-sae --blocks {' '.join(map(str, wanted)) or 'all'}"
            )
        return [at_blocks[number] for number in wanted]

    def require_tower(self, tower: Tower) -> None:
        """Refuse a tower other than the one that the SAEs were trained on.

        Raises:
            CheckpointError: saying what differs.
        """
        from vs2_plugin.clip.backbone import Tower

        try:
            trained_on = Tower.from_json(self.tower)
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{self.folder / MANIFEST} is damaged: tower lacks {error}") from error
        difference = trained_on.difference(tower)
        if difference:
            raise CheckpointError(
                f"checkpoint {self.name!r} ({self.backbone}, {self.pretrained or 'random weights'}) is of "
                f"another tower: {difference}"
            )

    def require_gallery(self, labels: bool = False, encoder: str = "clip", n: int = 1) -> dict[str, Any]:
        """What the gallery holds, as ``vs2.json`` says.

        Args:
            labels: whether training labels are needed.
            encoder: the embeddings that are needed.
            n: how many images, at least.

        Raises:
            CheckpointError: there is none, or it lacks something.
        """
        again = "; train the checkpoint again by the same vs2-train-sae command with --overwrite"
        if self.gallery is None:
            raise CheckpointError(f"checkpoint {self.name!r} has no gallery of training images{again}")
        if labels and not self.gallery.get("labels"):
            raise CheckpointError(
                f"checkpoint {self.name!r} keeps no training labels, which an oracle reads{again} --gallery_labels"
            )
        encoders = self.gallery.get("encoders", {})
        if encoder not in encoders:
            there = ", ".join(encoders)
            raise CheckpointError(
                f"checkpoint {self.name!r} has no embeddings by {encoder!r} (there: {there}){again} "
                f"--retrieval_encoder {encoder}"
            )
        count = sum(part["count"] for part in self.gallery.get("parts", []))
        if n > count:
            raise CheckpointError(f"n is {n}, and the gallery of checkpoint {self.name!r} holds {count} images")
        return self.gallery

    def load(self, site: SiteFacts) -> tuple[TopKSAE, Tensor]:
        """Read the SAE of ``site`` and its mean ``[d]``, verified against ``vs2.json``.

        Raises:
            CheckpointError: a file is missing, changed or of another shape.
        """
        import torch

        from vs2_plugin.sae.files import load_sae

        folder = self.folder / site.folder
        for name, expected in site.files.items():
            try:
                found = _sha256(folder / name)
            except OSError as error:
                raise CheckpointError(
                    f"checkpoint {self.name!r} is damaged: {folder / name}: {error.strerror}"
                ) from error
            if found != expected:
                raise CheckpointError(
                    f"checkpoint {self.name!r} is damaged: {folder / name} is not the file that was written (SHA-256 "
                    f"{found[:12]}, expected {expected[:12]})"
                )
        sae = load_sae(folder)
        if sae.config.d_in != site.width:
            raise CheckpointError(
                f"checkpoint {self.name!r}: the SAE at {site.hookpoint} has width {sae.config.d_in}, "
                f"expected {site.width}"
            )
        return sae, torch.tensor(site.mean, dtype=torch.float32)

    def verify(self) -> None:
        """Read every file of the checkpoint. Raises CheckpointError at the first that is not whole."""
        from vs2_plugin.gallery.files import open_gallery

        for site in self.sites:
            self.load(site)
        if self.gallery is not None:
            open_gallery(self)


def save_checkpoint(
    folder: Path,
    *,
    backbone: str,
    pretrained: str,
    tower: Tower,
    data: dict[str, Any],
    saes: Sequence[tuple[SiteFacts, TopKSAE]],
    created: dict[str, Any],
    gallery: GalleryFiles | None = None,
) -> Checkpoint:
    """Write a checkpoint so that ``folder`` holds either all of it or what was there before.

    The ``files`` of each :class:`SiteFacts` are filled in here. The gallery's files are linked, where that can be.
    """
    from vs2_plugin.sae.files import CONFIG_FILE, WEIGHTS_FILE, save_sae

    with atomic_folder(folder) as scratch:
        sites = []
        for facts, sae in saes:
            save_sae(sae, scratch / facts.folder)
            digests = {name: _sha256(scratch / facts.folder / name) for name in (CONFIG_FILE, WEIGHTS_FILE)}
            sites.append({**asdict(facts), "files": digests})
        facts = {
            "format": _FORMAT,
            "format_version": _VERSION,
            "backbone": backbone,
            "pretrained": pretrained,
            "tower": tower.to_json(),
            "data": data,
            "sites": sites,
            "created": {"vs2_plugin": __version__, **created},
        }
        if gallery is not None:
            facts["gallery"] = gallery.write(scratch / GALLERY)
        (scratch / MANIFEST).write_text(json.dumps(facts, indent=1) + "\n")
    return Checkpoint.open(folder)


def _digest(facts: dict[str, Any]) -> str:
    # Without times, versions and commands: the same training gives the same digest.
    sites = [{key: value for key, value in site.items() if key != "training"} for site in facts["sites"]]
    whole = [facts["tower"], facts["data"], sites, facts.get("gallery")]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else hashlib.sha256(file.read()).hexdigest()
        )
