"""The page in a real browser, where one is installed: no error, nothing broken, nothing wider than the screen."""

import itertools
import shutil
from pathlib import Path

import pytest

from vs2_plugin.report.page import write
from vs2_plugin.results.runs import read

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
#: Nothing is to be looked up: the page is on disk.
OFFLINE = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture
def browser():
    with playwright.sync_playwright() as running:
        own = running.chromium.executable_path
        names = ("chromium", "chromium-browser", "google-chrome")
        path = own if Path(own).is_file() else next(filter(None, map(shutil.which, names)), None)
        if path is None:
            pytest.skip("no Chromium is installed")
        chromium = running.chromium.launch(executable_path=path, args=OFFLINE)
        yield chromium
        chromium.close()


#: What sticks out to the right of the screen, unless it scrolls inside a box of its own.
STICKS_OUT = """() => [...document.querySelectorAll('body *')].filter(
    one => one.getBoundingClientRect().right > innerWidth + 1 && !one.closest('.scroll, pre, svg')
).map(one => one.outerHTML.slice(0, 120))"""
BROKEN = """() => [...document.images].filter(one => !one.complete || !one.naturalWidth).length
    + [...document.querySelectorAll('svg')].filter(one => one.getBoundingClientRect().height < 50).length"""


def test_the_page_in_a_browser(browser, results, write_run, make_images, steered, tmp_path):
    long = "a-name-that-is-very-long-and-has-no-place-to-break-" * 3
    write_run(f"vs2:B@{long}@gate=0.9", images=make_images(0.6, 9, classes=[long, *"bcdef"]), metrics=steered(gate=0.9))
    write_run(long, dataset=long, task="zeroshot_retrieval", metrics={f"recall@{number}": 0.5 for number in range(20)})
    write(read([results])[0], tmp_path / "out")

    for scheme, width in itertools.product(("light", "dark"), (360, 1280)):
        problems, asked = [], []
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.on("pageerror", lambda error, problems=problems: problems.append(str(error)))
        page.on("console", lambda message, problems=problems: problems.append(message.text))
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.goto((tmp_path / "out" / "index.html").as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")

        assert problems == []
        assert [url for url in asked if not url.startswith("data:")] == [page.url]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(STICKS_OUT) == []
        assert page.locator("svg").count() >= 8 and page.evaluate(BROKEN) == 0
        background = "rgb(254, 254, 254)" if scheme == "light" else "rgb(18, 23, 29)"
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == background
        page.close()
