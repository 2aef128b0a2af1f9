"""Presents the figures of SAEs: as lines, as JSON values, and as a page that opens from disk."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vs2_plugin.quality.dictionary import Agreement
from vs2_plugin.quality.measure import STABLE, Figure, Measured
from vs2_plugin.quality.notes import NOTES, Note
from vs2_plugin.report.drawing import Picture
from vs2_plugin.report.latent_figures import draw_agreement, draw_sae
from vs2_plugin.report.rendering import render, require_place, save
from vs2_plugin.sae.fit import DENSE

__all__ = ["Quality", "Row", "require_page_place", "write_page"]

#: Mark near the beginning of the page, so that only such pages are overwritten.
_MARK = "vs2 sae"
#: How ``quality.json`` begins.
_JSON = '{\n "saes"'


def require_page_place(folder: Path) -> None:
    """Raise DataError if :func:`write_page` could not write into ``folder``, before anything is measured."""
    require_place(folder, ("index.html", "quality.json"), _MARK, _JSON)


class Cell(NamedTuple):
    """One figure of one SAE, or of all together, as text."""

    shown: str
    """The figure; empty where it is missing."""
    beside: str
    """The figure that it is compared with, or empty."""
    why: str
    """Why it is missing."""


@dataclass(frozen=True)
class Row:
    """One figure for all SAEs, as text."""

    note: Note
    cells: list[Cell]
    """One for each SAE, or one for all."""


@dataclass(frozen=True)
class Quality:
    """All measured figures of one SAE or several."""

    saes: Sequence[Measured]
    together: dict[str, Figure]
    """Figures of the SAEs' agreement, such as stability across seeds."""
    pairs: Sequence[tuple[str, str, Agreement]]

    def compared(self) -> list[dict[str, Any]]:
        """Return the pairs of SAEs with their stability figures, as JSON values."""
        return [
            {"one": one, "other": other, "stability": float(agreement.cosines.mean()),
             "stable": float((agreement.cosines >= STABLE).mean())}
            for one, other, agreement in self.pairs
        ]  # fmt: skip

    def json(self) -> str:
        """Return all figures as JSON."""
        content = {
            "saes": [
                {**_identity(sae), "figures": {key: asdict(figure) for key, figure in sae.figures.items()}}
                for sae in self.saes
            ],
            "together": {key: asdict(figure) for key, figure in self.together.items()},
            "pairs": self.compared(),
        }
        return json.dumps(content, indent=1) + "\n"

    def rows(self) -> list[Row]:
        """Return the figures, in the order in which they are shown."""
        return [
            _row(note, [self.together[key]] if key in self.together else [sae.figures[key] for sae in self.saes])
            for key, note in NOTES.items()
        ]

    def lines(self) -> Iterator[str]:
        """Yield the figures as lines of text: SAEs, warnings, figures, and reasons for missing ones."""
        yield from (f"{name}: {text}" for name, text in _facts(self.saes))
        yield from (f"warning: {sae.subject.name}: {words}" for sae in self.saes for words in warnings(sae))
        if len(self.saes) > 1:
            yield f"figures of {', '.join(sae.subject.name for sae in self.saes)}:"
        missing = []
        for row in self.rows():
            if not any(cell.shown for cell in row.cells):
                missing.append(f"not measured: {row.note.title}: {row.cells[0].why}")
                continue
            yield _line(row)
            lacking = [pair for pair in zip(self.saes, row.cells, strict=False) if not pair[1].shown]
            missing += [f"not measured for {sae.subject.name}: {row.note.title}: {cell.why}" for sae, cell in lacking]
        yield from missing


def _line(row: Row) -> str:
    """Return a figure of all SAEs, and what each is compared with, as a line."""
    shown, beside, _ = ([text or "?" for text in texts] for texts in zip(*row.cells, strict=True))
    words = f"  ({row.note.beside}: {', '.join(beside)})" if any(cell.beside for cell in row.cells) else ""
    return f"  {row.note.title}: {', '.join(shown)}{words}"


def _identity(measured: Measured) -> dict[str, Any]:
    subject, images = measured.subject, measured.subject.images
    return {
        "checkpoint": subject.checkpoint.name,
        "digest": subject.checkpoint.digest,
        "site": subject.site.hookpoint,
        "variant": subject.site.variant,
        "width": subject.site.width,
        "latents": subject.sae.config.num_latents,
        "k": subject.sae.config.k,
        "images": None if images is None else images.about,
        "held_out": 0 if images is None else len(images.held),
        "looked_at": 0 if measured.codes is None else measured.codes.matrix.shape[0],
        "embedded_by": None if images is None else images.embedded_by,
    }


def about(measured: Measured) -> str:
    """Return a sentence about an SAE's shape and the images that its figures are of."""
    subject, images = measured.subject, measured.subject.images
    config = subject.sae.config
    shape = f"{config.num_latents:,} latents of width {config.d_in:,}, {config.k} active, at {subject.site.hookpoint}"
    if images is None or measured.codes is None:
        return f"{shape}; no activations are available, so the figures are those of its training"
    looked = measured.codes.matrix.shape[0]
    return (
        f"{shape}; {images.about}: reconstruction and probes on {images.held_out}, latents on {looked:,}, which are "
        f"compared by {images.embedded_by}"
    )


def warnings(measured: Measured) -> Iterator[str]:
    """Yield warnings of an SAE that has not learned enough."""
    subject = measured.subject
    if subject.site.warning is not None:
        yield f"the SAE is useless: {subject.site.warning}"
    elif subject.site.below_components:
        yield f"the SAE has learned too little: {subject.site.below_components}"


def _row(note: Note, figures: Sequence[Figure]) -> Row:
    def shown(value: float | None) -> str:
        return "" if value is None else note.form.format(value)

    return Row(note, [Cell(shown(figure.value), shown(figure.beside), figure.why) for figure in figures])


def write_page(quality: Quality, folder: Path) -> list[Path]:
    """Write ``index.html`` and ``quality.json`` into ``folder``; return the files written.

    Raises:
        DataError: another file of such a name is there, or the folder cannot be written to.
    """
    context = {
        "names": [sae.subject.name for sae in quality.saes],
        "facts": _facts(quality.saes),
        "warnings": [(sae.subject.name, list(warnings(sae))) for sae in quality.saes],
        "rows": quality.rows(),
        "pictures": [(sae.subject.name, _pictures(sae)) for sae in quality.saes],
        "agreement": _agreement(quality.pairs),
        "pairs": quality.compared(),
    }
    page = render("quality.html", _MARK, context)
    return save(folder, {"index.html": page, "quality.json": quality.json().encode()}, _MARK, _JSON)


def _facts(saes: Sequence[Measured]) -> list[tuple[str, str]]:
    """Return name and description of each SAE; one entry ``all`` where all descriptions are equal."""
    facts = [(sae.subject.name, about(sae)) for sae in saes]
    return [("all", facts[0][1])] if len(facts) > 1 and len({text for _, text in facts}) == 1 else facts


def _pictures(measured: Measured) -> list[Picture]:
    if measured.codes is None or measured.meaning is None:
        return []
    scored = ~np.isnan(measured.meaning.scores)
    scores, shuffled = (values[scored] for values in measured.meaning)
    return draw_sae(measured.codes.frequencies, DENSE, scores, shuffled)


def _agreement(pairs: Sequence[tuple[str, str, Agreement]]) -> Picture | None:
    if not pairs:
        return None
    cosines, random = (np.concatenate([getattr(result, which) for *_, result in pairs]) for which in Agreement._fields)
    return draw_agreement(cosines, random, STABLE)
