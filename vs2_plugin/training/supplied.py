"""The first half of a training on activations that the user supplies: no image is read."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from vs2_plugin.clip.backbone import load_backbone
from vs2_plugin.clip.sites import Site
from vs2_plugin.clip.tower import Tower
from vs2_plugin.data.cache import Extracted
from vs2_plugin.data.given import GivenActivations
from vs2_plugin.data.naming import DataSet
from vs2_plugin.data.splits import Split
from vs2_plugin.distributed import Processes
from vs2_plugin.errors import DataError, SettingError
from vs2_plugin.gallery.files import GalleryFiles
from vs2_plugin.training.extract import Part
from vs2_plugin.training.plan import chosen_sites
from vs2_plugin.training.request import TrainRequest

__all__ = ["Supplied", "require_no_images", "supply"]

#: Settings that concern images or labels.
_OF_IMAGES = ("train_split", "max_images", "gallery_labels", "retrieval_encoder", "pass_weight", "refresh_cache")
#: Hookpoint of activations that belong to no tower.
_NOWHERE = "activations"


@dataclass(frozen=True)
class Supplied:
    """Supplied activations, in place of an :class:`vs2_plugin.training.extract.Extraction` from images."""

    activations: GivenActivations
    site: Site
    tower: Tower | None
    """Identity of the vision tower of the activations, if known."""
    amp: bool
    device: str
    processes: Processes
    labels: bool = False

    def run(self, dataset: DataSet, split: Split) -> Part:
        """Return the activations as those of one data set."""
        rows, where = self.activations.rows, self.site.hookpoint
        unknown = np.broadcast_to(np.uint64(0), len(rows))  # without images there are no digests
        extracted = Extracted(Path(), {where: rows}, unknown, None, {where: self.activations.digest})
        return Part(dataset, "", extracted, {})

    def gallery(self, parts: list[Part]) -> GalleryFiles | None:
        """Return None, since without images there is no gallery."""
        return None


def require_no_images(request: TrainRequest) -> None:
    """Raise SettingError if a setting that concerns images or labels is not at its default."""
    usual = {field.name: field.default for field in fields(TrainRequest)}
    wrong = [name for name in _OF_IMAGES if getattr(request, name) not in (usual[name], (0.0,))]
    if wrong:
        raise SettingError(f"--{wrong[0]} is for images and labels, but there are only activations; omit it")


def supply(request: TrainRequest, given: GivenActivations, amp: bool, device: str, processes: Processes) -> Supplied:
    """Return the activations with their site and tower. The model is loaded for its identity, and not run.

    Raises:
        SettingError: the request names several sites, or none that the tower has.
        DataError: the site has another width than the activations.
    """
    width = given.rows.shape[1]
    if not request.model:
        if request.blocks != TrainRequest.blocks:
            raise SettingError(f"--blocks {' '.join(request.blocks)} is a place in a tower; name that with --model, or "
                               "omit --blocks")  # fmt: skip
        return Supplied(given, Site(_NOWHERE, width), None, amp, device, processes)
    loaded = load_backbone(request.model, request.pretrained, request.model_cache_dir, "cpu")
    sites = chosen_sites(loaded.sites, request.blocks)
    if len(sites) != 1:
        raise SettingError(f"--blocks {' '.join(request.blocks)}: activations come from one place; expected one")
    if sites[0].width != width:
        fitting = [str(site) for site in (*loaded.sites.blocks[-1:], loaded.sites.output) if site.width == width]
        hint = f"; {' and '.join(fitting)} would fit (--blocks)" if fitting else ""
        raise DataError(
            f"the activations have width {width}, but {sites[0]} of {request.model} has {sites[0].width}{hint}"
        )
    return Supplied(given, sites[0], Tower.of(loaded.model, loaded.transform), amp, device, processes)
