"""What the figures show, read from the axes."""

import numpy as np
import pytest

from vs2_plugin.report import figures
from vs2_plugin.report.summary import summarise
from vs2_plugin.results.runs import read
from vs2_plugin.results.statistics import share_interval


def group_of(folder):
    ((group,),) = (section.groups for section in summarise(read([folder])[0]))
    return group


@pytest.fixture(scope="module")
def group(all_results):
    return group_of(all_results)


def test_there_is_a_figure_for_all_that_there_is_data_for(group, monkeypatch):
    monkeypatch.setattr(figures, "picture", lambda name, title, caption, *plot: (name, title, caption))
    pictures = figures.draw(group)
    kinds = ["accuracy", "gate", "gamma-lambda-vs2", "against-alpha", "against-n"]
    kinds += [f"{kind}-{method}" for kind in ("fvu", "calibration") for method in ("vs2", "pass", "other")]
    assert [name for name, _, _ in pictures] == kinds
    captions = {name: caption for name, _, caption in pictures}
    assert captions["accuracy"].endswith(" Left out: results that the curves show.") == (
        len(group.main) < len(group.rows)
    )
    # How to read them is said once.
    assert captions["fvu-pass"] == captions["calibration-other"] != captions["fvu-vs2"]


def test_only_what_there_is_data_for(write_run, steered, monkeypatch):
    monkeypatch.setattr(figures, "picture", lambda name, *rest: name)
    assert figures.draw(group_of(write_run("vs2:B", metrics=steered()))) == ["accuracy"]


def test_accuracy_has_a_dot_with_its_interval_for_each_row(group):
    figure = figures._accuracy(group.main)
    [axes] = figure.axes
    dots = axes.containers
    assert [bar.lines[0].get_xdata()[0] for bar in dots] == pytest.approx([100 * row.top1 for row in group.main])
    heights = [bar.lines[0].get_ydata()[0] for bar in dots]
    assert heights == sorted(heights) and axes.get_ylim()[0] > axes.get_ylim()[1]  # the first row stands above
    for bar, row in zip(dots, group.main, strict=True):
        if row.interval is not None:
            [[start, end]] = bar.lines[2][0].get_segments()
            assert (start[0], end[0]) == pytest.approx((100 * row.interval.low, 100 * row.interval.high))
    written = [text.get_text() for text in axes.texts]
    assert [text for text in written if text.replace(".", "").isdigit()] == [f"{100 * r.top1:.2f}" for r in group.main]
    legend = {text.get_text() for text in figure.legends[0].get_texts()}
    assert legend == {"zero-shot", "no labels, unlabeled images", "training labels used", "oracle: true labels used"}


def test_the_gate_stands_at_even_places_with_no_gate_last(group):
    curves = group.curves()["gate"]
    above, below = figures._gate(curves, group.zero).axes
    assert [tick.get_text() for tick in below.get_xticklabels()] == ["0.9", "0.99", "no gate"]
    [curve] = curves
    assert above.containers[0].lines[0].get_ydata() == pytest.approx(
        [100 * row.run.number("vs2_coverage") for _, row in curve.points]
    )
    assert list(below.containers[0].lines[0].get_xdata()) == [0, 1, 2]
    assert below.containers[0].lines[0].get_ydata() == pytest.approx([100 * row.top1 for _, row in curve.points])
    assert 100 * group.zero.top1 in [line.get_ydata()[0] for line in below.lines]


def test_many_curves_look_different(group):
    curves = group.curves()["gate"] * 12
    [axes] = figures._curve("gate", curves, group.zero).axes
    lines = [one.lines[0] for one in axes.containers]
    assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}) == len(lines) == 12


@pytest.mark.parametrize("key", ["alpha", "n"])
def test_a_curve_holds_its_results_at_their_values(group, key):
    curves = group.curves()[key]
    [axes] = figures._curve(key, curves, group.zero).axes
    assert len(axes.containers) == len(curves)
    for drawn, curve in zip(axes.containers, curves, strict=True):
        assert drawn.lines[0].get_xdata() == pytest.approx([value for value, _ in curve.points])
        assert drawn.lines[0].get_ydata() == pytest.approx([100 * row.top1 for _, row in curve.points])


def test_the_heat_map_is_empty_where_nothing_was_evaluated(group):
    ((_, cells),) = group.grids()
    axes, _ = figures._grid(cells).axes
    ticks = (axes.get_xticklabels(), axes.get_yticklabels())
    gammas, lams = ([float(tick.get_text()) for tick in some] for some in ticks)
    assert gammas == [1.5, 2] and lams == [1, 2, 2.1] and (2, 2.1) not in cells
    values = np.ma.masked_invalid(axes.collections[0].get_array()).filled(np.nan).reshape(3, 2)
    expected = [[100 * cells[gamma, lam].top1 if (gamma, lam) in cells else np.nan for gamma in gammas] for lam in lams]
    assert np.allclose(values, expected, equal_nan=True)
    assert len([text for text in axes.texts if text.get_text()]) == len(cells) == 5


def test_accuracy_by_fvu_is_that_of_the_images_in_each_bin(group):
    [row] = [row for row in group.methods if row.run.method == "vs2"]
    [axes] = figures._fvu(row, row.pairing).axes
    before, after = axes.containers
    for drawn, correct in ((before, row.pairing.was_correct), (after, row.pairing.after.correct)):
        shares = [correct[found.images].mean() for found in row.bins]
        assert drawn.lines[0].get_ydata() == pytest.approx([100 * share for share in shares])
        ends = [[start[1], end[1]] for start, end in drawn.lines[2][0].get_segments()]
        expected = [share_interval(correct[found.images]) for found in row.bins]
        assert np.allclose(ends, [[100 * one.low, 100 * one.high] for one in expected])


def test_reliability_leaves_out_empty_bins_and_tells_the_error(group):
    row = group.methods[0]
    before, after = row.calibration_before, row.calibration
    above, below = figures._reliability("a name", before, after).axes
    lines = {line.get_label(): line for line in above.lines}
    for name, found in (("zero-shot", before), ("a name", after)):
        line = lines[f"{name}: ECE {100 * found.ece:.1f} points"]
        filled = found.share > 0
        assert not filled.all() and line.get_xdata() == pytest.approx(100 * found.confidence[filled])
        assert line.get_ydata() == pytest.approx(100 * found.accuracy[filled])
    assert [patch.get_data().values.sum() for patch in below.patches] == pytest.approx([100, 100])
