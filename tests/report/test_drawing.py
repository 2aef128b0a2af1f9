"""The look of the figures: colours are the page's, and nothing else of the surroundings shows."""

import io
import re

import matplotlib
import numpy as np
from PIL import Image

from vs2_plugin.report.drawing import COLOURS, LINES, PAPER, PLAIN, new_figure, picture


def plot(height, title):
    figure = new_figure(height)
    axes = figure.add_subplot(title=title)
    for place, colour in enumerate((PLAIN, *LINES)):
        axes.plot([0, 1], [place, place], color=colour)
    return figure


def test_colours_on_the_page_are_variables_and_in_the_file_those_of_paper():
    found = picture("a", "b", "c", plot, 2.0, "some title")
    assert (found.name, found.title, found.caption) == ("a", "b", "c")
    assert not [colour for colour in COLOURS.values() if colour in found.svg]
    drawn = {variable for variable in COLOURS if f"var({variable})" in found.svg}
    assert drawn == set(COLOURS) - {"--paper"}  # the page's own paper shows through
    with Image.open(io.BytesIO(found.png)) as image:
        pixels = np.asarray(image.convert("RGB"))
        assert image.info == {"Software": "vs2 report", "dpi": image.info["dpi"]}
        assert image.size == (840, 400)  # 4.2 by 2 inches
    seen = {f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in np.unique(pixels.reshape(-1, 3), axis=0)}
    assert seen >= {PAPER, PLAIN, *LINES}


def test_the_svg_is_a_part_of_a_page():
    svg = picture("a", "b", "c", plot, 2.0, "some title").svg
    assert svg.startswith('<svg viewBox="') and 'aria-hidden="true"' in svg and svg.rstrip().endswith("</svg>")
    for word in ("<?xml", "<!--", "<metadata", "<g id=", "width="):
        assert word not in svg.partition(">")[0] and (word == "width=" or word not in svg)


def test_names_that_refer_to_something_differ_between_the_figures_of_a_page():
    """Two figures on one page share no id."""
    one, same, other = (picture(name, "b", "c", plot, 2.0, "t") for name in ("a", "a", "b"))
    ids = [set(re.findall(r' id="(.*?)"', found.svg)) for found in (one, other)]
    clips = [{name for name in some if name.startswith("p")} for some in ids]  # and letters, which are the same in all
    assert one.svg == same.svg and one.png == same.png
    assert clips[0] and clips[1] and clips[0] & clips[1] == set()


def test_a_dollar_and_a_strange_letter_are_text(recwarn):
    found = picture("a", "b", "c", plot, 2.0, "$\\frac{$ \u732b")
    assert found.png[:4] == b"\x89PNG" and not recwarn.list
    assert matplotlib.rcParams["text.parse_math"] is True  # outside, as it was
