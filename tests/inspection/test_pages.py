"""The pages."""

import re

import pytest

from vs2_plugin.errors import DataError
from vs2_plugin.inspection.findings import inspect_images
from vs2_plugin.inspection.pages import write_inspection, write_survey
from vs2_plugin.inspection.pictures import read_image
from vs2_plugin.inspection.survey import survey_latents

from ..report.test_page import Page

BAD = "<img src=x onerror=alert(1)>"


def page_of(paths):
    return Page(paths[0].read_text(encoding="utf-8"))


def pictures(page):
    return [dict(attributes) for tag, attributes in page.elements if tag == "img"]


def test_the_page_of_an_inspection(subject, digit, tmp_path):
    images = [read_image(digit(number)) for number in (904, 905)]
    inspection = inspect_images(subject("vs2"), images)
    page = page_of(write_inspection(inspection, tmp_path))
    assert all(image["src"].startswith("data:image/") and image["alt"] for image in pictures(page))
    assert len(pictures(page)) > 2 + 2 * 8 * 5
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe"}
    assert "904.png" in page.text and "905.png" in page.text and "integrated gradients" in page.text
    assert all(finding.places[0].decision in page.text for finding in inspection.findings)
    write_inspection(inspection, tmp_path)  # over its own page
    (tmp_path / "index.html").write_text("mine")
    with pytest.raises(DataError, match="vs2 inspect did not write it"):
        write_inspection(inspection, tmp_path)
    assert (tmp_path / "index.html").read_text() == "mine"


def test_neighbours_on_the_page(subject, digit, tmp_path):
    inspection = inspect_images(subject("vs2pp", "@n=7"), [read_image(digit(904))])
    page = page_of(write_inspection(inspection, tmp_path))
    assert len([image for image in pictures(page) if image["alt"].startswith("training image, ")]) == 7
    assert len(re.findall("S\N{SUPERSCRIPT PLUS SIGN} \\w+|S\N{SUPERSCRIPT MINUS} \\w+", page.text)) == 7


def test_the_page_of_a_survey(subject, tmp_path):
    survey = survey_latents(subject("vs2"), limit=12)
    paths = write_survey(survey, tmp_path)
    page = page_of(paths)
    assert [path.name for path in paths] == ["index.html", "latents.csv"]
    assert paths[1].read_text(encoding="utf-8") == survey.csv()
    pure = "The purest of many are pure partly by selection"
    for words in ("drawn evenly from the", "Most frequent (densest)", pure):
        assert words in page.text
    assert [tag for tag, _ in page.elements].count("article") == 12
    assert [tag for tag, _ in page.elements].count("svg") == 3
    write_survey(survey, tmp_path)  # over its own files
    paths[1].write_text("mine")
    with pytest.raises(DataError, match="vs2 latents did not write it"):
        write_survey(survey, tmp_path)


def test_hostile_words_are_only_text(subject, digit, tmp_path):
    words = [BAD, "two &amp;", "\N{CAT FACE}"]
    opened = subject("vs2", classes=words, concepts=words)
    image = read_image(digit(904))._replace(name="<b>.png")
    for paths in (
        write_inspection(inspect_images(opened, [image]), tmp_path / "one"),
        write_survey(survey_latents(opened, limit=4), tmp_path / "two"),
    ):
        page = page_of(paths)
        assert all(word in page.text for word in words)
        assert all("onerror" not in one for one in pictures(page)) and "b" not in {tag for tag, _ in page.elements}
