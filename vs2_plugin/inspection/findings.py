"""Findings on images: how steering changed their classes, the contributions of latents, and neighbours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vs2_plugin.inspection.pictures import ImageFile, Thumbnail, thumbnail
from vs2_plugin.inspection.subject import Card, Subject
from vs2_plugin.model.explanation import Explanation, PlaceChange, explain, require_explainable
from vs2_plugin.model.place import Place
from vs2_plugin.steering.batch import Batch
from vs2_plugin.steering.retriever import majority
from vs2_plugin.text import counted

__all__ = ["AtPlace", "Finding", "Inspection", "inspect_images"]


@dataclass(frozen=True)
class AtPlace(PlaceChange):
    """The effect of steering at one site, with cards of the latents shown."""

    cards: tuple[Card, ...] = ()
    """One card for each line of a latent."""


@dataclass(frozen=True)
class Neighbour:
    """A training image that the method looked up."""

    similarity: float
    label: str
    side: str
    """``S+`` or ``S-``, the set that the image belongs to; empty for a method without these sets."""
    picture: Thumbnail | None


@dataclass(frozen=True)
class Neighbours:
    """The training images that the method looked up for one image."""

    about: str
    images: list[Neighbour]


@dataclass(frozen=True, repr=False)
class Finding(Explanation):
    """An explanation of one image, with its picture and neighbours."""

    places: Sequence[AtPlace]
    name: str
    picture: Thumbnail
    neighbours: Neighbours | None


@dataclass(frozen=True)
class Inspection:
    """Findings on some images."""

    title: list[tuple[str, str]]
    """Names and values that describe the model, its checkpoint and the classes."""
    findings: list[Finding]
    problems: list[str]
    """Sentences that say what could not be shown, and why."""


def inspect_images(subject: Subject, images: Iterable[ImageFile], *, top: int = 5, latents: int = 8) -> Inspection:
    """Explain what steering did to images, latent by latent, all in float32.

    Args:
        subject: the steered model.
        images: as :func:`vs2_plugin.inspection.pictures.read_image` gives them.
        top: classes shown, the best before and the best after.
        latents: latents shown for each image and site.

    Raises:
        HarnessError: the method is on logits or needs the images' true classes, or there is one class only.
    """
    require_explainable(subject.model.spec)
    findings = [_inspect(subject, image, top, latents) for image in images]
    return Inspection(subject.title, findings, list(subject.problems))


def _inspect(subject: Subject, file: ImageFile, top: int, latents: int) -> Finding:
    image = subject.transform(file.image)[None].to(subject.device)
    explanation = explain(subject.model, image, subject.classes, subject.class_texts, top=top, latents=latents)
    places = [_with_cards(subject, *pair) for pair in zip(subject.model.places, explanation.places, strict=True)]
    picture, neighbours = thumbnail(file.image, 240), _neighbours(subject, image)
    return Finding(explanation.classes, explanation.lead, places, file.name, picture, neighbours)


def _with_cards(subject: Subject, place: Place, change: PlaceChange) -> AtPlace:
    """Return the change at a site with cards of its latents, and with words by their usual activations."""
    shown = [line for line in change.lines if line.latent is not None]
    latents = np.array([line.latent for line in shown], dtype=np.int64)
    cards = _cards(subject, place, latents, np.array([line.activation for line in shown])) if shown else []
    near: dict[int | None, tuple[tuple[str, float], ...]] = {card.latent: tuple(card.words) for card in cards}
    lines = tuple(replace(line, words=near.get(line.latent, ())) for line in change.lines)
    return AtPlace(change.site, change.decision, change.note, change.shown, lines, change.without, tuple(cards))


def _cards(
    subject: Subject, place: Place, latents: np.ndarray, amounts: np.ndarray
) -> list[Card]:
    """Return the cards of latents; ``amounts`` are their activations in the image, used where the gallery has none."""
    statistics = subject.statistics(place)
    if statistics is not None:
        amounts = np.where(statistics.counts[latents] > 0, statistics.means[latents], amounts)
    words = subject.words_of(place, latents, amounts)
    return [subject.card(latent, near, statistics) for latent, near in zip(latents.tolist(), words, strict=True)]


def _neighbours(subject: Subject, image: Tensor) -> Neighbours | None:
    """Return the training images that the method looked up for an image ``[1, 3, height, width]``."""
    model, pictures, retriever = subject.model, subject.pictures, subject.model.places.retriever
    if retriever is None or pictures is None or model.spec.method.gallery != "neighbours":
        return None
    oracle = model.spec.options.get("labels") == "oracle"
    with torch.no_grad(), model.unsteered():
        plain = model.model.encode_image(image)
    batch = Batch(image, embed=lambda: plain)
    hood = retriever.neighbours(batch)
    valid = hood.valid[0].cpu()
    labels = retriever.labels("oracle" if oracle else "pseudo")[hood.rows]
    # The training labels of several data sets are not the classes under inspection.
    classes = [] if oracle and len(pictures.gallery.datasets) > 1 else subject.classes

    def name(label: int) -> str:
        return classes[label] if label < len(classes) else f"class {label}"

    about = f"The {counted(int(valid.sum()), 'nearest training image')}, nearest first, each with its "
    about += "training label" if oracle else "zero-shot class"
    own = labels[0].cpu()[valid].tolist()
    sides = [""] * len(own)
    if (rule := model.spec.options.get("rule")) is not None:
        chosen = retriever.classes(batch) if rule == "query" else majority(labels, hood)
        target = int(chosen[0])
        sides = ["S+" if label == target else "S-" for label in own]
        about += f". Steered towards the {sides.count('S+')} of {name(target)!r} (S+)"
        about += f", away from the {counted(sides.count('S-'), 'other')} (S-)"
    rows = zip(hood.rows[0].cpu()[valid].tolist(), hood.similarity[0].cpu()[valid].tolist(), own, sides, strict=True)
    images = [Neighbour(similarity, name(label), side, pictures(row)) for row, similarity, label, side in rows]
    return Neighbours(f"{about}.", images)
