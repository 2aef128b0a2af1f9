"""The contact sheet."""

import pytest
from PIL import Image

from vs2_plugin.classify.page import Sheet
from vs2_plugin.errors import DataError


def row(path, name="cat", probability=0.9, plain="cat", plain_probability=0.8):
    return {
        "path": str(path), "class": name, "probability": probability, "plain_class": plain,
        "plain_probability": plain_probability, "changed": name != plain, "fvu": 0.1, "steered": True,
    }  # fmt: skip


@pytest.fixture
def picture(tmp_path):
    def write(name):
        Image.new("RGB", (60, 40), "red").save(tmp_path / name)
        return tmp_path / name

    return write


def test_what_steering_changed_comes_first(picture, tmp_path):
    rows = [
        row(picture("a.png"), probability=0.81),
        row(picture("b.png"), plain="dog"),
        row(picture("c.png"), probability=0.2, plain_probability=0.9),
        row(picture("d.png"), "dog <b>", plain="dog"),
        row(tmp_path / "gone.png", "dog <b>", plain="dog <b>"),
        {"path": "bad.png", "error": "not a readable image"},
    ]
    sheet = Sheet.of(rows)
    assert (sheet.count, sheet.changed, sheet.unreadable_count) == (5, 2, 1)
    cats, dogs = sheet.groups()
    assert [one.row["path"][-5] for one in cats.images] == ["b", "c", "a"] and (cats.count, cats.changed) == (3, 1)
    assert dogs.images[1].picture is None and dogs.more == 0
    html = sheet.write(tmp_path / "out" / "page.html", [("model", "vs2:B")]).read_text()
    html = html.replace("&nbsp;", " ")
    assert "Steering changed the class of 2 of 5 images (40.0 %)" in html
    assert "dog &lt;b&gt; 90.0 %" in html and "was dog 80.0 %" in html and "not a readable image" in html
    assert html.count("data:image/") == 4 and "https:" not in html


def test_of_many_images_few_are_shown_and_the_rest_is_counted(picture, tmp_path):
    path = picture("a.png")
    rows = (row(path, f"class {number % 100:03d}", 0.5, f"class {number % 90:03d}") for number in range(2000))
    sheet = Sheet.of(rows)
    groups = sheet.groups()
    assert sheet.count == 2000 and len(groups) == 75 and all(len(group.images) == 4 for group in groups)
    assert groups[0].changed >= groups[-1].changed and groups[0].more == groups[0].count - 4
    html = sheet.write(tmp_path / "page.html", []).read_text()
    assert "500 images of 25 other classes are in the table only" in html and "16 more in the table" in html
    (one,) = Sheet.of(row(path) for _ in range(100)).groups()
    assert len(one.images) == 24 and "12 more pictures" in Sheet.of(row(path) for _ in range(100)).write(
        tmp_path / "page.html", []
    ).read_text()


def test_somebody_elses_page_is_not_replaced(tmp_path):
    (tmp_path / "page.html").write_text("<p>mine")
    with pytest.raises(DataError, match="did not write it; name another file with --page"):
        Sheet.of([]).write(tmp_path / "page.html", [])
