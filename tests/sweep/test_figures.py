"""Pictures of grids, read from the axes."""

import numpy as np

from vs2_plugin.sweep import figures
from vs2_plugin.sweep.grid import read_grids


def drawn(text, plain=50.0, values=None, **named):
    """The figures of a grid with a value for each point: what tells it from others -> figure."""
    [grid] = read_grids([text])
    numbers = range(len(grid.points)) if values is None else values
    values = {point.model: float(number) for number, point in zip(numbers, grid.points, strict=True)}
    return {f"picture{words and '@'}{words}": figure for words, figure in figures.draw(grid, values, plain, **named)}


def test_one_point_is_no_picture():
    assert drawn("vs2:X@gamma=2") == {}


def test_one_numeric_axis_is_a_curve_for_each_value_of_the_others():
    figure = drawn("vs2pp:X@n=10,50@rule=majority,query")["picture"]
    [axes] = figure.axes
    zero, *lines = axes.lines
    assert zero.get_ydata()[0] == 50 and axes.get_xlabel() == "n"
    curves = [line for line in lines if len(line.get_xdata()) > 1]
    assert [list(line.get_xdata()) for line in curves] == [[10, 50]] * 2
    assert [list(line.get_ydata()) for line in curves] == [[0, 2], [1, 3]]  # the last axis changes fastest
    labels = [line.get_label() for line in curves]
    assert labels == ["rule=majority: best 2.00 at n=50", "rule=query: best 3.00 at n=50"]
    assert axes.get_title() == "the best point is chosen on these very images: report its accuracy on others"


def test_numbers_rise_along_an_axis_however_they_were_given():
    [axes] = drawn("vs2:X@alpha=2,0.5,1")["picture"].axes
    [curve] = [line for line in axes.lines if len(line.get_xdata()) == 3]
    assert list(curve.get_xdata()) == [0.5, 1, 2] and list(curve.get_ydata()) == [1, 2, 0]
    axes, _ = drawn("vs2:X@gamma=2,1@lam=4,2,3")["picture"].axes
    assert np.array_equal(axes.images[0].get_array(), [[4, 1], [5, 2], [3, 0]])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2"]


def test_words_stand_at_even_places():
    [axes] = drawn("vs2:X@blocks=3,2+3,all")["picture"].axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["3", "2+3", "all"]
    [curve] = [line for line in axes.lines if len(line.get_xdata()) == 3]
    assert list(curve.get_xdata()) == [0, 1, 2] and list(curve.get_ydata()) == [0, 1, 2]


def test_two_numeric_axes_are_a_heat_map_for_each_value_of_the_others():
    found = drawn("vs2pp:X@rule=majority,query@gamma=1:3:1@lam=2,4", plain=7.5)
    assert list(found) == ["picture@rule=majority", "picture@rule=query"]
    axes, bar = found["picture@rule=query"].axes
    assert np.array_equal(axes.images[0].get_array(), [[6, 8, 10], [7, 9, 11]])  # gamma across, lambda up
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("gamma", "lam")
    assert (axes.lines[0].get_xdata()[0], axes.lines[0].get_ydata()[0]) == (2, 1)  # the star
    assert "best, 11.00 at gamma=3, lam=4; zero-shot (red): 7.50" in axes.get_title()
    assert 7.5 in [line.get_ydata()[0] for line in bar.lines]
    assert all(line.get_ydata()[0] != 7.5 for line in found["picture@rule=majority"].axes[1].lines)  # outside of it


def test_points_that_are_equally_good_all_have_a_star():
    [axes] = drawn("vs2:X@alpha=1,2,3", values=[1, 5, 5])["picture"].axes
    assert [line.get_label() for line in axes.lines][1] == "best 5.00 at alpha=2 and 1 other point"
    assert [list(line.get_xdata()) for line in axes.lines if line.get_marker() == "*"] == [[2], [3]]
    axes, _ = drawn("vs2:X@gamma=1,2@lam=1,2", values=[5, 1, 5, 5])["picture"].axes
    assert len(axes.lines) == 3 and "best, 5.00 at gamma=1, lam=1 and 2 other points; zero-shot" in axes.get_title()


def test_a_third_numeric_axis_has_a_heat_map_for_each_of_its_values():
    found = drawn("vs2pp:X@gamma=1,2@lam=3,4@n=5,10")
    assert list(found) == ["picture@n=5", "picture@n=10"]
    assert np.array_equal(found["picture@n=10"].axes[0].images[0].get_array(), [[1, 5], [3, 7]])


def test_what_is_drawn_is_named():
    for text in ("vs2:X@alpha=1,2", "vs2:X@gamma=1,2@lam=1,2"):
        axes = drawn(text, measure="mean average precision")["picture"].axes
        assert "mean average precision, %" in [axis.get_ylabel() for axis in axes]


def test_a_picture_is_a_file(tmp_path):
    [grid] = read_grids(["vs2:X@gamma=1,2"])
    [(_, figure)] = figures.draw(grid, {point.model: 1.0 for point in grid.points}, 1.0)
    assert figures.save(figure, tmp_path / "a.png", "vs2 sweep").read_bytes()[:4] == b"\x89PNG"
