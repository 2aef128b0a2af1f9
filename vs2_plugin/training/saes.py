"""The second half of a training: from the activations to the SAEs, and each SAE's record in its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from vs2_plugin.arrays import stack
from vs2_plugin.checkpoint.records import SiteSAE
from vs2_plugin.clip.sites import Site
from vs2_plugin.sae.adopt import adopt
from vs2_plugin.sae.config import TrainConfig
from vs2_plugin.sae.foreign import ForeignSAE
from vs2_plugin.sae.topk import TopKSAE
from vs2_plugin.sae.train import Job, Trained, train_saes
from vs2_plugin.training.extract import Extraction, Part, Report, all_labels
from vs2_plugin.training.plan import Plan
from vs2_plugin.training.request import TrainRequest
from vs2_plugin.training.supplied import Supplied

__all__ = ["Saes", "make_saes"]

#: The SAEs of a checkpoint, each with its record.
Saes = list[tuple[SiteSAE, TopKSAE]]


def make_saes(
    request: TrainRequest,
    plans: Sequence[Plan],
    sites: Sequence[Site],
    parts: Sequence[Part],
    extraction: Extraction | Supplied,
    states: Path,
    report: Report,
    foreign: ForeignSAE | None,
) -> list[Saes]:
    """Train the SAEs of all plans, or take the ``foreign`` SAE, and report the outcome of each. An SAE that several
    plans share is trained once."""
    jobs = _jobs(plans, sites, parts, extraction)
    calibration = np.concatenate([np.full(len(part), part.dataset in request.calibration_sets) for part in parts])
    if foreign is not None:
        trained = [adopt(foreign, job.activations, calibration, device=extraction.device) for job in jobs.values()]
    else:
        trained = train_saes(
            list(jobs.values()),
            calibration=calibration,
            device=extraction.device,
            quiet=request.quiet,
            processes=extraction.processes,
            states=states,
            save_every=request.save_every,
        )
    results = dict(zip(jobs, trained, strict=True))
    if extraction.processes.first:
        for job, result in zip(jobs.values(), trained, strict=True):
            report(_outcome(job.name, result))

    def saes(plan: Plan) -> Saes:
        return [
            (_facts(_settings(request, config, outcome, foreign), site, variant, outcome), outcome.sae)
            for variant, site, config in plan.wanted(sites)
            for outcome in [results[site, config]]
        ]

    return [saes(plan) for plan in plans]


def _jobs(
    plans: Sequence[Plan], sites: Sequence[Site], parts: Sequence[Part], extraction: Extraction | Supplied
) -> dict[tuple[Site, TrainConfig], Job]:
    """Return (site, settings) -> the SAE to train, once for all plans."""
    activations = {site: stack([part.tower.columns[site.hookpoint] for part in parts]) for site in sites}
    labels = all_labels(parts) if extraction.labels else None
    jobs: dict[tuple[Site, TrainConfig], Job] = {}
    for plan in plans:
        for variant, site, config in plan.wanted(sites):
            own = labels if variant == "pass" else None
            job = Job(_name(plan, variant, site, len(plans)), activations[site], config, own)
            jobs.setdefault((site, config), job)
    return jobs


def _name(plan: Plan, variant: str, site: Site, plans: int) -> str:
    """Return the name of an SAE for progress bars and messages."""
    which = f" of {plan.folder.name}" if plans > 1 else ""
    return f"{'PASS ' if variant == 'pass' and len(plan.variants) > 1 else ''}SAE at {site}{which}"


def _outcome(name: str, trained: Trained) -> str:
    sae, _, figures = trained
    held_out, how = "held-out ", f"{figures.train_count:,} activations in {figures.seconds:.1f} s"
    if not figures.steps:  # of another library, which may have trained it on the same images
        held_out, how = "", "taken as it is"
    return (
        f"{name}: {sae.config.num_latents} latents, {sae.config.k} active; FVU {figures.fvu:.4f} on "
        f"{figures.held_out_count:,} {held_out}activations, {figures.dead:.1%} of latents dead, {how}"
    )


def _settings(
    request: TrainRequest, config: TrainConfig, trained: Trained, foreign: ForeignSAE | None
) -> dict[str, Any]:
    """Return the settings of an SAE's training, or of a foreign SAE, for its record."""
    if foreign is not None:
        return {"library": foreign.library, "library_model": foreign.model, **asdict(foreign.sae.config)}
    count = trained.figures.train_count + trained.figures.held_out_count
    return {"recipe": request.recipe, **asdict(config.for_size(count))}


def _facts(settings: Mapping[str, Any], site: Site, variant: str, trained: Trained) -> SiteSAE:
    """Return the record of an SAE in its checkpoint."""
    figures = trained.figures
    progress = {key: value for key, value in asdict(figures).items() if not key.startswith("fvu")}
    return SiteSAE(
        hookpoint=site.hookpoint,
        variant=variant,
        labels="train" if variant == "pass" else "none",
        width=site.width,
        mean=trained.mean.tolist(),
        fvu=figures.fvu,
        fvu_quantiles=figures.fvu_quantiles,
        training={**settings, **progress},
        files={},
    )
