"""The figure of a stress test."""

from vs2_plugin.stress.figure import draw
from vs2_plugin.stress.outcomes import Outcome, means


def test_draws_that_agree_but_for_rounding_are_drawn(tmp_path):
    outcomes = [
        Outcome(model, "image", axis, value, number, 10, 2, accuracy, accuracy, 0.1)
        for model, accuracy in (("B", 0.1), ("vs2:B", 0.19))
        for axis, value in (("all", ""), ("tail", "10"))
        for number in range(3)
    ]
    mean = means(outcomes)["vs2:B", "all", ""]
    assert mean.change != mean.range[0]  # by rounding
    assert draw(outcomes, tmp_path / "figure.png").stat().st_size > 5000
