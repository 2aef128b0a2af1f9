"""One checkpoint: a folder with an SAE per site, as EleutherAI sparsify lays them out, and ``vs2.json`` beside them.

<name>/
  vs2.json                                   this package's own facts
  visual.transformer.resblocks.11/           the plain SAE of a site
    cfg.json
    sae.safetensors
    gallery/                                 optional, in the first SAE's folder; see gallery.files
  visual.transformer.resblocks.11.pass/      the one trained by PASS, with labels

sparsify's load_many takes each folder at the top for an SAE, so no other folder may lie there. Before version 0.2, the
gallery did.

No heavy imports: the harness looks a checkpoint up before it loads anything.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vs2_plugin import __version__
from vs2_plugin.checkpoint.card import CARD, card, is_by_hand, license_of
from vs2_plugin.checkpoint.manifest import AGAIN, MANIFEST, manifest_digest, read_manifest, write_manifest
from vs2_plugin.checkpoint.records import GIVEN, SiteSAE, TrainingData, problems
from vs2_plugin.checkpoint.sharing import GALLERY, PATTERNS, copy_files
from vs2_plugin.checkpoint.typed import typed
from vs2_plugin.clip.tower import Tower
from vs2_plugin.documented import documented
from vs2_plugin.errors import CheckpointError, CheckpointNotFound, CheckpointReplaced, DataError
from vs2_plugin.files import alone, atomic_folder, file_digest, hidden, settle
from vs2_plugin.gallery.contents import GalleryContents
from vs2_plugin.names import Repository, with_weights
from vs2_plugin.text import counted

if TYPE_CHECKING:
    from torch import Tensor

    from vs2_plugin.gallery.files import GalleryFiles
    from vs2_plugin.gallery.gallery import Gallery
    from vs2_plugin.sae.topk import TopKSAE

__all__ = ["Checkpoint", "save_checkpoint"]


@documented
@dataclass(frozen=True, repr=False)
class Checkpoint:
    """A checkpoint, as its ``vs2.json`` describes it; :meth:`sae` reads the SAEs. Its ``repr`` is a summary.

    Example::

        >>> import tempfile
        >>> import numpy as np
        >>> import vs2_plugin
        >>> x = np.random.default_rng(0).normal(size=(100, 16))  # activations
        >>> saved = vs2_plugin.train(x, samples=1000, quiet=True, store=tempfile.mkdtemp())
        >>> checkpoint = vs2_plugin.Checkpoint.load(saved.folder)
        >>> sae, mean = checkpoint.sae(checkpoint.sites[0])
        >>> sae.W_dec.shape, mean.shape
        (torch.Size([64, 16]), torch.Size([16]))
    """

    folder: Path
    """Folder of the checkpoint."""
    digest: str
    """SHA-256 over all that results depend on: tower, data, gallery, sites, means, quantiles and the SAEs' files."""
    backbone: str
    """Name of the model that the SAEs were trained for; empty without a tower."""
    pretrained: str
    """Weights tag or file."""
    tower: Tower | None
    """The CLIP tower that the SAEs steer; None if they were trained on activations of unknown origin."""
    data: TrainingData
    sites: list[SiteSAE]
    """The SAEs: the plain ones in the order of the tower's blocks, then those of other variants."""
    gallery: GalleryContents | None = None
    """Contents of the gallery, if there is one."""
    created: dict[str, str] = field(default_factory=dict)
    """Versions of the software, and the command with the folder that it wrote."""
    hub: str = ""
    """``hf:owner/name[#revision]``, if the checkpoint lies in a hub's cache."""

    def __repr__(self) -> str:
        data = self.data
        marks = ", transductive" if data.transductive else ""
        lines = [f"Checkpoint {self.name!r} of {self.model}, {self.sites[0].trained} {data}{marks}"]
        for site in self.sites:
            dead, k = site.training.get("dead"), site.training.get("k")
            figures = f"width {site.width}" + ("" if k is None else f", {k} latents active") + f", FVU {site.fvu:.4f}"
            lines.append(f"{site.folder}: {figures}" + (f", {dead:.1%} dead" if isinstance(dead, float) else ""))
        gallery = "no gallery" if self.gallery is None else f"a gallery of {counted(self.gallery.count, 'image')}"
        return "\n  ".join([*lines, f"{gallery}; in {self.folder}"])

    @classmethod
    def load(cls, folder: Path | str) -> Checkpoint:
        """Read the checkpoint in ``folder`` from its ``vs2.json``.

        Raises:
            CheckpointNotFound: there is no readable ``vs2.json``.
            CheckpointError: ``vs2.json`` is damaged or of another format version.
        """
        if not isinstance(folder, (str, Path)):
            raise CheckpointError(f"checkpoint {folder!r:.80}: expected the path of its folder")
        folder = Path(folder)
        if folder.name in ("", ".."):  # "." and ".." do not tell the checkpoint's name
            folder = folder.resolve()
        settle(folder)
        values = read_manifest(folder)
        try:
            checkpoint: Checkpoint = typed(cls, {**values, "folder": folder, "digest": "", "hub": ""})
            for problem in problems(checkpoint.data, checkpoint.sites, checkpoint.gallery):
                raise ValueError(problem)
            checkpoint = replace(checkpoint, digest=manifest_digest(values))
            if values.get("digest", checkpoint.digest) != checkpoint.digest:  # none before version 0.2
                raise ValueError("it is not what was written: its digest does not match its values")
            return checkpoint
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{folder / MANIFEST} is damaged: {error}; {AGAIN}") from error

    @classmethod
    def from_hub(cls, repository: str, revision: str | None = None, *, refresh: bool = False) -> Checkpoint:
        """Read a checkpoint from a hub's cache, without asking the hub, or else from the hub. No code is run.

        Args:
            repository: ``owner/name``.
            revision: a branch, tag or commit; None for the main branch.
            refresh: ask the hub for a newer version, and fetch damaged files again.

        Raises:
            HubError: the repository does not exist, or the hub cannot be reached.
            CheckpointError: the repository holds no checkpoint, or a damaged one.

        Example::

            checkpoint = vs2_plugin.Checkpoint.from_hub("owner/name", revision="v1.0")
        """
        from vs2_plugin.hub import download

        address = str(Repository(repository, revision))
        if not refresh:
            return cls._of_hub(download(repository, revision, PATTERNS, _is_whole), address)
        for again in (False, True):  # what is damaged in the cache is fetched a second time
            try:
                checkpoint = cls._of_hub(download(repository, revision, PATTERNS, again=again), address)
                checkpoint.verify()
                return checkpoint
            except _DamagedCopy as error:
                damage = error
        raise CheckpointError(f"{damage.problem}; it is the same on the hub: tell whoever pushed it") from damage

    @classmethod
    def _of_hub(cls, folder: Path, hub: str) -> Checkpoint:
        """Read a checkpoint that lies in a hub's cache."""
        try:
            checkpoint = replace(cls.load(folder), hub=hub)
        except CheckpointNotFound as error:
            raise CheckpointError(f"{hub} holds no {MANIFEST}; expected a checkpoint that vs2 store push "
                                  "wrote") from error
        except CheckpointError as error:
            raise _DamagedCopy(hub, error) from error
        if not _are_there(checkpoint):
            raise CheckpointError(f"checkpoint {hub!r} lacks files that its {MANIFEST} names")
        return checkpoint

    @property
    def name(self) -> str:
        """The folder's name, or :attr:`hub` for a checkpoint of a hub."""
        return self.hub or self.folder.name

    @property
    def model(self) -> str:
        """The model that the SAEs were trained for, in words."""
        return "no CLIP" if self.tower is None else with_weights(self.backbone, self.pretrained)

    @property
    def free_name(self) -> str:
        """A name made from the folder's, that nothing beside the folder has."""
        names = (f"{self.folder.name}-{number}" for number in itertools.count(2))
        return next(name for name in names if not self.folder.with_name(name).exists())

    @property
    def gallery_folder(self) -> Path:
        """Folder of the gallery's files."""
        at_top = self.folder / GALLERY
        return at_top if at_top.is_dir() else self.folder / self.sites[0].folder / GALLERY

    @property
    def transductive(self) -> bool:
        """Whether the SAEs were trained on images that are evaluated."""
        return self.data.transductive

    def select(self, blocks: object = None, variant: str = "plain") -> list[SiteSAE]:
        """Return the SAEs of a variant at ``blocks``: numbers joined by ``+``, ``all``, or None for the last site.

        Raises:
            CheckpointError: the checkpoint has no such SAE.
        """
        sites = [site for site in self.sites if site.variant == variant]
        if not sites:
            variants = " and ".join(sorted({site.variant for site in self.sites}))
            how = " and --pass_weight 0.8 (it reads the training labels)" if variant == "pass" else ""
            again = "train your own with" if self.hub else "add one to it with"
            again += f" vs2-train-sae with its --model, --pretrained and --dataset{how}"
            raise CheckpointError(
                f"checkpoint {self.name!r} has no {variant} SAE, only {variants}; "
                f"{self._again() if self.tower is None else again}"
            )
        return [sites[-1]] if blocks is None else self._at_blocks(str(blocks), sites)

    def _at_blocks(self, blocks: str, sites: Sequence[SiteSAE]) -> list[SiteSAE]:
        at_block = {site.block: site for site in sites if site.block is not None}
        numbers = sorted(at_block) if blocks == "all" else sorted({int(number) for number in blocks.split("+")})
        missing = [str(number) for number in numbers if number not in at_block]
        if missing or not numbers:
            present = " ".join(map(str, sorted(at_block))) or f"none, only {sites[-1].hookpoint}"
            at_output = ["output"] if at_block and len(at_block) < len(sites) else []  # training replaces all SAEs
            all_blocks = " ".join(map(str, [*sorted({*numbers, *at_block}), *at_output])) or "all"
            raise CheckpointError(
                f"checkpoint {self.name!r} has no SAE at block {' '.join(missing) or blocks} (its blocks: {present}); "
                f"{self._again(f'--blocks {all_blocks}')}"
            )
        return [at_block[number] for number in numbers]

    def _again(self, flags: str = "") -> str:
        """Return in words how to make the checkpoint again with ``flags``; one from a hub is trained anew."""
        if self.tower is None:
            return "it is of activations without a model, which have neither blocks, labels nor a gallery"
        if self.hub:
            return f"train your own with vs2-train-sae {flags}".rstrip()
        command = self.created.get("command")  # which vs2 classify and others run without its being typed
        same = "the same vs2-train-sae command" + (f" ({command})" if command else "")
        return f"{AGAIN} with {same} and --overwrite {flags}".rstrip()

    def require_tower(self, tower: Tower, backbone: str, method: str = "vs2") -> None:
        """Refuse a tower other than the one that the SAEs were trained on.

        Models from two folders or weights files of the same name have checkpoints of the same name by default.

        Args:
            tower: the tower that is to be steered.
            backbone: the name of the tower's model.
            method: the name of the steering method, for the error.

        Raises:
            CheckpointError: the towers differ; the message says in what.
        """
        if self.tower is None:
            raise CheckpointError(
                f"checkpoint {self.name!r} was trained on activations of an unnamed tower, and cannot steer one; train "
                f"it again with --model {backbone} and its --pretrained"
            )
        difference = self.tower.difference(tower)
        if difference and self.hub:
            raise CheckpointError(f"checkpoint {self.name!r} steers only {self.model}: {difference}")
        if difference:
            raise CheckpointError(
                f"checkpoint {self.name!r} ({self.model}) is for another tower: {difference}; for {backbone} as it is "
                f"loaded now, add --name {self.free_name} to its vs2-train-sae command and evaluate it as "
                f"{method}:{backbone}@{self.free_name}, or replace the checkpoint with --overwrite"
            )

    def require_gallery(self, labels: bool = False, encoder: str = "clip", n: int = 1) -> GalleryContents:
        """Return the contents of the gallery, if it holds all that is needed.

        Args:
            labels: whether training labels are needed.
            encoder: the retrieval encoder whose embeddings are needed.
            n: the number of images needed.

        Raises:
            CheckpointError: there is no gallery, or it lacks something.
        """
        if self.gallery is None:
            if GIVEN in self.data.splits:
                again = "train one on images, with their gallery"
            elif self.hub:
                again = f"whoever pushed it can add theirs with vs2 store push --gallery, or {self._again()}"
            else:
                again = self._again("and without --no_gallery")
            raise CheckpointError(f"checkpoint {self.name!r} has no gallery of training images; {again}")
        if labels and not self.gallery.labels:
            raise CheckpointError(
                f"checkpoint {self.name!r} keeps no training labels, which an oracle needs; "
                f"{self._again('--gallery_labels')}"
            )
        if encoder not in self.gallery.encoders:
            raise CheckpointError(
                f"checkpoint {self.name!r} has no embeddings by {encoder!r} (available: "
                f"{', '.join(self.gallery.encoders)}); {self._again(f'--retrieval_encoder {encoder}')}"
            )
        if n > self.gallery.count:
            raise CheckpointError(
                f"n is {n}, but the gallery of checkpoint {self.name!r} holds {self.gallery.count} images"
            )
        return self.gallery

    def open_gallery(self, thorough: bool = False) -> Gallery:
        """Open the gallery, its large arrays memory-mapped.

        Args:
            thorough: compare every array with its digests; otherwise, those that have changed since the last time.

        Raises:
            CheckpointError: there is no gallery, or a file is missing, damaged or of another shape.
        """
        from vs2_plugin.gallery.files import open_gallery

        widths = {site.hookpoint: site.width for site in self.sites}
        with self._reading():
            return open_gallery(self.gallery_folder, self.require_gallery(), widths, thorough)

    def sae(self, site: SiteSAE) -> tuple[TopKSAE, Tensor]:
        """Read the SAE of ``site``, verified by the digests in ``vs2.json``, and the site's mean activation ``[d]``.

        Raises:
            CheckpointError: a file is missing, changed or of another shape, or ``site`` is none of :attr:`sites`.
        """
        if not isinstance(site, SiteSAE):
            raise CheckpointError(f"site {site!r:.80}: expected one of the checkpoint's sites, such as sites[-1]")
        import torch

        from vs2_plugin.sae.files import load_sae

        folder = self.folder / site.folder
        with self._reading():
            self._compare(folder, site)
            sae = load_sae(folder)
        if sae.config.d_in != site.width:
            raise CheckpointError(
                f"checkpoint {self.name!r}: the SAE at {site.hookpoint} has width {sae.config.d_in}, "
                f"expected {site.width}"
            )
        return sae, torch.tensor(list(map(float, site.mean)), dtype=torch.float32)

    def _compare(self, folder: Path, site: SiteSAE) -> None:
        """Refuse an SAE whose files are not those that were written."""
        for name, expected in site.files.items():
            try:
                digest = file_digest(folder / name)
            except OSError as error:
                damage = f"checkpoint {self.name!r} is damaged: {folder / name}: {error.strerror}"
                raise CheckpointError(hidden(error, folder / name) or damage) from error
            if digest != expected:
                raise CheckpointError(
                    f"checkpoint {self.name!r} is damaged: {folder / name} is not the file that was written (SHA-256 "
                    f"{digest[:12]}, expected {expected[:12]})"
                )

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turn an error in the block into one that says if the checkpoint was replaced or damaged, and what helps."""
        try:
            yield
        except CheckpointError as error:
            if self._is_replaced():
                raise CheckpointReplaced(
                    f"checkpoint {self.name!r} was replaced while it was being read; run the same command again"
                ) from error
            if self.hub:
                raise _DamagedCopy(self.hub, error) from error
            command = self.created.get("command")
            if command is None or isinstance(error.__cause__, PermissionError):
                raise
            raise CheckpointError(f"{str(error).removesuffix(f'; {AGAIN}')}; {self._remake(command)}") from error

    def _remake(self, command: str) -> str:
        """Return in words how to mend damage. The command that made a checkpoint writes the folder that it wrote then,
        so that for a copy of it, ``--overwrite`` would replace the original."""
        once, origin = command.replace(" --overwrite", ""), self.created.get("folder")
        if origin == os.path.realpath(self.folder):
            return f"make it again with: {once} --overwrite"
        is_there = origin is not None and os.path.isdir(origin)
        again = f"copy it again from {origin}" if is_there else "if it is a copy, copy it again"
        return f"{again}; it was made with: {once}"

    def _is_replaced(self) -> bool:
        try:
            return not self.hub and Checkpoint.load(self.folder).digest != self.digest
        except CheckpointError:
            return False

    def note(self, site: SiteSAE, told: Mapping[str, float | str | None]) -> bool:
        """Add figures to the record of an SAE in ``vs2.json``; the digest does not cover them and stays the same.

        Args:
            site: the SAE.
            told: name -> figure; None removes the figure.

        Returns:
            Whether they were written: not in a hub's cache, nor if the checkpoint cannot be written or was replaced.
        """
        if self.hub:
            return False
        with suppress(OSError, DataError, CheckpointError), alone(self.folder, seconds=0):
            values = read_manifest(self.folder)
            if manifest_digest(values) != self.digest:
                return False
            for record in values["sites"]:
                if (record["hookpoint"], record["variant"]) == (site.hookpoint, site.variant):
                    others = {name: value for name, value in record["training"].items() if name not in told}
                    record["training"] = others | {name: value for name, value in told.items() if value is not None}
            write_manifest(self.folder, values)
            return True
        return False

    def save(
        self, folder: Path | str, *, gallery: bool = True, overwrite: bool = False, portable: bool = False
    ) -> Checkpoint:
        """Copy the checkpoint into a new folder, with a model card; with ``portable``, the folder is fit for upload.

        Args:
            folder: the new folder, which must not exist yet.
            gallery: whether to copy the gallery.
            overwrite: replace a checkpoint that exists at ``folder``.
            portable: leave out what concerns this machine, as :meth:`push_to_hub` does.

        Raises:
            DataError: ``folder`` exists already.
            CheckpointError: a file of the checkpoint is damaged.
            OSError: the folder cannot be written.
        """
        folder = Path(os.path.expanduser(folder))
        if folder.exists() and not (overwrite and (folder / MANIFEST).is_file()):
            raise DataError(f"{folder} already exists; name a new folder")
        self.verify()
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(folder) as scratch:
            self._copy(scratch, gallery, folder.name, None, portable)
        return Checkpoint.load(folder)

    def push_to_hub(
        self, repository: str, *, gallery: bool = False, license: str | None = None, private: bool | None = None
    ) -> str:
        """Upload the checkpoint, with a model card, to a repository of a hub, which is created if it is missing.

        The training command, its folder and those of the training images, which concern this machine, are left out. A
        ``README.md`` in the checkpoint's folder replaces the card, unless ``license`` is given.

        Args:
            repository: ``owner/name``.
            gallery: whether to upload the gallery: activations and embeddings of the training images.
            license: the SAEs' licence, by the hub's name of it (``mit``, ``cc-by-4.0``, …); by default, the card says
                that it is not known.
            private: whether a new repository is visible to its owner only; None: the hub's default.

        Returns:
            The URL of the commit.

        Raises:
            HubError: the hub refused, or cannot be reached.
            CheckpointError: a file of the checkpoint is damaged.
        """
        from tempfile import TemporaryDirectory

        from vs2_plugin.hub import upload

        self.verify()
        with TemporaryDirectory(prefix="vs2-") as scratch:
            self._copy(Path(scratch), gallery, str(Repository(repository)), license, portable=True)
            return upload(Path(scratch), repository, PATTERNS, f"Checkpoint {self.digest[:16]} of vs2-plugin", private)

    def _copy(self, folder: Path, gallery: bool, name: str, license: str | None, portable: bool = False) -> None:
        """Copy the checkpoint's files into an empty folder, with a card that calls it ``name``; with ``portable``,
        without the training command and the folders of this machine, by which its owner's images are recognised."""
        contents = self.gallery if gallery else None
        copy_files(self.folder, self.sites, None if contents is None else self.gallery_folder, folder)
        values = read_manifest(self.folder)
        if contents is None:
            values.pop("gallery", None)
        if portable:
            for place in ("command", "folder"):
                values["created"].pop(place, None)
            values["data"].pop("folders", None)
        write_manifest(folder, values)
        own = self.folder / CARD
        text = own.read_text(encoding="utf-8", errors="surrogateescape") if own.is_file() else ""
        if not text or license is not None or not is_by_hand(text):
            sites = Checkpoint.load(self.folder).sites  # read again, as vs2.json was, for figures noted since
            license = license or license_of(text)
            text = card(name, self.backbone, self.pretrained, self.data, sites, contents, license)
        (folder / CARD).write_text(text, encoding="utf-8", errors="surrogateescape")

    def verify(self) -> None:
        """Read every file in full. Raises CheckpointError at the first damaged one."""
        for site in self.sites:
            self.sae(site)
        if self.gallery is not None:
            self.open_gallery(thorough=True)


def _is_whole(folder: Path) -> bool:
    """Return whether a folder holds all files of a checkpoint."""
    try:
        return _are_there(Checkpoint.load(folder))
    except CheckpointError:
        return False


def _are_there(checkpoint: Checkpoint) -> bool:
    """Return whether all files of a checkpoint exist, whatever they contain."""
    files = [checkpoint.folder / site.folder / name for site in checkpoint.sites for name in site.files]
    for number, part in enumerate(() if checkpoint.gallery is None else checkpoint.gallery.parts):
        files += [checkpoint.gallery_folder / str(number) / f"{name}.npy" for name in part.contents or ()]
    return all(file.is_file() for file in files)


class _DamagedCopy(CheckpointError):
    """A damaged checkpoint in a hub's cache; the message says how to fetch it again."""

    def __init__(self, hub: str, error: CheckpointError) -> None:
        self.problem = str(error).removesuffix(f"; {AGAIN}")
        super().__init__(f"{self.problem}; fetch it again with vs2 store pull {hub}")


def save_checkpoint(
    folder: Path,
    *,
    backbone: str,
    pretrained: str,
    tower: Tower | None,
    data: TrainingData,
    saes: Sequence[tuple[SiteSAE, TopKSAE]],
    created: dict[str, str],
    gallery: GalleryFiles | None = None,
) -> Checkpoint:
    """Write a checkpoint so that ``folder`` holds either all of it or what was there before.

    The ``files`` of each :class:`SiteSAE` are filled in here. The gallery's files are hard-linked if possible.
    """
    from vs2_plugin.sae.files import CONFIG_FILE, WEIGHTS_FILE, save_sae

    with atomic_folder(folder) as scratch:
        sites = []
        for site, sae in saes:
            save_sae(sae, scratch / site.folder)
            digests = {name: file_digest(scratch / site.folder / name) for name in (CONFIG_FILE, WEIGHTS_FILE)}
            sites.append({**asdict(site), "files": digests})
        values: dict[str, Any] = {
            "backbone": backbone,
            "pretrained": pretrained,
            "tower": None if tower is None else tower.to_json(),
            "data": data.to_json(),
            "sites": sites,
            "created": {"vs2_plugin": __version__, **created},
        }
        if gallery is not None:
            gallery.write(scratch / saes[0][0].folder / GALLERY)
            values["gallery"] = gallery.contents.to_json()
        write_manifest(scratch, values)
    return Checkpoint.load(folder)

