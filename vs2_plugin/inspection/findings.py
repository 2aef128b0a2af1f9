"""What steering did to images: classes, contributions of latents, neighbours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vs2_plugin.clip.edits import reading
from vs2_plugin.errors import HarnessError
from vs2_plugin.harness.model import SteeredCLIP
from vs2_plugin.harness.places import Place
from vs2_plugin.inspection.attribution import Attribution, Movement, attribute, movement, tail
from vs2_plugin.inspection.pictures import ImageFile, Thumbnail, thumbnail
from vs2_plugin.inspection.subject import Card, Subject, sae_at
from vs2_plugin.modelstring import ModelString
from vs2_plugin.sae.topk import sample_fvu
from vs2_plugin.steering.batch import Batch
from vs2_plugin.steering.retriever import majority
from vs2_plugin.text import counted

__all__ = ["Finding", "Inspection", "inspect_images", "require_inspectable"]


@dataclass(frozen=True)
class ClassChange:
    """One class: probabilities, and the change of its logit."""

    name: str
    before: float
    after: float
    change: float


@dataclass(frozen=True)
class Line:
    """A line of the table of contributions; ``latent`` is None for a sum."""

    name: str
    values: list[float]
    """What it contributed: to the lead, and to the logit of each shown class."""
    latent: int | None = None
    activation: float | None = None


@dataclass(frozen=True)
class AtPlace:
    """What happened at one site."""

    site: str
    decision: str
    """FVU and gate, in words."""
    note: str = ""
    """In place of contributions, why there are none."""
    shown: str = ""
    """Which latents are shown."""
    lines: tuple[Line, ...] = ()
    cards: tuple[Card, ...] = ()


@dataclass(frozen=True)
class Neighbour:
    """A training image that was looked up."""

    similarity: float
    label: str
    side: str
    """S+ or S-, or empty for a method that has no such sets."""
    picture: Thumbnail | None


@dataclass(frozen=True)
class Neighbours:
    """The training images that were looked up."""

    about: str
    images: list[Neighbour]


@dataclass(frozen=True)
class Finding:
    """What steering did to one image."""

    name: str
    picture: Thumbnail
    classes: list[ClassChange]
    """The best before and the best after, by probability after."""
    lead: str
    """What the lead is of, in words."""
    places: list[AtPlace]
    neighbours: Neighbours | None

    @property
    def told(self) -> str:
        """Which class the image had before and has after, in a sentence."""
        before = max(self.classes, key=lambda one: one.before)
        after = max(self.classes, key=lambda one: one.after)
        if before is after:
            return f"The class stays {after.name}: {after.before:.1%} before, {after.after:.1%} after steering."
        return (
            f"Steering changed the class from {before.name} ({before.before:.1%} before, {before.after:.1%} after) to "
            f"{after.name} ({after.before:.1%} before, {after.after:.1%} after)."
        )


@dataclass(frozen=True)
class Inspection:
    """What steering did to some images."""

    title: list[tuple[str, str]]
    """What was looked at: names and values."""
    findings: list[Finding]
    problems: list[str]
    """What could not be shown, and why."""


def require_inspectable(model: ModelString) -> None:
    """Raise HarnessError for a method that reads the true class, which an image file does not tell."""
    if model.method.gallery == "images" and model.method.labels == "oracle":
        raise HarnessError(
            f"{model}: this oracle needs the true class of the image, which a file does not tell; expected "
            "another method, for example vs2"
        )


def inspect_images(subject: Subject, images: Iterable[ImageFile], *, top: int = 5, latents: int = 8) -> Inspection:
    """Return what steering did to images, latent by latent, all in float32.

    Args:
        subject: the steered model.
        images: as :func:`vs2_plugin.inspection.pictures.read_image` gives them.
        top: classes shown, the best before and the best after.
        latents: latents shown for each image and site.

    Raises:
        HarnessError: the method needs the images' true classes.
    """
    require_inspectable(subject.model.spec)
    findings = [_inspect(subject, image, top, latents) for image in images]
    return Inspection(subject.title, findings, list(subject.problems))


def _inspect(subject: Subject, file: ImageFile, top: int, latents: int) -> Finding:
    model, names = subject.model, subject.classes
    image = subject.transform(file.image)[None].to(subject.device)
    plain, steered = _embeddings(model, image)
    logits = [_logits(embedding, subject.class_texts)[0] for embedding in (plain, steered)]
    before, after = (values.softmax(0).tolist() for values in logits)
    changes = (logits[1] - logits[0]).tolist()
    best = [values.argsort(descending=True, stable=True).tolist() for values in logits]
    shown = sorted({*best[0][:top], *best[1][:top]}, key=lambda index: -after[index])
    first = best[1][0]
    second = best[0][0] if best[0][0] != first else best[1][1]
    with model.at_hand(image) as batch:
        batch.embed = lambda: plain
        neighbours = _neighbours(subject, batch)
        places = [
            _at_place(subject, index, batch, image, [first, second, *shown], latents)
            for index in range(len(model.places))
        ]
    classes = [ClassChange(names[index], before[index], after[index], changes[index]) for index in shown]
    lead = f"{names[first]} over {names[second]}"
    return Finding(file.name, thumbnail(file.image, 240), classes, lead, places, neighbours)


def _logits(embedding: Tensor, texts: Tensor) -> Tensor:
    """Return the logits ``[batch, classes]`` of embeddings ``[batch, e]``, as clip_benchmark has them."""
    return 100.0 * F.normalize(embedding.float(), dim=-1) @ texts.T


@torch.no_grad()
def _embeddings(model: SteeredCLIP, image: Tensor) -> tuple[Tensor, Tensor]:
    """Return the plain and the steered embedding ``[1, e]`` of an image ``[1, 3, height, width]``."""
    with model.unsteered():
        plain: Tensor = model.model.encode_image(image)
    return plain, model.encode_image(image)


@torch.no_grad()
def _activations(model: SteeredCLIP, index: int, image: Tensor) -> tuple[Tensor, Tensor]:
    """Return the activation ``[1, d]`` at the place ``index`` without and with the steering there.

    Earlier places steer, later ones do not.
    """
    site = model.places[index].site

    def read(first: int) -> Tensor:
        with reading(model.model, [site]) as activation, model.unsteered(first):
            model.model.encode_image(image)
        return activation[site].float()

    return read(index), read(index + 1)


def _at_place(
    subject: Subject, index: int, batch: Batch, image: Tensor, classes: list[int], latents: int
) -> AtPlace:
    """Return what happened at one site. ``classes``: the two that the lead is between, then those shown."""
    model, place = subject.model, subject.model.places[index]
    x, steered = _activations(model, index, image)
    site, decision = str(place.site), _decision(place, x, model.spec.options.get("gate"))
    if place.gate is not None and torch.equal(x, steered):
        return AtPlace(site, decision, "The activation was left alone here, bit for bit.")
    change = _contributions(model, index, batch, x, steered, subject.class_texts[classes])
    if change is None:
        name = model.spec.method.name
        return AtPlace(site, decision, f"{name} steers by no sparse code of its own, so that no latents are shown.")
    move, shares = change
    moves = bool(move.amounts.any())  # REC goes along none
    rank = _columns(shares.latents)[:, 0] if moves else move.activations
    chosen = rank.abs().argsort(descending=True, stable=True)[:latents]
    why = "those that contributed most, up or down, to the lead" if moves else "the strongest; none is amplified"
    shown = f"{len(chosen)} of {len(rank)} active latents: {why}"
    cards = _cards(subject, place, move.latents[chosen].cpu().numpy(), move.activations[chosen].cpu().numpy())
    return AtPlace(site, decision, "", shown, tuple(_lines(move, shares, chosen)), tuple(cards))


def _contributions(
    model: SteeredCLIP, index: int, batch: Batch, x: Tensor, steered: Tensor, texts: Tensor
) -> tuple[Movement, Attribution] | None:
    """Return how the steering at the place ``index`` moves an image along latents, and what that does to its logits.

    ``x`` is its activation there ``[1, d]``, ``steered`` the same after the steering; ``texts`` ``[classes, e]`` are
    the classes whose logits are meant. None for a method that has no sparse code.
    """
    place = model.places[index]
    with torch.no_grad():
        move = place.move(x, batch)
    if move is None or batch.images is None:
        return None
    moved = movement(move)
    steps = moved.amounts[:, None] * move.code.sae.W_dec[moved.latents].detach()
    with model.unsteered(index):
        rest_of_tower = tail(model.model, model.sites, place.site, batch.images)
        return moved, attribute(lambda z: _logits(rest_of_tower(z), texts), x[0], steps, steered[0])


def _columns(values: Tensor) -> Tensor:
    """Return contributions ``[..., 2 + shown]`` to logits as those to the lead and to the classes shown."""
    return torch.cat([values[..., :1] - values[..., 1:2], values[..., 2:]], dim=-1)


def _lines(move: Movement, shares: Attribution, chosen: Tensor) -> Iterator[Line]:
    """Yield the table of contributions, with a line for each of the ``chosen`` active latents."""
    parts = _columns(shares.latents)
    for index, latent in zip(chosen.tolist(), move.latents[chosen].tolist(), strict=True):
        yield Line(f"latent {latent}", parts[index].tolist(), latent, float(move.activations[index]))
    if others := len(parts) - len(chosen):
        yield Line(counted(others, "other latent"), (parts.sum(0) - parts[chosen].sum(0)).tolist())
    yield Line(move.rest, _columns(shares.rest).tolist())
    yield Line("remainder", _columns(shares.remainder).tolist())
    yield Line("change", _columns(shares.total).tolist())


def _cards(
    subject: Subject, place: Place, latents: np.ndarray, amounts: np.ndarray
) -> list[Card]:
    """Return what is known of latents that have the activations ``amounts`` in the image at hand."""
    statistics = subject.statistics(place)
    if statistics is not None:
        amounts = np.where(statistics.counts[latents] > 0, statistics.means[latents], amounts)
    words = subject.words_of(place, latents, amounts)
    return [subject.card(latent, near, statistics) for latent, near in zip(latents.tolist(), words, strict=True)]


def _neighbours(subject: Subject, batch: Batch) -> Neighbours | None:
    """Return the training images that the method looked up for the image at hand."""
    model, pictures, retriever = subject.model, subject.pictures, subject.model.places.retriever
    if retriever is None or pictures is None or model.spec.method.gallery != "neighbours":
        return None
    oracle = model.spec.options.get("labels") == "oracle"
    hood = retriever.neighbours(batch)
    valid = hood.valid[0].cpu()
    labels = retriever.labels("oracle" if oracle else "pseudo")[hood.rows]
    # The training labels of several data sets are not the classes under inspection.
    classes = [] if oracle and len(pictures.gallery.datasets) > 1 else subject.classes

    def name(label: int) -> str:
        return classes[label] if label < len(classes) else f"class {label}"

    about = f"The {counted(int(valid.sum()), 'nearest training image')}, nearest first, each with its "
    about += "training label" if oracle else "zero-shot class"
    own = labels[0][valid].tolist()
    sides = [""] * len(own)
    if (rule := model.spec.options.get("rule")) is not None:
        chosen = retriever.classes(batch) if rule == "query" else majority(labels.to(retriever.device), hood)[0]
        target = int(chosen[0])
        sides = ["S+" if label == target else "S-" for label in own]
        about += f". Steered towards the {sides.count('S+')} of {name(target)!r} (S+)"
        about += f", away from the {counted(sides.count('S-'), 'other')} (S-)"
    rows = zip(hood.rows[0][valid].tolist(), hood.similarity[0].cpu()[valid].tolist(), own, sides, strict=True)
    images = [Neighbour(similarity, name(label), side, pictures(row)) for row, similarity, label, side in rows]
    return Neighbours(f"{about}.", images)


def _decision(place: Place, x: Tensor, q: object) -> str:
    """Return FVU and gate in words."""
    if place.gate is None or place.facts is None:
        return "no SAE here, so that there is neither FVU nor gate"
    sae, mean = sae_at(place)
    ratio, tau = float(sample_fvu(x, sae(x), mean)), place.gate.tau
    if tau is None:
        usual = place.facts.fvu_quantiles
        among = ""
        if {"0.5", "0.99"} <= usual.keys():
            among = f" (held-out training images: median {usual['0.5']:.3f}, 99 % below {usual['0.99']:.3f})"
        return f"FVU {ratio:.3f}{among}; no gate, every image is steered"
    side, fate = ("within", "steered") if ratio <= tau else ("above", "left alone")
    return f"FVU {ratio:.3f} is {side} the gate's threshold {tau:.3f} (q = {q:g}): {fate}"
