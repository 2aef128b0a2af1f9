"""Chooses how strongly to steer from unlabeled images: the criterion behind the word ``auto`` in a model string."""

from vs2_plugin.strength.choice import RULE, Choice, Rule, choose
from vs2_plugin.strength.criterion import NEIGHBOURS, Scores, neighbour_graph, scores

__all__ = ["NEIGHBOURS", "RULE", "Choice", "Rule", "Scores", "choose", "neighbour_graph", "scores"]
