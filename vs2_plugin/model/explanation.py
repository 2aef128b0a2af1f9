"""Explains what steering did to one image: how its classes changed, and each latent's contribution. All in float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vs2_plugin.clip.edits import reading
from vs2_plugin.clip.sites import ClipModel, Sites
from vs2_plugin.documented import documented
from vs2_plugin.errors import HarnessError
from vs2_plugin.model.attribution import Attribution, Movement, attribute, movement, tail
from vs2_plugin.model.place import Place
from vs2_plugin.model.places import Places
from vs2_plugin.model.predictions import require_numbers
from vs2_plugin.model.words import latent_embeddings, nearest
from vs2_plugin.modelstring import ModelString
from vs2_plugin.names import Parts
from vs2_plugin.sae.topk import TopKSAE, sample_fvu
from vs2_plugin.steering.batch import Batch
from vs2_plugin.text import counted

__all__ = [
    "ClassChange", "Explanation", "Line", "PlaceChange", "Steered", "explain", "require_explainable", "sae_at",
    "without", "words_of",
]  # fmt: skip

#: Name of the built-in method that can leave latents out.
BY_HAND = "latents"
#: Nearest words shown for each latent.
_NEAREST = 3


class Steered(Protocol):
    """The attributes of a steered model that this module uses; ``SteeredCLIP`` has them."""

    model: ClipModel
    sites: Sites
    spec: ModelString

    @property
    def places(self) -> Places: ...
    def at_hand(self, image: Tensor) -> AbstractContextManager[Batch]: ...
    def unsteered(self, start: int = 0) -> AbstractContextManager[None]: ...
    def encode_image(self, image: Tensor) -> Tensor: ...


@documented
@dataclass(frozen=True)
class ClassChange:
    """One class: its probabilities before and after steering, and the change of its logit."""

    name: str
    before: float
    after: float
    change: float


@documented
@dataclass(frozen=True)
class Line:
    """A line of the table of contributions; ``latent`` is None for a line that is not of one latent."""

    name: str
    values: list[float]
    """Contributions to the lead, and to the logit of each shown class."""
    latent: int | None = None
    activation: float | None = None
    words: tuple[tuple[str, float], ...] = ()
    """The classes nearest to the latent's direction, with their cosines; none before the tower's end."""


@documented
@dataclass(frozen=True)
class PlaceChange:
    """The effect of steering at one site."""

    site: str
    decision: str
    """FVU of the activation and the gate's decision, in words."""
    note: str = ""
    """Why there are no contributions, where there are none."""
    shown: str = ""
    """Which latents are shown, in words."""
    lines: tuple[Line, ...] = ()
    without: str = ""
    """The model string that leaves out the shown latents; empty where there is none."""

    def told(self) -> Iterator[str]:
        """Yield the table of contributions as text."""
        column = max(len(line.name) for line in self.lines)
        yield f"({self.shown})"
        yield f"{'':<{column}}  activation  contribution  {'nearest words' * any(line.words for line in self.lines)}"
        for line in self.lines:
            activation = "" if line.activation is None else f"{line.activation:.2f}"
            near = ", ".join(f"{word} {cosine:.2f}" for word, cosine in line.words)
            share = round(line.values[0], 3) + 0.0  # no -0.000
            yield f"{line.name:<{column}}  {activation:>10}  {share:>+12.3f}  {near}"
        if self.without:
            yield f"without these latents: {self.without}"


@documented
@dataclass(frozen=True)
class Explanation:
    """The effect of steering on one image. Its ``repr`` is a table."""

    classes: list[ClassChange]
    """The best classes before and the best after steering, sorted by probability after."""
    lead: str
    """The two classes of the lead, in words: the best after steering over the best before, or over the second best."""
    places: Sequence[PlaceChange]
    """The sites where the tower was steered, in the tower's order."""

    @property
    def told(self) -> str:
        """The image's class before and after steering, in a sentence."""
        before = max(self.classes, key=lambda one: one.before)
        after = max(self.classes, key=lambda one: one.after)
        if before is after:
            return f"The class stays {after.name}: {after.before:.1%} before, {after.after:.1%} after steering."
        return (
            f"Steering changed the class from {before.name} ({before.before:.1%} before, {before.after:.1%} after) to "
            f"{after.name} ({after.before:.1%} before, {after.after:.1%} after)."
        )

    def lines(self) -> Iterator[str]:
        """Yield the tables of classes and of contributions as text."""
        width = min(max(len("class"), *(len(change.name) for change in self.classes)), 32)
        yield f"{'class':<{width}}   before    after  change of the logit"
        for change in self.classes:
            name = change.name if len(change.name) <= width else change.name[: width - 3] + "..."
            yield f"{name:<{width}}  {100 * change.before:5.1f} %  {100 * change.after:5.1f} %  {change.change:+19.2f}"
        for place in self.places:
            yield f"{place.site}: {place.decision}"
            if place.note:
                yield f"  {place.note}"
            else:
                yield f"  contributions to the lead of {self.lead}"
                yield from (f"  {line}".rstrip() for line in place.told())

    def __repr__(self) -> str:
        return "\n".join([self.told, *self.lines()])


def sae_at(place: Place) -> tuple[TopKSAE, Tensor]:
    """Return the SAE at a place, and the mean activation ``[d]``. Raises ValueError if the place has no SAE."""
    if place.gate is None:
        raise ValueError(f"no SAE at {place.site}")
    return place.gate.sae, place.gate.mean


def words_of(
    model: Steered, place: Place, latents: Tensor, amounts: Tensor, words: Sequence[str], texts: Tensor
) -> list[list[tuple[str, float]]]:
    """Return for each latent the nearest words with their cosines; no words before the tower's end.

    Args:
        model: the steered model.
        place: the place whose SAE has the latents.
        latents: indices of the latents, int64 ``[m]``.
        amounts: a usual activation of each latent, ``[m]``; a latent with 0 gets no words.
        words: the words to choose from.
        texts: embeddings of the words ``[words, e]``, of unit norm.
    """
    if not model.sites.at_end(place.site):
        return [[] for _ in latents]
    sae, mean = sae_at(place)
    steps = amounts.to(mean)[:, None] * sae.W_dec[latents.to(mean.device)].detach()
    cosines, indices = nearest(latent_embeddings(model.model, place.site, mean, steps), texts, _NEAREST)
    return [
        [(words[index], value) for value, index in zip(*row, strict=True)] if amount else []
        for amount, *row in zip(amounts.tolist(), cosines.tolist(), indices.tolist(), strict=True)
    ]


def without(spec: ModelString, place: Place, latents: Sequence[int]) -> str:
    """Return the model string that leaves out ``latents`` at a place where ``spec`` steers along the same SAE; empty
    for the SAE of PASS, without latents, where ``spec`` chooses latents itself, and where they are the neighbours'."""
    method = spec.method
    own = place.gate is not None and method.sae == "plain" and method.gallery != "neighbours"
    if not own or method.name == BY_HAND or not latents:
        return ""
    blocks = [] if spec.options.get("blocks") is None else [f"blocks={place.site.block}"]
    chosen = "suppress=" + "+".join(map(str, sorted(latents)))
    words = [*([] if spec.checkpoint is None else [spec.checkpoint]), *blocks, chosen]
    return str(Parts(BY_HAND, spec.backbone, tuple(words)))


def require_explainable(model: ModelString) -> None:
    """Raise HarnessError for a method on logits, or one that reads the true class, which an image does not hold."""
    if model.reading is not None:
        inner = f"{model.method.name}:{model.backbone}" if model.outer else f"vs2:{model.backbone}"
        raise HarnessError(
            f"{model}: {model.reading.method.name} reads embeddings as classes, but what is explained is how they are "
            f"steered; expected a method that steers by itself, for example {inner}"
        )
    if model.method.gallery == "images" and model.method.labels == "oracle":
        raise HarnessError(
            f"{model}: this oracle needs the true class of the image, which a file does not contain; expected "
            "another method, for example vs2"
        )


def explain(
    model: Steered, image: Tensor, names: Sequence[str], texts: Tensor, *, top: int = 5, latents: int = 8
) -> Explanation:
    """Explain what steering did to an image, latent by latent.

    Args:
        model: the steered model.
        image: ``[1, 3, height, width]``, preprocessed for the tower.
        names: names of the classes.
        texts: embeddings of the classes ``[classes, e]``, float32, of unit norm.
        top: classes shown, the best before and the best after.
        latents: latents shown for each site.

    Raises:
        HarnessError: the method is on logits or needs the image's true class, or there is one class only.
        DataError: the image has no logits.
    """
    require_explainable(model.spec)
    if len(names) < 2:
        raise HarnessError(f"of {len(names)} class none leads over another; expected two classes or more")
    plain, steered = _embeddings(model, image)
    logits = [_logits(embedding, texts)[0] for embedding in (plain, steered)]
    model.places.require_finite()  # before the pixels are blamed
    require_numbers(*(values[None] for values in logits))
    before, after = (values.softmax(0).tolist() for values in logits)
    changes = (logits[1] - logits[0]).tolist()
    best = [values.argsort(descending=True, stable=True).tolist() for values in logits]
    shown = sorted({*best[0][:top], *best[1][:top]}, key=lambda index: -after[index])
    first = best[1][0]
    second = best[0][0] if best[0][0] != first else best[1][1]
    chosen = [first, second, *shown]
    with model.at_hand(image) as batch:
        batch.embed = lambda: plain
        places = [
            _at_place(model, index, batch, image, chosen, names, texts, latents) for index in range(len(model.places))
        ]
    classes = [ClassChange(names[index], before[index], after[index], changes[index]) for index in shown]
    return Explanation(classes, f"{names[first]} over {names[second]}", places)


def _logits(embedding: Tensor, texts: Tensor) -> Tensor:
    """Return the logits ``[batch, classes]`` of embeddings ``[batch, e]``, as clip_benchmark computes them."""
    return 100.0 * F.normalize(embedding.float(), dim=-1) @ texts.T


@torch.no_grad()
def _embeddings(model: Steered, image: Tensor) -> tuple[Tensor, Tensor]:
    """Return the plain and the steered embedding ``[1, e]`` of an image ``[1, 3, height, width]``."""
    with model.unsteered():
        plain: Tensor = model.model.encode_image(image)
    return plain, model.encode_image(image)


@torch.no_grad()
def _activations(model: Steered, index: int, image: Tensor) -> tuple[Tensor, Tensor]:
    """Return the activation ``[1, d]`` at place number ``index``, without and with the steering there.

    Earlier places steer, later ones do not.
    """
    site = model.places[index].site

    def read(first: int) -> Tensor:
        with reading(model.model, [site]) as activation, model.unsteered(first):
            model.model.encode_image(image)
        return activation[site].float()

    return read(index), read(index + 1)


def _at_place(
    model: Steered,
    index: int,
    batch: Batch,
    image: Tensor,
    classes: list[int],
    names: Sequence[str],
    texts: Tensor,
    latents: int,
) -> PlaceChange:
    """Return the effect of steering at one site. ``classes``: the two classes of the lead, then the shown ones."""
    place = model.places[index]
    x, steered = _activations(model, index, image)
    site, decision = str(place.site), _decision(place, x, model.spec.options.get("gate"))
    if place.gate is not None and torch.equal(x, steered):
        return PlaceChange(site, decision, "The activation was left unchanged here, bit for bit.")
    change = _contributions(model, index, batch, x, steered, texts[classes])
    if change is None:
        name = model.spec.method.name
        return PlaceChange(site, decision, f"{name} does not steer by a sparse code of its own, so no latents are "
                                           "shown.")
    move, shares = change
    moves = bool(move.amounts.any())  # REC moves along no latent
    rank = _columns(shares.latents)[:, 0] if moves else move.activations
    chosen = rank.abs().argsort(descending=True, stable=True)[:latents]
    why = "those that contributed most, up or down, to the lead" if moves else "the strongest; none is amplified"
    shown = f"{len(chosen)} of {len(rank)} active latents: {why}"
    words = words_of(model, place, move.latents[chosen], move.activations[chosen], names, texts)
    left_out = without(model.spec, place, move.latents[chosen].tolist())
    return PlaceChange(site, decision, "", shown, tuple(_lines(move, shares, chosen, words)), left_out)


def _contributions(
    model: Steered, index: int, batch: Batch, x: Tensor, steered: Tensor, texts: Tensor
) -> tuple[Movement, Attribution] | None:
    """Return how the steering at place number ``index`` moves an image along latents, and the latents' contributions.

    ``x`` and ``steered`` are the image's activation there ``[1, d]`` before and after the steering, ``texts`` the
    embeddings ``[classes, e]`` of the classes whose logits are explained. None for a method without a sparse code.
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
    """Return contributions to logits ``[..., 2 + shown]`` as contributions to the lead and to the shown classes."""
    return torch.cat([values[..., :1] - values[..., 1:2], values[..., 2:]], dim=-1)


def _lines(
    move: Movement, shares: Attribution, chosen: Tensor, words: list[list[tuple[str, float]]]
) -> Iterator[Line]:
    """Yield the table of contributions, with a line for each of the ``chosen`` active latents."""
    parts = _columns(shares.latents)
    for index, latent, near in zip(chosen.tolist(), move.latents[chosen].tolist(), words, strict=True):
        yield Line(f"latent {latent}", parts[index].tolist(), latent, float(move.activations[index]), tuple(near))
    if others := len(parts) - len(chosen):
        yield Line(counted(others, "other latent"), (parts.sum(0) - parts[chosen].sum(0)).tolist())
    yield Line(move.rest, _columns(shares.rest).tolist())
    yield Line("remainder", _columns(shares.remainder).tolist())
    yield Line("change", _columns(shares.total).tolist())


def _decision(place: Place, x: Tensor, q: object) -> str:
    """Return the FVU of ``x`` ``[1, d]`` and the gate's decision in words; ``q`` is the gate's quantile."""
    if place.gate is None or place.facts is None:
        return "no SAE here, so there is neither FVU nor gate"
    sae, mean = sae_at(place)
    ratio, tau = float(sample_fvu(x, sae(x), mean)), place.gate.tau
    if tau is None:
        usual = place.facts.fvu_quantiles
        among = ""
        if {"0.5", "0.99"} <= usual.keys():
            among = f" (held-out training images: median {usual['0.5']:.3f}, 99 % below {usual['0.99']:.3f})"
        return f"FVU {ratio:.3f}{among}; no gate, every image is steered"
    side, fate = ("within", "steered") if ratio <= tau else ("above", "left alone")
    digits = 3 if abs(ratio - tau) > 1e-3 else 7  # enough to tell them apart
    return f"FVU {ratio:.{digits}f} is {side} the gate's threshold {tau:.{digits}f} (q = {q:g}): {fate}"
