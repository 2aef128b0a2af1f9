"""The checks: each is a function of a subject that returns words on what is wrong, or None.

The docstring of a check is printed beside its name; "it" stands for the method.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn

from vs2_plugin.errors import PluginError, Vs2Error
from vs2_plugin.model.facts import facts_of
from vs2_plugin.model.replay import can_replay
from vs2_plugin.steering.batch import unchanged
from vs2_plugin.steering.move import Move
from vs2_plugin.testing.subject import Act, Subject
from vs2_plugin.text import reason_of, sentence_of

__all__ = ["CHECKS", "Finding", "findings", "found_by"]

#: Largest difference, as a share of the largest number, between numbers that are computed in another order.
_CLOSE = 1e-4


Check: TypeAlias = Callable[[Subject], "str | None"]


class Finding(NamedTuple):
    """The result of one check."""

    check: str
    about: str
    """The requirement that is checked, in words."""
    problem: str | None = None
    """The fault; None if the check passed or was skipped."""
    skipped: str = ""
    """Reason for skipping the check; empty if it was made."""


class _Skip(Exception):
    """Raised by a check that does not apply, with the reason."""


def findings(method: str) -> list[Finding]:
    """Check a method, given by name and options (``mine@strength=2``), and return the finding of each check.

    A check is skipped if a check that it presupposes has failed.

    Raises:
        ModelStringError, PluginError: there is no such method, or no such option.
    """
    subject, results = Subject(method), []
    causes: dict[Check, str] = {}  # check that failed, or was skipped for it -> name of the one that failed
    for check, needs in CHECKS.items():
        cause = next((causes[other] for other in needs if other in causes), "")
        finding = found_by(check, subject, f"since {cause} fails" if cause else "")
        if cause or finding.problem:
            causes[check] = cause or finding.check
        results.append(finding)
    return results


def found_by(check: Check, subject: Subject, skipped: str = "") -> Finding:
    """Return the finding of one check, which is not made if ``skipped`` gives a reason."""
    name, about = check.__name__.replace("_", " "), (check.__doc__ or "").strip()
    if skipped:
        return Finding(name, about, None, skipped)
    try:
        return Finding(name, about, check(subject))
    except _Skip as reason:
        return Finding(name, about, None, str(reason))
    except Vs2Error as error:
        return Finding(name, about, sentence_of(error))
    except Exception as error:  # whatever a method raises
        return Finding(name, about, reason_of(error))


# ---- what the method builds, outside a model


def builds(subject: Subject) -> None:
    """it is built, and its facts can be written into results"""
    subject.load()


def runs(subject: Subject) -> None:
    """it is called on activations or embeddings without an exception"""
    with subject.act() as act:
        result = act.call(act.x.clone())
    if not isinstance(result, (Tensor, Move)) or (subject.on_logits and isinstance(result, Move)):
        expected = "logits" if subject.on_logits else "activations, or a Move"
        raise PluginError(f"it returned {type(result).__name__}; expected {expected}")


def shape(subject: Subject) -> str | None:
    """its output has the right shape, for a batch and for one image"""
    with subject.act() as act:
        for size in (len(act.x), 1):
            expected = (size, *act.returned[1:])
            actual = tuple(_result(act, act.x[:size]).shape) if size == len(act.x) or _alone(subject) else expected
            if actual != expected:
                return f"it returned {list(actual)} for {list(act.x[:size].shape)}; expected {list(expected)}"
    return None


def _alone(subject: Subject) -> bool:
    """Tell whether a method may be called on a part of a batch: not if it reads all images, or neighbours, at once."""
    return subject.protocol != "transductive" and subject.method.gallery == "none"


def dtype(subject: Subject) -> str | None:
    """its output is float32, like its input"""
    with subject.act() as act:
        actual = _result(act, act.x).dtype
    return None if actual is torch.float32 else f"it returned {actual}; expected torch.float32"


def device(subject: Subject) -> str | None:
    """its output is on the device of its input (a GPU, if there is one)"""
    with subject.act() as act:
        actual = _result(act, act.x).device
        return None if actual == act.x.device else f"it returned a tensor on {actual}; expected one on {act.x.device}"


def finite(subject: Subject) -> str | None:
    """its output is finite, also for an input that is the mean of all, or zeros"""
    with subject.act() as act:
        rows = act.x.clone()
        if len(rows) > 2:
            rows[0], rows[1] = rows.mean(0), torch.zeros_like(rows[1])
        for x, what in ((act.x, "digits"), (rows, "digits of which one is their mean, and one all zeros")):
            if not _result(act, x).isfinite().all():
                return f"it returned NaN or infinity for {what}; expected finite numbers (a division by 0?)"
    return None


def in_place(subject: Subject) -> None:
    """it edits in place only tensors of its own"""
    with subject.act() as act:
        for _ in range(2):  # the first call computes shared values, such as codes, which the second call could edit
            given = {"what it was given": act.x, **act.held()}
            before = {name: tensor.clone() for name, tensor in given.items() if tensor is not None}
            with unchanged(lambda: {"what it was given": act.x, **act.held()}):
                _result(act, act.x)
            for name, tensor in before.items():  # torch does not count all edits
                if not torch.equal(tensor, cast(Tensor, given[name])):
                    raise PluginError(f"it edited {name}; expected new tensors, or a copy that it edits")


def _result(act: Act, x: Tensor) -> Tensor:
    result = act.call(x)
    return result.apply(x) if isinstance(result, Move) else torch.as_tensor(result)


# ---- the method in a model, on images


def images(subject: Subject) -> None:
    """a model with it encodes images"""
    with torch.no_grad():
        subject.outcome(subject.model)


def deterministic(subject: Subject) -> str | None:
    """the same images give the same bits, again and in a newly loaded model"""
    model = subject.model
    with torch.no_grad():
        first, again, anew = subject.outcome(model), subject.outcome(model), subject.outcome(subject.load())
    for other, when in ((again, "a second time"), (anew, "by a model that was loaded anew")):
        if not torch.equal(first, other):
            return f"the same images gave other numbers {when}, {_apart(first, other)}; expected the same bits"
    return None


def independent(subject: Subject) -> str | None:
    """an image's result does not depend on the others in its batch"""
    if subject.protocol in ("stream", "transductive"):
        raise _Skip(f"since its protocol is {subject.protocol}")
    model, half = subject.model, 4
    with torch.no_grad():
        first, other = subject.outcome(model)[:half], subject.outcome(model, subject.images(others=True))[:half]
    if _close(first, other):
        return None
    return (
        f"images gave other numbers beside other images, {_apart(first, other)}; expected the same, or for a method "
        "on logits the protocol stream or transductive"
    )


def automatic(subject: Subject) -> str | None:
    """with all automatic options at their first value it leaves images as they are, and auto can be chosen"""
    if subject.identity is None:
        raise _Skip("since none of its options can be auto")
    model = subject.load(subject.identity)
    with torch.no_grad():
        left = subject.outcome(model)
        with model.unsteered():
            plain = model.model.encode_image(subject.images()[0])
    if not _close(plain, left):
        values = ", ".join(f"{option.name}={option.auto[0]:g}" for option in subject.method.options if option.auto)
        return f"with {values} it moves images, {_apart(plain, left)}; expected that it leaves them as they are"
    if subject.method.automatic(subject.asked.options):
        subject.outcome(subject.load(subject.asked))
    return None


def copies(subject: Subject) -> str | None:
    """a deep copy of a model gives the same bits"""
    return _same(subject, copy.deepcopy, "a deep copy")


def pickles(subject: Subject) -> str | None:
    """a model that was pickled and unpickled gives the same bits"""
    with subject.act() as act:
        within = not subject.on_logits and "<locals>" in getattr(act.built, "__qualname__", "")
    if within:
        raise _Skip("since it is a function within another; an nn.Module or an object can be pickled")
    return _same(subject, lambda model: pickle.loads(pickle.dumps(model)), "a model from a pickle")


def gradients(subject: Subject) -> str | None:
    """its output is the same with gradients and without, also after inference_mode, and gradients are finite"""
    if subject.on_logits:
        raise _Skip("since what reads embeddings is never asked for gradients")
    model, (pixels, targets) = subject.load(), subject.images()
    with torch.inference_mode():
        without = subject.outcome(model).clone()
    with torch.enable_grad():
        pixels = pixels.clone().requires_grad_()
        along = subject.outcome(model, (pixels, targets))
        if along.requires_grad:
            along.sum().backward()
    if not _close(without, along.detach()):  # not the same bits: with gradients, attention is computed in another way
        return f"with gradients it gives other numbers, {_apart(without, along.detach())}; expected the same"
    if pixels.grad is not None and not pixels.grad.isfinite().all():
        return "the gradient of what it returns is NaN or infinite; expected a finite one"
    return None


def autocast(subject: Subject) -> str | None:
    """it works in a tower under bfloat16 autocast"""
    with torch.no_grad(), torch.autocast(subject.device, dtype=torch.bfloat16):
        outcome = subject.outcome(subject.model)
    return None if outcome.isfinite().all() else "it gave NaN or infinity under autocast; expected finite numbers"


def replays(subject: Subject) -> str | None:
    """on a GPU, if it says that it is replayable, a CUDA graph of it gives the same bits"""
    model = subject.load()
    if not any(getattr(place.steering, "replayable", False) for place in model.places):
        raise _Skip("since it does not say that it is replayable")
    with torch.no_grad():
        if not can_replay(subject.images()[0]):
            raise _Skip("since there is no GPU")
        for _ in range(4):  # the model is replayed from the third batch on
            subject.outcome(model)
        other = subject.load()
        other.replaying = False
        for images in (subject.images(), subject.images(others=True)):
            expected, replayed = subject.outcome(other, images), subject.outcome(model, images)
            if not torch.equal(expected, replayed):
                return f"replayed it gives other numbers, {_apart(expected, replayed)}; expected replayable = False"
    return None


def facts(subject: Subject) -> str | None:
    """its facts can be written into results after images, too"""
    with subject.act() as act:
        _result(act, act.x)
        problems = facts_of(act.built)[1]
    return f"it has {problems[0]}" if problems else None


def _same(subject: Subject, made: Callable[[nn.Module], Any], what: str) -> str | None:
    model = subject.model
    with torch.no_grad():
        expected = subject.outcome(model)
        actual = subject.outcome(made(model))
    return None if torch.equal(expected, actual) else f"{what} gives other numbers, {_apart(expected, actual)}"


def _close(expected: Tensor, found: Tensor) -> bool:
    return bool((expected - found).abs().max() <= _CLOSE * expected.abs().max())


def _apart(expected: Tensor, found: Tensor) -> str:
    return f"by up to {float((expected - found.to(expected)).abs().max()):.3g}"


#: The checks, in order -> the checks that each one presupposes, besides those that these presuppose.
CHECKS: dict[Check, tuple[Check, ...]] = {
    builds: (),
    runs: (builds,),
    **dict.fromkeys((shape, dtype, device), (runs,)),
    **dict.fromkeys((finite, in_place, facts), (shape, dtype, device)),
    images: (in_place,),
    **dict.fromkeys((deterministic, independent, automatic, copies, pickles, gradients, autocast, replays), (images,)),
}
