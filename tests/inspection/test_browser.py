"""The pages in a real browser, where one is installed."""

import itertools

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from vs2_plugin.inspection.findings import inspect_images
from vs2_plugin.inspection.pages import write_inspection, write_survey
from vs2_plugin.inspection.pictures import read_image
from vs2_plugin.inspection.survey import survey_latents

from ..report.test_browser import BROKEN, STICKS_OUT, browser  # noqa: F401


def test_the_pages_in_a_browser(browser, subject, digit, tmp_path):  # noqa: F811
    long = "a-name-that-is-very-long-and-has-no-place-to-break-" * 3
    classes = [long, "zero", "one", "two"]
    images = [read_image(digit(904))._replace(name=f"{long}.png"), read_image(digit(905))]
    vs2 = subject("vs2", classes=classes)
    write_inspection(inspect_images(vs2, images), tmp_path / "vs2")
    write_inspection(inspect_images(subject("vs2pp", classes=classes), images[:1]), tmp_path / "vs2pp")
    write_survey(survey_latents(vs2, limit=8), tmp_path / "latents")
    for name, scheme, width in itertools.product(("vs2", "vs2pp", "latents"), ("light", "dark"), (360, 1280)):
        problems, asked = [], []
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.on("pageerror", lambda error, problems=problems: problems.append(str(error)))
        page.on("console", lambda message, problems=problems: problems.append(message.text))
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.goto((tmp_path / name / "index.html").as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")

        assert problems == []
        assert [url for url in asked if not url.startswith("data:")] == [page.url]
        assert page.evaluate("document.documentElement.scrollWidth") <= width, (name, width)
        assert page.evaluate(STICKS_OUT) == []
        assert page.locator("img").count() > 40 and page.evaluate(BROKEN) == 0
        background = "rgb(254, 254, 254)" if scheme == "light" else "rgb(18, 23, 29)"
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == background
        page.close()
