"""The rule that turns evidence into a choice. Its constants were chosen on half of the study's sources.

See ``benchmark_configs/strength`` for the study, and for how the choices fared on the other half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vs2_plugin.method import Scalar
from vs2_plugin.strength.criterion import scores

__all__ = ["RULE", "Choice", "Rule", "choose"]


class Rule(NamedTuple):
    """The evidence that a candidate has to show to be chosen."""

    errors: float
    """A gain of fewer standard errors is no gain."""
    gain: float
    """Nats. A smaller gain, however sure, is often a class that falls apart into two (many images tell even that). It
    is believed only where modularity, which such a split lowers, rises as surely."""
    price: float
    """Nats that each further option which leaves its first value must bring."""

    def pick(
        self,
        candidates: Sequence[Mapping[str, Scalar]],
        information: Sequence[float],
        information_errors: Sequence[float],
        modularity_errors: Sequence[float],
        away: Sequence[float] | None = None,
    ) -> int:
        """Which candidate to choose by its evidence, as :class:`Choice` holds it. 0, the plain model, wins all ties."""
        first, best, chosen = candidates[0], -float("inf"), 0
        for index, candidate in enumerate(candidates):
            gained = information[index] - information[0]
            backed = gained > self.gain or modularity_errors[index] > self.errors
            allowed = away is None or away[index] <= away[0]
            if not (gained > 0 and information_errors[index] > self.errors and backed and allowed):
                continue
            used = sum(value != first[name] for name, value in candidate.items())
            worth = information[index] - self.price * used
            if worth > best:
                best, chosen = worth, index
        return chosen


RULE = Rule(errors=2.0, gain=0.1, price=0.02)


@dataclass(frozen=True)
class Choice:
    """Values for the automatic options, and what speaks for them."""

    candidates: Sequence[Mapping[str, Scalar]]
    """All that could be chosen; the first leaves the activations as they are."""
    index: int
    """Which was."""
    information: Sequence[float]
    """Of each candidate, in nats; see :class:`Scores`, as for the next three."""
    information_errors: Sequence[float]
    """Standard errors above the first candidate."""
    modularity: Sequence[float]
    """Of each candidate."""
    modularity_errors: Sequence[float]
    """Standard errors above the first candidate."""
    images: int
    """Unlabeled images that were looked at."""
    away: Sequence[float] | None = None
    """Of each candidate: total variation between the shares of the predicted classes and a prior, if one is known."""

    @property
    def values(self) -> dict[str, Scalar]:
        """The chosen values."""
        return dict(self.candidates[self.index])

    @property
    def facts(self) -> dict[str, Scalar]:
        """Flat scalars for the results' metrics."""
        evidence = " ".join(
            f"{'/'.join(f'{value:g}' for value in candidate.values())}:{nats:.3f}"
            for candidate, nats in zip(self.candidates, self.information, strict=True)
        )
        return {
            **self.values,
            "auto": "+".join(self.values),
            "auto_images": self.images,
            "auto_information": round(self.information[self.index], 4),
            "auto_information_plain": round(self.information[0], 4),
            "auto_standard_errors": round(self.information_errors[self.index], 2),
            "auto_evidence": evidence,
        }

    def __str__(self) -> str:
        chosen = ", ".join(f"{name} = {value:g}" for name, value in self.values.items())
        top = max(range(len(self.candidates)), key=lambda index: self.information[index])
        told = f"{self.information[0]:.3f} nats at {_words(self.candidates[0])}"
        if self.index == 0:
            return (
                f"{chosen}: left at that. Over {self.images} unlabeled images, what a class tells of the neighbours' "
                f"classes is {told}, and no candidate passes the rule (best: {self.information[top]:.3f} at "
                f"{_words(self.candidates[top])}, {self.information_errors[top]:+.1f} standard errors)"
            )
        return (
            f"{chosen}: over {self.images} unlabeled images, a class tells {self.information[self.index]:.3f} nats of "
            f"the neighbours' classes, {told} ({self.information_errors[self.index]:+.1f} standard errors)"
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain values for :meth:`from_json`."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Choice:
        """The choice that was written. Raises TypeError, ValueError or LookupError for something else."""
        found = cls(**data)
        str(found), found.facts  # a damaged one cannot be told
        return found


def _words(candidate: Mapping[str, Scalar]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in candidate.items())


def choose(
    candidates: Sequence[Mapping[str, Scalar]],
    ways: Sequence[Tensor],
    graph: Tensor,
    count: int,
    prior: Tensor | None = None,
) -> Choice:
    """Choose between candidates by the classes that they give to the same unlabeled images.

    A candidate has to raise the information surely, and either by much or together with the modularity; of those
    that do, the one with most information is taken, less a price for every option beyond the first that it uses
    (:data:`RULE`). With a known ``prior``, a candidate may not move the shares of the predicted classes away from it.

    Args:
        candidates: values of the options; the first leaves the activations as they are.
        ways: classes of the images with each candidate, int64 ``[n]``.
        graph: int64 ``[n, k]``, neighbours of the images; see :func:`neighbour_graph`.
        count: number of classes.
        prior: shares of the classes ``[count]``, if they are known.
    """
    columns = [[float(value) for value in column] for column in scores(ways, graph, count)]
    away = None if prior is None else [_distance(way, prior) for way in ways]
    information, information_errors, knit, modularity_errors = columns
    index = RULE.pick(candidates, information, information_errors, modularity_errors, away)
    rows = [dict(row) for row in candidates]
    return Choice(rows, index, information, information_errors, knit, modularity_errors, len(graph), away)


def _distance(classes: Tensor, prior: Tensor) -> float:
    share = torch.bincount(classes, minlength=len(prior)).to(prior) / len(classes)
    return float((share - prior).abs().sum() / 2)
