"""Parts of steered models, opened from a checkpoint: SAEs, galleries and retrievers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from vs2_plugin.checkpoint.checkpoint import Checkpoint
from vs2_plugin.checkpoint.records import SiteSAE
from vs2_plugin.checkpoint.store import Store
from vs2_plugin.clip.sites import ClipModel, Sites
from vs2_plugin.clip.tower import Tower
from vs2_plugin.data.images import image_digest
from vs2_plugin.gallery.encoders import load_encoder
from vs2_plugin.gallery.files import index_file
from vs2_plugin.gallery.gallery import CLIP, Gallery
from vs2_plugin.gallery.search import open_search
from vs2_plugin.method import NEIGHBOURS
from vs2_plugin.model.builder import weights_of
from vs2_plugin.modelstring import ModelString
from vs2_plugin.sae.topk import TopKSAE
from vs2_plugin.steering.retriever import Retriever

__all__ = ["Parts", "find_checkpoint", "require"]

_LOG = logging.getLogger(__name__)
T = TypeVar("T")


def find_checkpoint(
    spec: ModelString, store: Store, pretrained: str, dataset: str, home: str = ""
) -> Checkpoint | None:
    """Return the checkpoint that a model string names, else the data set's; None for a method that needs no checkpoint.

    The other arguments and the errors are those of :meth:`Store.find_for`.
    """
    if not spec.needs_checkpoint:
        return None
    if spec.checkpoint:
        return store.find(spec.checkpoint)
    return store.find_for(spec.backbone, pretrained, dataset, home)


def require(checkpoint: Checkpoint, spec: ModelString) -> list[SiteSAE]:
    """Return the SAEs of a checkpoint along which a model string steers.

    Raises:
        CheckpointError: the checkpoint lacks one of these SAEs, or the gallery that a method or ``auto`` reads.
    """
    method, options, reading = spec.method, spec.options, spec.reading
    if method.gallery == "neighbours":
        n = options["n"]
        assert isinstance(n, int)
        checkpoint.require_gallery(method.labels_used(options) == "oracle", str(options["encoder"]), n)
    learns = reading is not None and reading.protocol == "unlabeled"
    if learns or method.gallery == "images" or method.automatic(options):
        checkpoint.require_gallery()
    along = method.needs_checkpoint and method.site == "checkpoint"
    return checkpoint.select(options["blocks"], method.sae) if along else []


class Parts:
    """The parts of steered models that share one tower. Each part is opened once, however many models use it."""

    def __init__(
        self, model: ClipModel, sites: Sites, tower: Tower | None = None, warned: set[str] | None = None
    ) -> None:
        """``warned`` holds the warnings that were given before, which are not given again."""
        self.model, self.sites, self.tower = model, sites, tower
        self.device = next(model.parameters()).device
        self._opened: dict[Hashable, Any] = {}
        self._warned = set() if warned is None else warned
        #: The weights of the model, by the names that a plugin finds them by.
        self.weights = weights_of(model)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the result of ``make()``, which is called only at the first use of ``key``."""
        if key not in self._opened:
            self._opened[key] = make()
        part: T = self._opened[key]
        return part

    def warn(self, warning: str) -> None:
        """Log a warning, once."""
        if warning not in self._warned:
            self._warned.add(warning)
            _LOG.warning("%s", warning)

    def sae(self, checkpoint: Checkpoint, facts: SiteSAE) -> tuple[TopKSAE, Tensor]:
        """Return an SAE of a checkpoint and the mean activation ``[d]`` at its site, on the model's device."""

        def load() -> tuple[TopKSAE, Tensor]:
            sae, mean = checkpoint.sae(facts)
            return sae.to(self.device), mean.to(self.device)

        return self.once(("sae", checkpoint.folder, facts.folder), load)

    def gallery(self, checkpoint: Checkpoint) -> Gallery:
        """Return the gallery of a checkpoint, with arrays that cannot be written to."""

        def opened() -> Gallery:
            gallery = checkpoint.open_gallery()
            for array in (gallery.digests, gallery.labels):  # the other arrays are read-only memory maps
                if array is not None:
                    array.setflags(write=False)
            return gallery

        return self.once(("gallery", checkpoint.folder), opened)

    def retriever(self, checkpoint: Checkpoint, spec: ModelString) -> Retriever | None:
        """Return the retriever of a method with a gallery, else None. :func:`require` has checked that gallery."""
        method, options = spec.method, spec.options
        if method.gallery == "none" or method.site == "logits":
            return None
        if method.gallery == "images":
            return self.once(("images", checkpoint.folder), lambda: Retriever(self.gallery(checkpoint), self.device))
        asked = tuple(options[option.name] for option in NEIGHBOURS)
        return self.once(("neighbours", checkpoint.folder, asked), lambda: self._retriever(checkpoint, options))

    def _retriever(self, checkpoint: Checkpoint, options: Mapping[str, Any]) -> Retriever:
        gallery, name, folder = self.gallery(checkpoint), options["encoder"], checkpoint.folder
        encode = None
        if name != CLIP:
            record = gallery.encoders[name]
            assert self.tower is not None
            preprocessing = self.tower.preprocessing
            encode = self.once(
                ("encoder", folder, name),
                lambda: load_encoder(name, record.weights, preprocessing, self.device, record),
            )
        file, kind = index_file(checkpoint.gallery_folder, name), options["search"]
        search = self.once(
            ("search", folder, name, kind), lambda: open_search(kind, gallery.embeddings[name], file, self.device)
        )
        return Retriever(
            gallery, self.device, n=options["n"], search=search, encode=encode, encoder=name, digest=image_digest
        )
