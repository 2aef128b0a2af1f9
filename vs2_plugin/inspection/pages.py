"""Writes the pages of inspections and surveys, which open from disk."""

from __future__ import annotations

from pathlib import Path

from vs2_plugin.inspection.findings import Inspection
from vs2_plugin.inspection.notes import ATTRIBUTION, GROUPS, PURITY, TOP_IMAGES, WORDS
from vs2_plugin.inspection.survey import CSV_HEADER, LatentSurvey
from vs2_plugin.report.latent_figures import draw_latents
from vs2_plugin.report.rendering import render, require_place, save
from vs2_plugin.sae.fit import DENSE

__all__ = ["require_inspection_place", "require_survey_place", "write_inspection", "write_survey"]

#: Marks near the beginning of the pages, so that only such pages are overwritten.
_INSPECTION, _SURVEY = "vs2 inspect", "vs2 latents"


def require_inspection_place(folder: Path) -> None:
    """Raise DataError if :func:`write_inspection` could not write into ``folder``, before anything is computed."""
    require_place(folder, ("index.html",), _INSPECTION)


def require_survey_place(folder: Path) -> None:
    """Raise DataError if :func:`write_survey` could not write into ``folder``, before anything is computed."""
    require_place(folder, ("index.html", "latents.csv"), _SURVEY, CSV_HEADER)


def write_inspection(inspection: Inspection, folder: Path) -> list[Path]:
    """Write ``index.html`` into ``folder``, and return the files written.

    Raises:
        DataError: another file of that name is there, or the folder cannot be written to.
    """
    context = {"inspection": inspection, "notes": [ATTRIBUTION, PURITY, WORDS]}
    return save(folder, {"index.html": render("inspect.html", _INSPECTION, context)}, _INSPECTION)


def write_survey(survey: LatentSurvey, folder: Path) -> list[Path]:
    """Write ``index.html`` and ``latents.csv``, a table of all latents, into ``folder``, and return the files written.

    Raises:
        DataError: another file of such a name is there, or the folder cannot be written to.
    """
    statistics = survey.statistics
    figures = draw_latents(
        statistics.frequencies, statistics.means, survey.k / len(survey.kinds), DENSE,
        statistics.purity[1][statistics.full], statistics.chance[TOP_IMAGES],
    )  # fmt: skip
    context = {"survey": survey, "figures": figures, "notes": [GROUPS, WORDS]}
    files = {"index.html": render("latents.html", _SURVEY, context), "latents.csv": survey.csv().encode()}
    return save(folder, files, _SURVEY, CSV_HEADER)
