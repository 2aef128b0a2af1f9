"""The pages in a real browser, where one is installed."""

import itertools

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from ..report.test_browser import BROKEN, STICKS_OUT, browser  # noqa: E402, F401
from .test_commands import TINY, run  # noqa: E402


def test_the_pages_in_a_browser(browser, folder, digit, tmp_path):  # noqa: F811
    long = "a-name-that-is-very-long-and-has-no-place-to-break-" * 3
    (tmp_path / "classes.txt").write_text(f"{long}\nzero\none\ntwo\n")
    image = digit(904, f"{long}.png")
    classes = ["--classes", tmp_path / "classes.txt", "--quiet"]
    assert run("inspect", image, digit(905), *classes, "--out", tmp_path / "vs2") == 0
    assert run("inspect", image, *classes, "--out", tmp_path / "vs2pp", model=f"vs2pp:{TINY}") == 0
    assert run("latents", *classes, "--limit", 8, "--out", tmp_path / "latents") == 0
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
