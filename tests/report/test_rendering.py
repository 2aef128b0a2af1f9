"""Pages and tables from templates, and files that replace nobody else's."""

import math

import pytest
from jinja2 import UndefinedError

from vs2_plugin.errors import DataError
from vs2_plugin.report.rendering import _cell, _code, fixed, render, save


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ((0.58863,), "58.86"), ((0.58863, 0), "59"), ((0.1, 2, True), "+10.00"), ((-0.1, 1, True), "-10.0"),
        ((0.0, 1, True), "+0.0"), ((-1e-12, 2), "0.00"), ((3, 0, False, 1), "3"), ((None,), ""), ((math.nan,), ""),
    ],
)  # fmt: skip
def test_numbers(given, text):
    assert fixed(*given) == text


def test_text_in_a_table_of_markdown_is_only_text():
    assert _cell("a|b\n*c* <d> & #e") == "a\\|b \\*c\\* &lt;d> &amp; \\#e"
    assert _code("a|b\n`c`") == "`a\\|b 'c'`"


@pytest.mark.parametrize("template", ["latents.html", "inspect.html"])
def test_names_on_a_page_show_what_they_hold(template):
    bad = "a\x1b[2J\u202e<b>"
    about = {"title": [("data set", bad)], "problems": [bad], "groups": [], "findings": [], "checkpoint": bad}
    page = render(template, "vs2 x", {"survey": about, "inspection": about, "figures": [], "notes": []}).decode()
    assert "\x1b" not in page and "\u202e" not in page
    assert page.count(r"a\x1b[2J\u202e&lt;b&gt;") >= 2


def test_what_a_template_is_not_given_is_an_error():
    with pytest.raises(UndefinedError):
        render("report.md", "vs2 report", {})


def test_files_are_written_all_or_none(tmp_path):
    folder = tmp_path / "new" / "out"
    files = {"a.html": b"<!-- made by vs2 x -->", "b.csv": b"latent,kind\n"}
    assert save(folder, files, "vs2 x", "latent,kind") == [folder / "a.html", folder / "b.csv"]
    assert save(folder, {**files, "a.html": b"<!-- vs2 x, again -->"}, "vs2 x", "latent,kind")
    assert (folder / "a.html").read_bytes() == b"<!-- vs2 x, again -->"
    for name, mine in (("b.csv", b"mine"), ("a.html", b"x" * 2000 + b"vs2 x")):  # a mark stands near the beginning
        (folder / name).write_bytes(mine)
        match = rf"{name} already exists, and vs2 x did not write it; name another .* --out"
        with pytest.raises(DataError, match=match):
            save(folder, {"new.txt": b"1", **files}, "vs2 x", "latent,kind")
        assert (folder / name).read_bytes() == mine and not (folder / "new.txt").exists()
        (folder / name).write_bytes(files[name])


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write into .*file: .*; name another folder with --out"):
        save(tmp_path / "file", {"a": b""}, "vs2 x")
