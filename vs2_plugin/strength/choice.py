"""The rule that chooses a candidate by its scores. Its constants were tuned on half of the study's sources.

See ``benchmark_configs/strength`` for the study, and for the results of the rule on the other half.
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
    """The evidence that a candidate needs to be chosen."""

    errors: float
    """Least gain of information, in standard errors. Nor may the shares of the predicted classes move away from the
    prior (by default all equal) by more standard errors than this."""
    gain: float
    """Least gain of information, in nats. A smaller one, however significant, often only means that a class is split in
    two, which many images make significant too."""
    known: float
    """Least share of the entropy of the predicted classes that a class must tell about its neighbour's, per option that
    leaves its first value. With less, neighbours are mostly of other classes: the graph then shows which images look
    alike, but not which are of one class."""

    def objection(self, candidates: Sequence[Mapping[str, Scalar]], scores: Scores, index: int) -> str | None:
        """Return the objection to a candidate, in words; None if there is none."""
        nats, entropy = scores.information[index], scores.entropy[index]
        gained, errors = nats - scores.information[0], scores.information_errors[index]
        if not (gained > self.gain and errors > self.errors):
            return f"that is not clearly more, or not by much ({gained:+.3f} nats, {errors:+.1f} standard errors)"
        if nats < self.known * _used(candidates, index) * entropy:
            return f"that is only {nats / entropy:.0%} of what could be known: neighbours are mostly of other classes"
        if scores.divergence_errors[index] > self.errors:
            return (
                "the shares of the classes move away from what they should be "
                f"({scores.divergence[0]:.3f} to {scores.divergence[index]:.3f} nats)"
            )
        return None

    def pick(self, candidates: Sequence[Mapping[str, Scalar]], scores: Scores) -> int:
        """Return the index of the candidate to choose: 0, the plain model, if there is an objection to every other one.

        Among the others the one with most evidence is chosen: the sum of the standard errors by which information
        rises and by which the shares of the classes move towards the prior. (By information alone, the strongest would
        be chosen: more strength goes on smoothing predictions where it no longer corrects them.)
        """
        best, chosen = -float("inf"), 0
        for index in range(1, len(candidates)):
            evidence = scores.information_errors[index] - scores.divergence_errors[index]
            if evidence > best and self.objection(candidates, scores, index) is None:
                best, chosen = evidence, index
        return chosen


def _used(candidates: Sequence[Mapping[str, Scalar]], index: int) -> int:
    """Return the number of options of a candidate that differ from the first candidate's."""
    return sum(value != candidates[0][name] for name, value in candidates[index].items())


RULE = Rule(errors=2.5, gain=0.075, known=0.25)


@dataclass(frozen=True)
class Choice:
    """Values for the automatic options, and the evidence for them."""

    candidates: Sequence[Mapping[str, Scalar]]
    """All candidates; the first leaves the activations unchanged."""
    index: int
    """Index of the chosen candidate."""
    scores: Scores
    """The scores of all candidates."""
    images: int
    """Number of unlabeled images used."""

    @property
    def values(self) -> dict[str, Scalar]:
        """The chosen values."""
        return dict(self.candidates[self.index])

    @property
    def reason(self) -> str:
        """The reason for the choice, in words."""
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
        return len(offered) > 2 and value == max(offered)  # with two values, one is always the larger

    @property
    def facts(self) -> dict[str, Scalar]:
        """Scalars for the metrics of the results file."""
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
        nats = self.scores.information[self.index]
        return (
            f"{chosen}: {over} {nats:.3f} nats about the neighbours' classes, {plain} at {_words(self.candidates[0])} "
            f"({self.reason})"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the choice as plain values for :meth:`from_json`."""
        return {"candidates": self.candidates, "index": self.index, "images": self.images, **self.scores._asdict()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Choice:
        """Read the values of :meth:`to_json`. Raises TypeError, ValueError or LookupError for any others."""
        data = dict(data)
        read = Scores(**{name: data.pop(name) for name in Scores._fields})
        choice = cls(scores=read, **data)
        str(choice), choice.facts  # a damaged choice fails to render
        return choice


def _words(candidate: Mapping[str, Scalar]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in candidate.items())


def choose(
    candidates: Sequence[Mapping[str, Scalar]],
    ways: Sequence[Tensor],
    graph: Tensor,
    count: int,
    prior: Tensor | None = None,
) -> Choice:
    """Choose a candidate by the classes that each one predicts for the same unlabeled images.

    See :class:`Rule` for the evidence that a candidate needs, and :data:`RULE` for the constants.

    Args:
        candidates: values of the options; the first leaves the activations unchanged.
        ways: predicted classes of the images with each candidate, int64 ``[n]`` each.
        graph: int64 ``[n, k]``, neighbours of the images; see :func:`neighbour_graph`.
        count: number of classes.
        prior: shares of the classes ``[count]``, if they are known; by default all equal.
    """
    evidence = scores(ways, graph, count, prior)
    rows = [dict(row) for row in candidates]
    return Choice(rows, RULE.pick(rows, evidence), evidence, len(graph))
