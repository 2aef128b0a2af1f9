"""The figures of latents, read from the axes."""

import numpy as np
import pytest

from vs2_plugin.report import latent_figures
from vs2_plugin.report.latent_figures import draw_agreement, draw_latents, draw_sae


@pytest.fixture
def plotted(monkeypatch):
    """Figures in place of pictures: name -> axes, and name -> caption."""
    captions = {}

    def picture(name, title, caption, plot, *args):
        captions[name] = caption
        return name, plot(*args).axes[0]

    monkeypatch.setattr(latent_figures, "picture", picture)
    return lambda *given: (dict(draw_latents(*given)), captions)


FREQUENCIES = np.array([0, 0.001, 0.01, 0.01, 0.5])
MEANS = np.array([0, 1.0, 2.0, 3.0, 3.0])


def test_dead_latents_are_in_no_figure(plotted):
    axes, _ = plotted(FREQUENCIES, MEANS, 0.01, 0.1, np.array([1, 2, 2]), np.array([0, 0.5, 0.5]))
    assert list(axes) == ["frequency", "strength", "purity"]
    for name in ("frequency", "strength"):
        assert sum(bar.get_height() for bar in axes[name].patches) == 4
    assert [line.get_xdata()[0] for line in axes["frequency"].lines] == pytest.approx([-2, -3, -1])  # even, rare, dense


def test_purity_is_counted_beside_what_chance_gives(plotted):
    axes, captions = plotted(FREQUENCIES, MEANS, 0.01, 0.1, np.array([1, 2, 2, 3]), np.array([0, 0.25, 0.25, 0.5]))
    assert [bar.get_height() for bar in axes["purity"].patches] == [1, 2, 1]
    [chance] = axes["purity"].lines
    assert list(chance.get_xdata()) == [1, 2, 3] and list(chance.get_ydata()) == [1, 1, 2]
    assert "of their 3 top-activating images" in captions["purity"]


def test_without_latents_that_have_all_top_images_there_is_no_purity(plotted):
    axes, _ = plotted(FREQUENCIES, MEANS, 0.01, 0.1, np.array([], int), np.array([0, 1.0]))
    assert list(axes) == ["frequency", "strength"]


def test_there_is_a_figure_for_what_there_is():
    rng = np.random.default_rng(0)
    frequencies, scores = rng.random(50) * 0.2, rng.random(50)
    assert [one.name for one in draw_sae(frequencies, 0.1, scores, scores / 2)] == ["frequency", "meaning"]
    assert draw_sae(np.zeros(50), 0.1, scores[:0], scores[:0]) == []
    found = draw_agreement(scores, scores, 0.7)
    assert found.svg.startswith("<svg") and "found again" in found.caption
    draw_agreement(np.ones(3), np.ones(3), 0.7)
