"""ZERO: a vote of the most confident views of an image (arXiv 2405.18330)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["voted"]

#: Votes given in addition to those of the views: they decide ties, and rank classes without votes.
_SMALL = 0.01
#: The least vote of a class, which has a finite logarithm.
_NONE = 1e-30


def voted(classifier: Tensor, keep: float) -> Callable[[Tensor], Tensor]:
    """Return the function from views ``[batch, views, e]`` to logits ``[batch, classes]``: logarithms of shares of
    votes.

    The views of least entropy vote for their class. A tie is decided by the most confident of the other views that
    predicts one of the tied classes. A hundredth of a vote goes to the class that won, and another to all classes by
    the mean probabilities of the views that vote, so that classes without votes have an order too.

    Args:
        classifier: ``[e, classes]``, of unit norm.
        keep: share of the views that vote; at least one does.
    """

    def read(x: Tensor) -> Tensor:
        shares = (100 * x @ classifier).softmax(2)
        order = torch.special.entr(shares).sum(2).argsort(dim=1, stable=True)
        count = int(round(keep * x.shape[1], 6))  # 0.29 times 100 is less than 29
        chosen, rest = order.tensor_split([max(1, count)], dim=1)
        classes = shares.argmax(2)
        votes = torch.zeros(len(x), classifier.shape[1], dtype=torch.float64, device=x.device)
        votes.scatter_add_(1, classes.gather(1, chosen), votes.new_ones(chosen.shape))
        # Each of the other views counts for more than all after it, and together they are less than a vote.
        fading = 0.5 ** torch.arange(1, rest.shape[1] + 1, device=x.device, dtype=torch.float64)
        won = votes.scatter_add(1, classes.gather(1, rest), fading.expand(rest.shape)).argmax(1, keepdim=True)
        votes += _SMALL * shares.take_along_dim(chosen[..., None], 1).mean(1)
        votes.scatter_add_(1, won, votes.new_full(won.shape, _SMALL))
        return votes.clamp_min(_NONE).log().float()

    return read
