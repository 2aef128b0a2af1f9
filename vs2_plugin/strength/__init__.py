"""How strongly to steer, told from unlabeled images: the criterion behind the word ``auto`` in a model string."""

from vs2_plugin.strength.choice import RULE, Choice, choose
from vs2_plugin.strength.information import Scores, neighbour_graph, scores

__all__ = ["RULE", "Choice", "Scores", "choose", "neighbour_graph", "scores"]
