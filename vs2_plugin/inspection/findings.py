"""What ``vs2 inspect`` finds out about an image: classes, contributions of latents, neighbours."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vs2_plugin.inspection.pictures import Thumbnail, TrainingPictures, thumbnail
from vs2_plugin.inspection.subject import NO_WORDS, Subject, scan_gallery, words_of
from vs2_plugin.text import counted

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor

    from vs2_plugin.gallery.gallery import Gallery
    from vs2_plugin.harness.places import Place
    from vs2_plugin.inspection.latents import LatentStatistics
    from vs2_plugin.steering.batch import Batch

__all__ = ["AtPlace", "Card", "ClassChange", "Finding", "Inspector", "Line", "Neighbour", "describe"]


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
class Card:
    """What is known of one latent."""

    latent: int
    words: list[tuple[str, float]] | None
    about: str
    pictures: list[Thumbnail]


@dataclass
class AtPlace:
    """What happened at one site."""

    site: str
    decision: str
    note: str = ""
    """In place of contributions, why there are none."""
    shown: str = ""
    """Which latents are shown."""
    lines: list[Line] = field(default_factory=list)
    cards: list[Card] = field(default_factory=list)


@dataclass(frozen=True)
class Neighbour:
    """A training image that was looked up."""

    similarity: float
    label: str
    side: str
    """S+ or S-, or empty for a method that has no such sets."""
    picture: Thumbnail | None


@dataclass
class Finding:
    """One image."""

    path: str
    picture: Thumbnail
    classes: list[ClassChange]
    lead: str
    """What the lead is of, in words."""
    places: list[AtPlace]
    about_neighbours: str = ""
    neighbours: list[Neighbour] = field(default_factory=list)


class Inspector:
    """Looks at images through one steered model."""

    def __init__(self, subject: Subject, args: argparse.Namespace) -> None:

        self.subject, self.args = subject, args
        self.model = subject.model
        self.gallery: Gallery | None = None
        self.pictures: TrainingPictures | None = None
        checkpoint = self.model.checkpoint
        self._problems: dict[str, None] = {}
        if checkpoint is not None and checkpoint.gallery is not None:
            self.gallery = checkpoint.open_gallery()
            self.pictures = TrainingPictures(
                checkpoint, self.gallery, args.dataset_root, subject.transform, args.wds_cache_dir
            )
        elif checkpoint is not None:
            self._problems["The checkpoint has no gallery, so that no training images are shown."] = None
        self._statistics: dict[str, LatentStatistics] = {}

    @property
    def problems(self) -> list[str]:
        """What could not be shown, and why."""
        return [*self._problems, *(self.pictures.problems if self.pictures else ())]

    def look(self, path: str, picture: Image) -> Finding:
        """Everything about one image."""
        import torch

        model, texts = self.model, self.subject.class_texts
        image = self.subject.transform(picture)[None].to(self.subject.device)
        places = model.places
        with torch.no_grad():
            with model.unsteered():
                plain = model.model.encode_image(image)
            logits = [_logits(embedding, texts)[0] for embedding in (plain, model.encode_image(image))]
        before, after = (values.softmax(0).tolist() for values in logits)
        order = [values.argsort(descending=True, stable=True).tolist() for values in logits]
        shown = sorted({*order[0][: self.args.top], *order[1][: self.args.top]}, key=lambda index: -after[index])
        first = order[1][0]
        second = order[0][0] if order[0][0] != first else order[1][1]
        names = self.subject.classes
        changes = (logits[1] - logits[0]).tolist()
        finding = Finding(
            path,
            thumbnail(picture, 240),
            [ClassChange(names[index], before[index], after[index], changes[index]) for index in shown],
            f"{names[first]} over {names[second]}",
            [],
        )
        with model.at_hand(image) as batch:
            batch.embed = lambda: plain
            if model.spec.method.gallery == "neighbours":
                self._neighbours(finding, batch)
            for index, place in enumerate(places):
                finding.places.append(self._at(place, index, image, batch, [first, second, *shown]))
        return finding

    def _at(self, place: Place, index: int, image: Tensor, batch: Batch, classes: list[int]) -> AtPlace:
        """What happened at one site. ``classes``: the two that the lead is between, then those shown."""
        import torch

        from vs2_plugin.inspection.attribution import attribute, movement, tail

        model = self.model
        with torch.no_grad():
            x = self._activation(place, image, index)
            steered = self._activation(place, image, index + 1)
        at = AtPlace(str(place.site), _decision(place, x, model.spec.options.get("gate")))
        if place.gate is not None and torch.equal(x, steered):
            at.note = "The activation was left alone here, bit for bit."
            return at
        with torch.no_grad():
            move = place.move(x, batch)
        if move is None:
            at.note = f"{model.spec.method.name} steers by no sparse code of its own, so that no latents are shown."
            return at
        moved, sae = movement(move), move.code.sae
        steps = moved.amounts[:, None] * sae.W_dec[moved.latents].detach()
        texts = self.subject.class_texts[classes]
        with model.unsteered(index):
            rest_of_tower = tail(model.model, model.sites, place.site, image)
            found = attribute(lambda z: _logits(rest_of_tower(z), texts), x[0], steps, steered[0])

        def columns(values: Tensor) -> Tensor:
            return torch.cat([values[..., :1] - values[..., 1:2], values[..., 2:]], dim=-1)

        parts = columns(found.latents)
        moves = bool(moved.amounts.any())  # REC goes along none
        rank = parts[:, 0] if moves else moved.activations
        chosen = rank.abs().argsort(descending=True, stable=True)[: self.args.latents]
        others = len(parts) - len(chosen)
        why = "those that contributed most, up or down, to the lead" if moves else "the strongest; none is amplified"
        at.shown = f"{len(chosen)} of {len(parts)} active latents: {why}"
        at.lines = [
            Line(f"latent {latent}", parts[one].tolist(), latent, float(moved.activations[one]))
            for one, latent in zip(chosen.tolist(), moved.latents[chosen].tolist(), strict=True)
        ]
        if others:
            at.lines.append(Line(counted(others, "other latent"), (parts.sum(0) - parts[chosen].sum(0)).tolist()))
        at.lines += [
            Line(moved.rest, columns(found.rest).tolist()),
            Line("remainder", columns(found.remainder).tolist()),
            Line("change", columns(found.total).tolist()),
        ]
        at.cards = self._cards(place, moved.latents[chosen].cpu().numpy(), moved.activations[chosen].cpu().numpy())
        return at

    def _activation(self, place: Place, image: Tensor, start: int) -> Tensor:
        """The activation ``[1, d]`` at a site, with the steerings from number ``start`` on not there."""
        from vs2_plugin.clip.edits import reading

        with reading(self.model.model, [place.site]) as read, self.model.unsteered(start):
            self.model.model.encode_image(image)
        return read[place.site].float()

    def _cards(self, place: Place, latents: np.ndarray, activations: np.ndarray) -> list[Card]:
        import numpy as np

        sae, mean = place.gate.sae, place.gate.mean
        found, amounts = None, activations
        if self.gallery is not None:
            hookpoint = place.site.hookpoint
            if hookpoint not in self._statistics:
                self._statistics[hookpoint] = scan_gallery(self.subject, self.gallery, hookpoint, sae, self.args.quiet)
            found = self._statistics[hookpoint]
            amounts = np.where(found.counts[latents] > 0, found.means[latents], activations)
        words = words_of(self.subject, place.site, sae, mean, latents, amounts, 3)
        if words is None:
            self._problems[NO_WORDS] = None
        cards = []
        for index, latent in enumerate(latents.tolist()):
            about, pictures = "", []
            if found is not None:
                about = describe(found, latent, self.subject.classes)
                pictures = self.pictures.of(found.rows[latent])
            cards.append(Card(latent, None if words is None else words[index], about, pictures))
        return cards

    def _neighbours(self, finding: Finding, batch: Batch) -> None:
        """Show the neighbours that a method looked up for the image at hand."""
        from vs2_plugin.steering.retriever import majority

        retriever, options = self.model.places.retriever, self.model.spec.options
        hood = retriever.neighbours(batch)
        kind = "oracle" if options.get("labels") == "oracle" else "pseudo"
        labels = retriever.labels(kind)[hood.rows]
        names = dict(enumerate(self.subject.classes)) if kind == "pseudo" or len(self.gallery.datasets) == 1 else {}
        side = ["" for _ in range(hood.rows.shape[1])]
        whose = "zero-shot class" if kind == "pseudo" else "training label"
        about = f"The {counted(int(hood.valid.sum()), 'nearest training image')}, nearest first, each with its {whose}"
        if options.get("rule") is not None:
            count = max(int(labels.max()) + 1, len(self.subject.classes))
            on_device = labels.to(retriever.device)
            chosen = retriever.classes(batch) if options["rule"] == "query" else majority(on_device, hood, count)[0]
            side = ["S+" if label == int(chosen[0]) else "S-" for label in labels[0].tolist()]
            name = names.get(int(chosen[0]), f"class {int(chosen[0])}")
            about += f". Steered towards the {side.count('S+')} of {name!r} (S+)"
            about += f", away from the {counted(side.count('S-'), 'other')} (S-)"
        finding.about_neighbours = f"{about}."
        rows = zip(hood.rows[0], labels[0].tolist(), hood.similarity[0], hood.valid[0], side, strict=True)
        finding.neighbours = [
            Neighbour(float(similarity), names.get(label, f"class {label}"), which, self.pictures(int(row)))
            for row, label, similarity, valid, which in rows
            if valid
        ]


def _logits(embedding: Tensor, texts: Tensor) -> Tensor:
    import torch.nn.functional as F

    return 100.0 * F.normalize(embedding.float(), dim=-1) @ texts.T


def _decision(place: Place, x: Tensor, q: float | None) -> str:
    """FVU and gate, in words."""
    from vs2_plugin.sae.topk import sample_fvu

    gate = place.gate
    if gate is None:
        return "no SAE here, so that there is neither FVU nor gate"
    ratio = float(sample_fvu(x, gate.sae(x), gate.mean))
    if gate.tau is None:
        usual = place.facts.fvu_quantiles
        among = f" (held-out training images: median {usual['0.5']:.3f}, 99 % below {usual['0.99']:.3f})"
        return f"FVU {ratio:.3f}{among if {'0.5', '0.99'} <= usual.keys() else ''}; no gate, every image is steered"
    inside = ratio <= gate.tau
    return (
        f"FVU {ratio:.3f} is {'within' if inside else 'above'} the gate's threshold {gate.tau:.3f} (q = {q:g}): "
        f"{'steered' if inside else 'left alone'}"
    )


def describe(statistics: LatentStatistics, latent: int, classes: list[str]) -> str:
    """What the gallery says of a latent, in a line."""
    count = int(statistics.counts[latent])
    if not count:
        return f"active in none of {statistics.images:,} training images"
    label, votes = (int(values[latent]) for values in statistics.purity)
    images, mean, shown = statistics.images, statistics.means[latent], int(statistics.shown[latent])
    return (
        f"active in {count:,} of {counted(images, 'training image')} ({count / images:.1%}), mean {mean:.2f}; of "
        f"the top {shown}, {votes} {'is' if votes == 1 else 'are'} {classes[label]!r} by zero-shot"
    )
