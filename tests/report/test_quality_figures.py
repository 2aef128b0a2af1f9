"""Figures of ``vs2 sae``."""

import numpy as np

from vs2_plugin.report.quality_figures import draw_agreement, draw_sae


def test_there_is_a_figure_for_what_there_is():
    rng = np.random.default_rng(0)
    frequencies, scores = rng.random(50) * 0.2, rng.random(50)
    assert [one.name for one in draw_sae(frequencies, 0.1, scores, scores / 2)] == ["frequency", "meaning"]
    assert draw_sae(np.zeros(50), 0.1, scores[:0], scores[:0]) == []
    found = draw_agreement(scores, scores, 0.7)
    assert found.svg.startswith("<svg") and "found again" in found.caption
    draw_agreement(np.ones(3), np.ones(3), 0.7)
