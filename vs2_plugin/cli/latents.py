"""``vs2 latents``: a page and a table of all latents of an SAE."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vs2_plugin.cli.common import AGAIN, load_torch
from vs2_plugin.errors import HarnessError
from vs2_plugin.inspection.pictures import Thumbnail, TrainingPictures
from vs2_plugin.inspection.subject import (
    NO_WORDS,
    TOP_IMAGES,
    WORDS,
    Subject,
    add_settings,
    open_subject,
    positive,
    say,
    scan_gallery,
    words_of,
)
from vs2_plugin.text import counted

if TYPE_CHECKING:
    import numpy as np

    from vs2_plugin.inspection.latents import LatentStatistics

__all__ = ["add_latents"]

MARK = "vs2 latents"
_WORDS = 3

_DESCRIPTION = """\
Look at a whole SAE: how many latents are dead, rare or dense, how often and how strongly they are active, how pure
their top-activating training images are by zero-shot class (and would be by chance), and a choice of latents with
those images and their nearest words. Writes a page that opens from disk (index.html) and a table of all latents
(latents.csv). Reads the gallery of the checkpoint once, in blocks."""

_EXAMPLES = """\
examples:
  vs2 latents --model vs2:ViT-B-32-quickgelu --pretrained openai --dataset cifar100 --dataset_root root
  vs2 latents --model vs2:ViT-B-32-quickgelu@blocks=10 --pretrained openai --dataset cifar100 --dataset_root root \\
      --concepts words.txt --limit 40 --out block-10
"""

_GROUPS = {
    "random": (
        "Random latents",
        "{latents} drawn evenly from the {alive:,} that are not dead, by a fixed seed. This group stands for the SAE; "
        "the others are extremes.",
    ),
    "frequent": ("Most frequent (densest)", "{latents} active in the most training images."),
    "strong": (
        "Strongest",
        "{latents} of the largest mean activation over the images in which a latent is active.",
    ),
    "pure": (
        "Purest",
        "{latents} of the largest purity, among the {full:,} that have {top} top images (a latent with one image is "
        "pure by itself); of equals, the more frequent. The purest of many are pure by selection too: "
        "compare the figure.",
    ),
}
_PURITY = (
    "Top images: the {top} training images in which a latent's activation is largest. Purity: the share of them that "
    "has the most frequent zero-shot class among them. Chance: the mean purity of as many images drawn at random with "
    "the gallery's own class frequencies, computed exactly; p is the probability that such a draw is at least as pure, "
    "without correction for the number of latents. No true label is read. A latent may stand in several groups."
)
_HEADER = (
    "latent,kind,images,frequency,mean_activation,max_activation,top_images,purity,chance_purity,p_purity,class,words"
)  # fmt: skip


def add_latents(commands: argparse._SubParsersAction) -> None:
    """Add the sub-command."""
    command = commands.add_parser(
        "latents",
        help="a page and a table of all latents of an SAE",
        description=_DESCRIPTION,
        epilog=f"{_EXAMPLES}\n{_PURITY.format(top=TOP_IMAGES)}\n\n{WORDS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_settings(command)
    add = command.add_argument
    add("--limit", type=positive, default=100, help="latents shown, a quarter in each group (default: %(default)s)")
    add("--out", type=Path, default=Path("latents"), help="folder to write (default: %(default)s)")
    add("--quiet", action="store_true", help="print nothing but errors")
    command.set_defaults(run=_latents, interrupted=AGAIN)


@dataclass(frozen=True)
class Card:
    """What is shown of one latent."""

    latent: int
    kind: str
    words: list[tuple[str, float]]
    about: str
    pictures: list[Thumbnail]


@dataclass(frozen=True)
class Group:
    """Latents that were chosen in one way."""

    title: str
    how: str
    cards: list[Card]


def _latents(args: argparse.Namespace) -> None:
    load_torch()
    import numpy as np

    from vs2_plugin.inspection.latents import chance, choose, kinds
    from vs2_plugin.modelstring import parse
    from vs2_plugin.report.latent_figures import draw_latents
    from vs2_plugin.report.rendering import render, save

    method = parse(args.model).method
    if method.site != "checkpoint" or not method.needs_checkpoint:
        raise HarnessError(f"{args.model}: {method.name} steers along no SAE; expected a method that does, such as vs2")
    subject = open_subject(args)
    checkpoint = subject.model.checkpoint
    places = subject.model.places
    if len(places) > 1:
        raise HarnessError(
            f"{args.model} steers at {len(places)} sites, each with an SAE of its own; expected one, for example "
            f"@blocks={places[-1].site.block}"
        )
    [place] = places
    gallery = checkpoint.open_gallery()
    sae, mean = place.gate.sae, place.gate.mean
    found = scan_gallery(subject, gallery, place.site.hookpoint, sae, args.quiet)
    table = _Table(
        subject, found,
        kinds(found.frequencies, sae.config.k),
        words_of(subject, place.site, sae, mean, np.arange(len(found.counts)), found.means, _WORDS),
        chance(found.class_counts, TOP_IMAGES),
    )  # fmt: skip
    pictures = TrainingPictures(checkpoint, gallery, args.dataset_root, subject.transform, args.wds_cache_dir)
    groups = table.groups(choose(found, args.limit), pictures)
    problems = list(pictures.problems)
    if table.words is None:
        problems.append(NO_WORDS)
    full = found.shown == TOP_IMAGES
    facts = table.facts(sae.config.k)
    context = {
        "checkpoint": checkpoint.name,
        "title": [*subject.title, ("site", str(place.site)), *facts],
        "problems": problems,
        "figures": draw_latents(
            found.frequencies, found.means, sae.config.k / len(found.counts), found.purity[1][full],
            table.chance[TOP_IMAGES],
        ),
        "groups": groups,
        "notes": [_PURITY.format(top=TOP_IMAGES), WORDS],
    }  # fmt: skip
    files = {"index.html": render("latents.html", MARK, context), "latents.csv": table.csv().encode()}
    written = save(args.out, files, MARK, _HEADER)
    if args.quiet:
        return
    for name, value in context["title"]:
        say(f"{name}: {value}")
    for problem in problems:
        print(f"vs2: {problem}", file=sys.stderr)
    for path in written:
        print(f"wrote {path}")


class _Table:
    """All latents of an SAE, in words and numbers."""

    def __init__(
        self,
        subject: Subject,
        found: LatentStatistics,
        kind: np.ndarray,
        words: list[list[tuple[str, float]]] | None,
        chance: np.ndarray,
    ) -> None:
        self.subject, self.found, self.kind, self.words, self.chance = subject, found, kind, words, chance
        self._label, self._votes = found.purity
        self._shown = found.shown

    def _chance(self, latent: int) -> tuple[float, float]:
        """The mean purity by chance, and the probability of one at least as large as this latent's."""
        import numpy as np

        shown, row = self._shown[latent], self.chance[self._shown[latent]]
        return float(row @ np.arange(len(row)) / shown), min(1.0, float(row[self._votes[latent] :].sum()))

    def facts(self, k: int) -> list[tuple[str, str]]:
        """The figures of the whole."""
        found = self.found
        n = len(found.counts)

        def share(kind: str) -> str:
            count = int((self.kind == kind).sum())
            return f"{count:,} ({count / n:.1%})"

        even = k / n
        facts = [
            ("training images", f"{found.images:,}"),
            ("latents", f"{n:,}, of which {k} are active in an image; k/n = {even:.3%}"),
            ("dead", f"{share('dead')}: active in none of the images"),
            ("rare", f"{share('rare')}: in less than a tenth of k/n, {even / 10:.3%} of the images"),
            ("dense", f"{share('dense')}: in more than ten times k/n, {10 * even:.3%} of the images"),
        ]
        full = self._shown == TOP_IMAGES
        if full.any():
            mean, expected = (
                self._votes[full].mean() / TOP_IMAGES,
                self._chance(int(full.argmax()))[0],
            )
            facts.append(
                (
                    "purity",
                    f"{mean:.1%} on average over {counted(int(full.sum()), 'latent')}; by chance it would be "
                    f"{expected:.1%}",
                )
            )
        return facts

    def about(self, latent: int) -> str:
        """A latent's numbers, in a line."""
        found, shown = self.found, int(self._shown[latent])
        count, share, mean = found.counts[latent], found.frequencies[latent], found.means[latent]
        name, votes = self.subject.classes[self._label[latent]], int(self._votes[latent])
        return (
            f"active in {counted(count, 'image')} ({share:.2%}), mean {mean:.2f}; "
            f"purity {votes / shown:.0%} ({votes} of {shown} {'is' if votes == 1 else 'are'} {name!r}; by chance "
            f"{self._chance(latent)[0]:.0%})"
        )

    def groups(self, chosen: dict[str, np.ndarray], pictures: TrainingPictures) -> list[Group]:
        """The latents that are shown."""
        full, alive = int((self._shown == TOP_IMAGES).sum()), int((self.found.counts > 0).sum())
        groups = []
        for name, latents in chosen.items():
            title, how = _GROUPS[name]
            cards = [
                Card(
                    latent, str(self.kind[latent]), self.words[latent] if self.words else [], self.about(latent),
                    pictures.of(self.found.rows[latent]),
                )
                for latent in latents.tolist()
            ]  # fmt: skip
            if cards:
                said = how.format(latents=counted(len(cards), "latent"), top=TOP_IMAGES, full=full, alive=alive)
                groups.append(Group(title, said, cards))
        return groups

    def csv(self) -> str:
        """One row per latent."""
        import csv
        import io

        found, text = self.found, io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(_HEADER.split(","))
        for latent in range(len(found.counts)):
            known = [latent, self.kind[latent], found.counts[latent], f"{found.frequencies[latent]:.6g}"]
            if not found.counts[latent]:
                writer.writerow([*known, *[""] * 8])
                continue
            shown, (expected, p) = self._shown[latent], self._chance(latent)
            words = "; ".join(word for word, _ in self.words[latent]) if self.words else ""
            numbers = (found.means[latent], found.values[latent, 0])
            purity = (self._votes[latent] / shown, expected, p)
            writer.writerow([
                *known, *(f"{value:.6g}" for value in numbers), shown, *(f"{value:.4g}" for value in purity),
                self.subject.classes[self._label[latent]], words,
            ])  # fmt: skip
        return text.getvalue()
