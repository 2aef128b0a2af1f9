"""Measures all figures of an SAE, and compares SAEs of different seeds."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from vs2_plugin.quality.codes import Codes, encode
from vs2_plugin.quality.dictionary import Agreement, agreement, nearest_cosines
from vs2_plugin.quality.meaning import Monosemanticity, monosemanticity, sparse_probes
from vs2_plugin.quality.recovered import recovered
from vs2_plugin.quality.subject import Images, Subject
from vs2_plugin.sae.fit import PCA_MAX, held_out_fvu, pca_fvu
from vs2_plugin.sae.source import Rows, Source

__all__ = ["STABLE", "Figure", "Measured", "ZeroShot", "keep", "measure", "stability"]

#: Most images whose codes are computed.
LOOKED_AT = 50_000
#: Smallest cosines at which a latent counts as found again by another SAE, and as doubled within its own.
STABLE, _DOUBLED = 0.7, 0.9
_PROBED = 10_000  # most images that probes are fitted on
_NO_IMAGES = (
    "the checkpoint keeps no activations; name a file of them with --activations, or train it again without "
    "--no_gallery"
)
_NO_LABELS = "it needs labels: train with --gallery_labels, or give --labels with --activations"


@dataclass(frozen=True)
class Figure:
    """One figure; :data:`vs2_plugin.quality.notes.NOTES` explains its meaning."""

    value: float | None
    beside: float | None = None
    """The figure that ``value`` is compared with."""
    why: str = ""
    """Why there is no value, and how to get one."""


@dataclass(frozen=True)
class ZeroShot:
    """The rest of a tower after the SAE's site, and class embeddings, for zero-shot classification."""

    embed: Callable[[Tensor], Tensor] | None
    """Maps activations ``[batch, d]`` to embeddings ``[batch, e]``; None where the SAE is not at the tower's end."""
    weights: Tensor
    """Class embeddings ``[e, classes]``."""
    labelled: bool
    """Whether the images' labels are those of these classes."""
    about: str
    """The classes, in words."""


@dataclass(frozen=True)
class Measured:
    """An SAE with its figures."""

    subject: Subject
    figures: dict[str, Figure]
    codes: Codes | None
    """Codes of at most 50,000 images; None without images."""
    meaning: Monosemanticity | None


def measure(
    subject: Subject,
    elsewhere: Rows | None = None,
    zero_shot: ZeroShot | str = "",
    device: str = "cpu",
) -> Measured:
    """Measure an SAE.

    Args:
        subject: the SAE with its images. Without images, figures recorded in training are used where there are any.
        elsewhere: activations of another data set ``[count, d]``.
        zero_shot: the classes for zero-shot figures, or the reason why there are none.
        device: device that encodes.

    Raises:
        DataError: all activations are equal.
    """
    sae, images = subject.sae.to(device), subject.images
    figures: dict[str, Figure] = {}
    codes = meaning = None
    if images is None:
        recorded = subject.site.training
        figures["explained_variance"] = Figure(1 - subject.site.fvu, _one_less(recorded.get("pca_fvu")))
        names = ("l0", "dead", "dense", "gamma", "recovered", "agreement")
        figures |= {name: _recorded(recorded.get(name)) for name in names}
        figures |= _none(_NO_IMAGES, "probe_1", "probe_5", "monosemanticity", "monosemantic")
    else:
        source = Source(images.activations, device)
        source.check()
        chosen = _chosen(images)
        codes = encode(sae, source, chosen)
        figures |= _reconstruction(subject, source, images)
        figures |= {name: Figure(getattr(codes, name)) for name in ("l0", "dead", "dense")}
        figures["gamma"] = Figure(source.mean.double().norm().item() / source.variance**0.5)
        figures |= _zero_shot(subject, source, images, zero_shot)
        figures |= _probes(codes, images, chosen)
        meaning = monosemanticity(codes.matrix, np.asarray(images.embeddings[chosen]))
        figures |= _meaning(meaning)
    figures["explained_variance_elsewhere"] = _elsewhere(subject, elsewhere, device)
    cosines = nearest_cosines(sae.W_dec.cpu(), _is_signed(subject))
    figures["collinearity"] = Figure(float(cosines.mean()))
    figures["doubled"] = Figure(float((cosines > _DOUBLED).mean()))
    sae.cpu()
    return Measured(subject, figures, codes, meaning)


def _none(why: str, *names: str) -> dict[str, Figure]:
    return {name: Figure(None, why=why) for name in names}


def _recorded(value: object) -> Figure:
    return Figure(float(value)) if isinstance(value, (int, float)) else Figure(None, why=_NO_IMAGES)


def _one_less(value: object) -> float | None:
    return 1 - float(value) if isinstance(value, (int, float)) else None


def _chosen(images: Images) -> np.ndarray:
    """Return the sorted numbers of the images to encode: all held-out ones, then others up to 50,000 in all."""
    return np.sort(np.concatenate([images.held, images.others[: LOOKED_AT - len(images.held)]]))


def _is_signed(subject: Subject) -> bool:
    """Return whether activations are never negative, so that a latent does not stand for the opposite direction too."""
    return subject.sae.config.activation == "relu"


def _reconstruction(subject: Subject, source: Source, images: Images) -> dict[str, Figure]:
    held = np.sort(images.held)
    recorded = subject.site.training.get("pca_fvu") if len(images.others) else None  # of the training's own images
    beside = _one_less(recorded)
    if beside is None and len(images.others):
        beside = 1 - pca_fvu(source, np.sort(images.others[:PCA_MAX]), held, subject.sae.config.k)
    return {"explained_variance": Figure(1 - held_out_fvu(subject.sae, source, held), beside)}


def _elsewhere(subject: Subject, elsewhere: Rows | None, device: str) -> Figure:
    if elsewhere is None:
        return Figure(None, why="name another data set with --elsewhere: a checkpoint of the same tower, or a file")
    source = Source(elsewhere, device)
    source.check()
    numbers = np.sort(np.random.default_rng(0).permutation(len(elsewhere))[:LOOKED_AT])
    return Figure(1 - held_out_fvu(subject.sae, source, numbers))


def _zero_shot(
    subject: Subject, source: Source, images: Images, given: ZeroShot | str
) -> dict[str, Figure]:
    if isinstance(given, str):
        return _none(given, "recovered", "agreement")
    if given.embed is None:
        checkpoint, block = subject.checkpoint, subject.site.block
        model = f"rec:{checkpoint.backbone}@{checkpoint.name}@blocks={block}"
        command = shlex.join(["clip_benchmark", "eval", "--model", checkpoint.backbone, model])
        why = f"what comes after block {block} needs images: {command}, with --pretrained and --dataset, evaluates it"
        return _none(why, "recovered", "agreement")
    held = np.sort(images.held)
    labels = images.labels[held] if images.labels is not None and given.labelled else None
    result = recovered(subject.sae, source, held, given.embed, given.weights, labels)
    why = _NO_LABELS if images.labels is None else "the labels given do not belong to these classes"
    if labels is not None:
        why = "the plain model is no better than one constant activation"
    share = Figure(result.share, why="" if result.share is not None else why)
    return {"recovered": share, "agreement": Figure(result.agreement, result.by_mean)}


def keep(measured: Measured, zero_shot: ZeroShot | str) -> bool:
    """Write the measured ``agreement`` and ``recovered`` to the checkpoint's record, for its model card, replacing
    earlier values. Return whether there was something to write and it could be written."""
    subject, agreement = measured.subject, measured.figures["agreement"].value
    if subject.images is None or agreement is None or isinstance(zero_shot, str):
        return False
    recovered = measured.figures["recovered"].value
    record: dict[str, float | str | None] = {
        "agreement": round(agreement, 6),
        "recovered": None if recovered is None else round(recovered, 6),
        "recovered_on": f"{subject.images.held_out} ({subject.images.about}), with {zero_shot.about}",
    }
    return subject.checkpoint.note(subject.site, record)


def _probes(codes: Codes, images: Images, chosen: np.ndarray) -> dict[str, Figure]:
    names = {1: "probe_1", 5: "probe_5"}
    if images.labels is None:
        return _none(_NO_LABELS, *names.values())
    held = np.isin(chosen, images.held)
    fitted = np.isin(chosen, images.others[:_PROBED])
    if not len(images.others):  # all images are new to the SAE: probes are fitted on half of them
        held = np.arange(len(chosen)) % 2 == 0
        fitted = ~held
    rows = held | fitted
    own, labels = chosen[rows], images.labels[chosen[rows]]
    both = (codes.matrix[rows], csr_array(np.asarray(images.activations[own], np.float32)))
    of_latents, of_coordinates = (sparse_probes(features, labels, fitted[rows], held[rows]) for features in both)
    if not of_latents:
        return _none("no class has five images to fit a probe on and one to test it on", *names.values())
    return {name: Figure(of_latents[size].auc, of_coordinates[size].auc) for size, name in names.items()}


def _meaning(meaning: Monosemanticity) -> dict[str, Figure]:
    scored = ~np.isnan(meaning.scores)
    if not scored.any():
        return _none("no latent is active in two images", "monosemanticity", "monosemantic")
    scores, shuffled = meaning.scores[scored], meaning.shuffled[scored]
    above = float((scores > np.quantile(shuffled, 0.95)).mean())
    return {
        "monosemanticity": Figure(float(scores.mean()), float(shuffled.mean())),
        "monosemantic": Figure(above, 0.05),
    }


def stability(measured: Sequence[Measured]) -> tuple[dict[str, Figure], list[tuple[str, str, Agreement]]]:
    """Compare the decoder directions of SAEs pair by pair, leaving out pairs of one seed.

    Returns:
        The figures, means over pairs; and for each pair the names of both SAEs and their agreement.
    """
    if len(measured) < 2:
        why = "it needs SAEs of at least two seeds: vs2-train-sae --seed 0 1 2, then vs2 sae with all of their names"
        return _none(why, "stability", "stable"), []
    pairs = []
    for one, other in combinations(measured, 2):
        if _are_of_one_seed(one.subject, other.subject):
            continue
        result = agreement(_living(one), _living(other), _is_signed(one.subject))
        pairs.append((one.subject.name, other.subject.name, result))
    if not pairs:
        why = "these SAEs start from the same random numbers; expected SAEs of several seeds"
        return _none(why, "stability", "stable"), []
    cosines, random = (
        [getattr(result, which) for _, _, result in pairs] for which in ("cosines", "random")
    )

    def mean(parts: list[np.ndarray], least: float | None = None) -> float:
        return float(np.mean([part.mean() if least is None else (part >= least).mean() for part in parts]))

    return {
        "stability": Figure(mean(cosines), mean(random)),
        "stable": Figure(mean(cosines, STABLE), mean(random, STABLE)),
    }, pairs


def _are_of_one_seed(one: Subject, other: Subject) -> bool:
    """Return whether two SAEs were trained with the same seed, or have equal decoders."""
    seeds = [subject.site.training.get("seed") for subject in (one, other)]
    same = one.sae.W_dec.shape == other.sae.W_dec.shape and torch.equal(one.sae.W_dec, other.sae.W_dec)
    return same or (seeds[0] is not None and seeds[0] == seeds[1])


def _living(measured: Measured) -> Tensor:
    """Return the directions of the latents that are not dead; all directions where no codes show which are."""
    directions = measured.subject.sae.W_dec
    if measured.codes is None or not measured.codes.alive.any():
        return directions
    return directions[torch.from_numpy(measured.codes.alive)]
