"""Surveys all latents of one SAE: their figures, a selection to show, and a table."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from vs2_plugin.errors import HarnessError
from vs2_plugin.inspection.latents import LatentStatistics, choose, kinds
from vs2_plugin.inspection.notes import TOP_IMAGES
from vs2_plugin.inspection.subject import Card, Subject
from vs2_plugin.model.explanation import sae_at, without
from vs2_plugin.modelstring import ModelString
from vs2_plugin.text import counted

__all__ = ["CSV_HEADER", "Group", "LatentSurvey", "require_sae", "survey_latents"]

CSV_HEADER = (
    "latent,kind,images,frequency,mean_activation,max_activation,top_images,purity,chance_purity,p_purity,class,words"
)  # fmt: skip
#: Way of choosing latents -> title and explanation of the group; see :func:`vs2_plugin.inspection.latents.choose`.
_GROUPS = {
    "random": (
        "Random latents",
        "{latents} drawn evenly from the {alive:,} that are not dead, by a fixed seed. This group represents the SAE; "
        "the others are extremes.",
    ),
    "frequent": ("Most frequent (densest)", "{latents} active in the most training images."),
    "strong": ("Strongest", "{latents} of the largest mean activation over the images in which a latent is active."),
    "pure": (
        "Purest",
        "{latents} of the largest purity, among the {full:,} that have {top} top images (a latent with one image is "
        "pure by itself); ties go to the more frequent. The purest of many are pure partly by selection: "
        "compare the figure.",
    ),
}


@dataclass(frozen=True)
class Group:
    """Cards of latents that were chosen in one way."""

    title: str
    how: str
    cards: list[Card]


@dataclass(frozen=True)
class LatentSurvey:
    """Figures and words of all latents of an SAE, with cards of some."""

    checkpoint: str
    """Name of the checkpoint."""
    k: int
    """Latents that the SAE activates per image, at most."""
    classes: list[str]
    statistics: LatentStatistics
    kinds: np.ndarray
    """str ``[n]``: kinds of the latents; see :func:`vs2_plugin.inspection.latents.kinds`."""
    words: list[list[tuple[str, float]]]
    """For each latent the nearest words with their cosines; empty before the tower's end."""
    title: tuple[tuple[str, str], ...] = ()
    """Names and values that describe the subject, and the figures of the whole SAE."""
    groups: tuple[Group, ...] = ()
    """The groups of latents that are shown."""
    problems: tuple[str, ...] = ()
    """Sentences that say what could not be shown, and why."""

    def figures(self) -> list[tuple[str, str]]:
        """Return the figures of the whole SAE, as names and values."""
        n, even, statistics = len(self.kinds), self.k / len(self.kinds), self.statistics

        def share(kind: str) -> str:
            count = int((self.kinds == kind).sum())
            return f"{count:,} ({count / n:.1%})"

        figures = [
            ("training images", f"{statistics.images:,}"),
            ("latents", f"{n:,}, of which {self.k} are active in an image; k/n = {even:.3%}"),
            ("dead", f"{share('dead')}: active in none of the images"),
            ("rare", f"{share('rare')}: in less than a tenth of k/n, {even / 10:.3%} of the images"),
            ("dense", f"{share('dense')}: in more than a tenth of the images"),
        ]
        full = statistics.full
        if full.any():
            mean = statistics.purity[1][full].mean() / TOP_IMAGES
            expected = statistics.purity_by_chance(int(full.argmax()))[0]
            latents = counted(int(full.sum()), "latent")
            figures.append(("purity", f"{mean:.1%} on average over {latents}; by chance it would be {expected:.1%}"))
        return figures

    def csv(self) -> str:
        """Return a CSV table with a row for each latent."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(CSV_HEADER.split(","))
        writer.writerows(self._row(latent) for latent in range(len(self.kinds)))
        return text.getvalue()

    def _row(self, latent: int) -> list[object]:
        statistics = self.statistics
        count = statistics.counts[latent]
        row = [latent, self.kinds[latent], count, f"{statistics.frequencies[latent]:.6g}"]
        if not count:
            return [*row, *[""] * 8]
        shown, label, votes = (values[latent] for values in (statistics.shown, *statistics.purity))
        strength = (statistics.means[latent], statistics.values[latent, 0])
        purity = (votes / shown, *statistics.purity_by_chance(latent))
        return [
            *row, *(f"{value:.6g}" for value in strength), shown, *(f"{value:.4g}" for value in purity),
            self.classes[label], "; ".join(word for word, _ in self.words[latent]),
        ]  # fmt: skip


def require_sae(model: ModelString) -> None:
    """Raise HarnessError for a method that steers along no SAE."""
    method = model.method
    if method.site != "checkpoint" or not method.needs_checkpoint:
        raise HarnessError(f"{model}: {method.name} does not steer along an SAE; expected a method that does, such as "
                           "vs2")


def survey_latents(subject: Subject, *, limit: int = 100) -> LatentSurvey:
    """Survey all latents of an SAE, in one pass over the checkpoint's gallery, in blocks.

    Args:
        subject: the steered model.
        limit: latents shown in all groups, a quarter in each.

    Raises:
        CheckpointError: the checkpoint has no gallery.
        HarnessError: the method steers along no SAE, or at several sites.
    """
    model, checkpoint = subject.model, subject.model.checkpoint
    require_sae(model.spec)
    place, places = model.places[-1], len(model.places)
    assert checkpoint is not None  # as the method has an SAE
    checkpoint.require_gallery()
    if places > 1:
        raise HarnessError(
            f"{model.spec} steers at {places} sites, each with an SAE of its own; expected one, for example "
            f"@blocks={place.site.block}"
        )
    statistics, k = subject.statistics(place), sae_at(place)[0].config.k
    assert statistics is not None  # as there is a gallery
    words = subject.words_of(place, np.arange(len(statistics.counts)), statistics.means)
    survey = LatentSurvey(
        checkpoint.name, k, subject.classes, statistics, kinds(statistics.frequencies, k), words
    )
    groups = tuple(_groups(survey, subject, limit))
    shown = dict.fromkeys(card.latent for group in groups for card in group.cards)
    example = without(model.spec, place, list(shown)[:2])
    title = (*subject.title, ("site", str(place.site)), *survey.figures())
    title += (("to leave some out", example),) if example else ()
    return replace(survey, title=title, groups=groups, problems=tuple(subject.problems))


def _groups(survey: LatentSurvey, subject: Subject, limit: int) -> Iterator[Group]:
    """Yield the groups of latents that are shown, without empty ones."""
    statistics = survey.statistics
    full, alive = int(statistics.full.sum()), int((statistics.counts > 0).sum())
    for name, latents in choose(statistics, limit).items():
        cards = [
            subject.card(latent, survey.words[latent], statistics, str(survey.kinds[latent]))
            for latent in latents.tolist()
        ]
        if cards:
            title, how = _GROUPS[name]
            how = how.format(latents=counted(len(cards), "latent"), top=TOP_IMAGES, full=full, alive=alive)
            yield Group(title, how, cards)
