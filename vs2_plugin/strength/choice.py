"""The rule that turns evidence into a choice. Its constants were chosen on half of the study's sources.

See ``benchmark_configs/strength`` for the study, and for how the choices fared on the other half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from vs2_plugin.method import Scalar
from vs2_plugin.strength.criterion import Scores, scores

__all__ = ["RULE", "Choice", "Rule", "choose"]


class Rule(NamedTuple):
    """The evidence that a candidate has to show to be chosen."""

    errors: float
    """A gain of fewer standard errors is no gain. Nor may the shares of the predicted classes move away by more from
    what they should be: all equal, unless a prior is known."""
    gain: float
    """Nats. A smaller gain, however sure, is often a class that falls apart into two: many images tell even that."""
    known: float
    """Of what there is to tell of a neighbour's class (the entropy of the predicted classes), the share that a class
    must tell, for each option that leaves its first value. With less, neighbours are mostly of other classes: the graph
    then knows how images look, but not which class they are of."""

    def objection(self, candidates: Sequence[Mapping[str, Scalar]], scores: Scores, index: int) -> str | None:
        """What speaks against a candidate, in words; None if nothing does."""
        told, entropy = scores.information[index], scores.entropy[index]
        gained, errors = told - scores.information[0], scores.information_errors[index]
        if not (gained > self.gain and errors > self.errors):
            return f"that is not clearly more, or not by much ({gained:+.3f} nats, {errors:+.1f} standard errors)"
        if told < self.known * _used(candidates, index) * entropy:
            return f"that is only {told / entropy:.0%} of what could be known: neighbours are mostly of other classes"
        if scores.divergence_errors[index] > self.errors:
            return (
                "the shares of the classes move away from what they should be "
                f"({scores.divergence[0]:.3f} to {scores.divergence[index]:.3f} nats)"
            )
        return None

    def pick(self, candidates: Sequence[Mapping[str, Scalar]], scores: Scores) -> int:
        """Which candidate to choose by its scores: 0, the plain model, unless others stand up to all objections.

        Of those, the one with most evidence, as the sum of the standard errors by which more is told and the shares
        move to what they should be. (Most information would be the strongest: strength goes on smoothing predictions
        where it no longer mends them.)
        """
        best, chosen = -float("inf"), 0
        for index in range(1, len(candidates)):
            evidence = scores.information_errors[index] - scores.divergence_errors[index]
            if evidence > best and self.objection(candidates, scores, index) is None:
                best, chosen = evidence, index
        return chosen


def _used(candidates: Sequence[Mapping[str, Scalar]], index: int) -> int:
    """Number of options that leave their first value."""
    return sum(value != candidates[0][name] for name, value in candidates[index].items())


RULE = Rule(errors=2.5, gain=0.075, known=0.25)


@dataclass(frozen=True)
class Choice:
    """Values for the automatic options, and what speaks for them."""

    candidates: Sequence[Mapping[str, Scalar]]
    """All that could be chosen; the first leaves the activations as they are."""
    index: int
    """Which was."""
    scores: Scores
    """Of each candidate."""
    images: int
    """Unlabeled images that were looked at."""

    @property
    def values(self) -> dict[str, Scalar]:
        """The chosen values."""
        return dict(self.candidates[self.index])

    @property
    def reason(self) -> str:
        """Why not something else, in words."""
        scores = self.scores
        if self.index == 0:
            rest = range(1, len(self.candidates))
            top = max(rest, key=lambda index: scores.information[index])
            return (
                f"the model is left as it is. Most information is at {_words(self.candidates[top])}, "
                f"{scores.information[top]:.3f} nats: "
                f"{RULE.objection(self.candidates, scores, top)}"
            )
        surely = f"{scores.information_errors[self.index]:+.1f} standard errors"
        ends = [name for name, value in self.values.items() if self._is_end(name, value)]
        more = "" if not ends else f"; no larger {' or '.join(ends)} was tried, which may be better still"
        return surely + more

    def _is_end(self, name: str, value: Scalar) -> bool:
        offered = {candidate[name] for candidate in self.candidates}
        return len(offered) > 2 and value == max(offered)  # of two, one is always the larger

    @property
    def facts(self) -> dict[str, Scalar]:
        """Flat scalars for the results' metrics."""
        scores = self.scores
        evidence = " ".join(
            f"{'/'.join(f'{value:g}' for value in candidate.values())}:{nats:.3f}"
            for candidate, nats in zip(self.candidates, scores.information, strict=True)
        )
        return {
            **self.values,
            "auto": "+".join(self.values),
            "auto_images": self.images,
            "auto_information": round(scores.information[self.index], 4),
            "auto_information_plain": round(scores.information[0], 4),
            "auto_standard_errors": round(scores.information_errors[self.index], 2),
            "auto_entropy": round(scores.entropy[self.index], 4),
            "auto_entropy_plain": round(scores.entropy[0], 4),
            "auto_evidence": evidence,
            "auto_reason": self.reason,
        }

    def __str__(self) -> str:
        chosen = ", ".join(f"{name} = {value:g}" for name, value in self.values.items())
        plain = f"{self.scores.information[0]:.3f} nats"
        over = f"over {self.images} unlabeled images, a class carries"
        if self.index == 0:
            return f"{chosen}: {over} {plain} about the neighbours' classes, {self.reason}"
        told = self.scores.information[self.index]
        return (
            f"{chosen}: {over} {told:.3f} nats about the neighbours' classes, {plain} at {_words(self.candidates[0])} "
            f"({self.reason})"
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain values for :meth:`from_json`."""
        return {"candidates": self.candidates, "index": self.index, "images": self.images, **self.scores._asdict()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Choice:
        """The choice that was written. Raises TypeError, ValueError or LookupError for something else."""
        data = dict(data)
        told = Scores(**{name: data.pop(name) for name in Scores._fields})
        found = cls(scores=told, **data)
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

    See :class:`Rule` for what a candidate has to show, and :data:`RULE` for the constants.

    Args:
        candidates: values of the options; the first leaves the activations as they are.
        ways: classes of the images with each candidate, int64 ``[n]``.
        graph: int64 ``[n, k]``, neighbours of the images; see :func:`neighbour_graph`.
        count: number of classes.
        prior: shares of the classes ``[count]``, if they are known; by default all equal.
    """
    told = scores(ways, graph, count, prior)
    rows = [dict(row) for row in candidates]
    return Choice(rows, RULE.pick(rows, told), told, len(graph))
