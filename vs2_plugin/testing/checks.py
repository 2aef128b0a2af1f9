"""The checks, one by one: each is a function of a subject that returns what is wrong, in words, or None."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

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

#: How far numbers may be apart that are computed in another order, of the largest of them.
_CLOSE = 1e-4


class Finding(NamedTuple):
    """What one check found."""

    check: str
    about: str
    """What is checked, in words."""
    problem: str | None = None
    """What is wrong; None where nothing is."""
    skipped: str = ""
    """Why it was not checked, if it was not."""


class _Skip(Exception):
    """Raised by a check that does not apply, with the reason."""


def findings(method: str) -> list[Finding]:
    """Check a method, by its name and options (``mine@strength=2``), and return what each check found.

    Where it cannot be built, or fails on images, the checks that take that for granted are left out.

    Raises:
        ModelStringError, PluginError: there is no such method, or no such option.
    """
    subject, found = Subject(method), []
    broken: set[str] = set()
    for check, needs in CHECKS.items():
        missing = [other for other in needs if other in broken]
        finding = found_by(check, subject, f"since {missing[0]} fails" if missing else "")
        if finding.problem:
            broken.add(finding.check)
        found.append(finding)
    return found


def found_by(check: Callable[[Subject], str | None], subject: Subject, skipped: str = "") -> Finding:
    """Make one check, unless it is ``skipped`` for that reason."""
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


# ---- what it builds, by itself


def builds(subject: Subject) -> None:
    """it is built, and says of itself what can stand in results"""
    subject.load()


def runs(subject: Subject) -> None:
    """it is called on activations or embeddings without an exception"""
    with subject.act() as act:
        result = act.call(act.x.clone())
    if not isinstance(result, (Tensor, Move)) or (subject.on_logits and isinstance(result, Move)):
        expected = "logits" if subject.on_logits else "activations, or a Move"
        raise PluginError(f"it returned {type(result).__name__}; expected {expected}")


def shape(subject: Subject) -> str | None:
    """what it returns has the right shape, for a batch and for one image"""
    with subject.act() as act:
        for size in (len(act.x), 1):
            expected = (size, *act.returned[1:])
            found = tuple(_result(act, act.x[:size]).shape) if size == len(act.x) or _alone(subject) else expected
            if found != expected:
                return f"it returned {list(found)} for {list(act.x[:size].shape)}; expected {list(expected)}"
    return None


def _alone(subject: Subject) -> bool:
    """Tell whether fewer images may be given: not where neighbours and labels are of a batch, or all images are one."""
    return subject.protocol != "transductive" and subject.method.gallery == "none"


def dtype(subject: Subject) -> str | None:
    """what it returns is float32, as what it is given"""
    with subject.act() as act:
        found = _result(act, act.x).dtype
    return None if found is torch.float32 else f"it returned {found}; expected torch.float32"


def device(subject: Subject) -> str | None:
    """what it returns is on the device of what it is given (a GPU, where there is one)"""
    with subject.act() as act:
        found = _result(act, act.x).device
        return None if found == act.x.device else f"it returned a tensor on {found}; expected one on {act.x.device}"


def finite(subject: Subject) -> str | None:
    """what it returns is finite, also for images that are the mean of all, or nothing"""
    with subject.act() as act:
        rows = act.x.clone()
        if len(rows) > 2:
            rows[0], rows[1] = rows.mean(0), torch.zeros_like(rows[1])
        for x, what in ((act.x, "digits"), (rows, "digits of which one is their mean, and one all zeros")):
            if not _result(act, x).isfinite().all():
                return f"it returned NaN or infinity for {what}; expected finite numbers (a division by 0?)"
    return None


def in_place(subject: Subject) -> None:
    """it edits nothing in place that is not its own"""
    with subject.act() as act:
        for _ in range(2):  # what it asks for itself is there when it is called again
            with unchanged(lambda: {"what it was given": act.x, **act.held()}):
                _result(act, act.x)


def _result(act: Act, x: Tensor) -> Tensor:
    result = act.call(x)
    return result.apply(x) if isinstance(result, Move) else torch.as_tensor(result)


# ---- what comes of images


def images(subject: Subject) -> None:
    """a model with it encodes images"""
    with torch.no_grad():
        subject.outcome(subject.model)


def deterministic(subject: Subject) -> str | None:
    """the same images give the same bits, again and by a model that is loaded anew"""
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
        values = ", ".join(f"{one.name}={one.auto[0]:g}" for one in subject.method.options if one.auto)
        return f"with {values} it moves images, {_apart(plain, left)}; expected that it leaves them as they are"
    if subject.method.automatic(subject.asked.options):
        subject.outcome(subject.load(subject.asked))
    return None


def copies(subject: Subject) -> str | None:
    """a deep copy of a model gives the same bits"""
    return _same(subject, copy.deepcopy, "a deep copy")


def pickles(subject: Subject) -> str | None:
    """a model that was pickled and read again gives the same bits"""
    with subject.act() as act:
        within = not subject.on_logits and "<locals>" in getattr(act.built, "__qualname__", "")
    if within:
        raise _Skip("since it is a function within another; an nn.Module or an object can be pickled")
    return _same(subject, lambda model: pickle.loads(pickle.dumps(model)), "a model from a pickle")


def gradients(subject: Subject) -> str | None:
    """it gives the same with gradients and without, also after inference_mode, and gradients are finite"""
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
    if not _close(without, along.detach()):  # attention goes another way where gradients are asked for
        return f"with gradients it gives other numbers, {_apart(without, along.detach())}; expected the same"
    if pixels.grad is not None and not pixels.grad.isfinite().all():
        return "the gradient of what it returns is NaN or infinite; expected a finite one"
    return None


def autocast(subject: Subject) -> str | None:
    """it works in a tower under bfloat16 autocast"""
    with torch.no_grad(), torch.autocast(subject.device, dtype=torch.bfloat16):
        found = subject.outcome(subject.model)
    return None if found.isfinite().all() else "it gave NaN or infinity under autocast; expected finite numbers"


def replays(subject: Subject) -> str | None:
    """on a GPU, if it says that it is replayable, a CUDA graph of it gives the same bits"""
    model = subject.load()
    if not any(getattr(place.steering, "replayable", False) for place in model.places):
        raise _Skip("since it does not say that it is replayable")
    with torch.no_grad():
        if not can_replay(subject.images()[0]):
            raise _Skip("since there is no GPU")
        for _ in range(4):  # by then it is one
            subject.outcome(model)
        other = subject.load()
        other.replaying = False
        for images in (subject.images(), subject.images(others=True)):
            anew, found = subject.outcome(other, images), subject.outcome(model, images)
            if not torch.equal(anew, found):
                return f"replayed it gives other numbers, {_apart(anew, found)}; expected replayable = False"
    return None


def facts(subject: Subject) -> str | None:
    """what it says of itself can stand in results, after images too"""
    with subject.act() as act:
        _result(act, act.x)
        problems = facts_of(act.built)[1]
    return f"it has {problems[0]}" if problems else None


def _same(subject: Subject, made: Callable[[nn.Module], Any], what: str) -> str | None:
    model = subject.model
    with torch.no_grad():
        expected = subject.outcome(model)
        found = subject.outcome(made(model))
    return None if torch.equal(expected, found) else f"{what} gives other numbers, {_apart(expected, found)}"


def _close(expected: Tensor, found: Tensor) -> bool:
    return bool((expected - found).abs().max() <= _CLOSE * expected.abs().max())


def _apart(expected: Tensor, found: Tensor) -> str:
    return f"by up to {float((expected - found.to(expected)).abs().max()):.3g}"


#: Each check in the order in which they are made, and those that it takes for granted.
CHECKS: dict[Callable[[Subject], str | None], tuple[str, ...]] = {
    builds: (),
    runs: ("builds",),
    **dict.fromkeys((shape, dtype, device), ("builds", "runs")),
    **dict.fromkeys((finite, in_place, facts), ("builds", "runs", "shape", "dtype", "device")),
    images: ("builds", "runs", "shape", "dtype", "device", "in place"),
    **dict.fromkeys((deterministic, independent, automatic, copies, pickles, gradients, autocast, replays), (
        "builds", "runs", "shape", "dtype", "device", "in place", "images",
    )),
}  # fmt: skip
