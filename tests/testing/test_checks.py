"""What an author checks a method with: the built-in methods pass, and each check can fail."""

import threading
from itertools import count

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vs2_plugin.cli.main import main
from vs2_plugin.errors import ModelStringError
from vs2_plugin.method import Method, Option
from vs2_plugin.model.replay import can_replay
from vs2_plugin.plugins import find_plugins, registry
from vs2_plugin.steering.move import Move
from vs2_plugin.testing import check, findings
from vs2_plugin.testing.checks import CHECKS, automatic, found_by, replays
from vs2_plugin.testing.subject import Subject

#: What a method is asked with, where its name is not enough.
WITH = {"latents": "latents@suppress=3+5@boost=7", "zero": "zero@views=4", "inmap": "inmap@steps=20"}
BY_NAME = {one.__name__.replace("_", " "): one for one in CHECKS}
BUILT_IN = [name for name, owner in find_plugins().owners.items() if owner.startswith("vs2-plugin (built in")]


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name != "centre"])  # which the command is tried with
def test_built_in_methods_pass(name):
    check(WITH.get(name, name))


def test_a_method_may_read_the_images_at_hand(monkeypatch):
    def build(context):
        return lambda x, batch: x + batch.images.mean((1, 2, 3))[:, None]

    monkeypatch.setitem(registry().methods, "sees", Method("sees", build))
    check("sees")


class Of:
    """A steering that is an object; it can be copied and pickled."""

    def __init__(self, steer, **told):
        self.steer, self.told, self.calls = steer, told, 0

    @property
    def facts(self):
        return {name: value if self.calls else 0 for name, value in self.told.items()}

    def __call__(self, x, batch):
        self.calls += 1
        return self.steer(self, x, batch)


def raises(*ignored):
    raise ZeroDivisionError("no luck")


def add_in_place(of, x, batch):
    return x.mul_(2)


def edit_images(of, x, batch):
    batch.images.add_(1)
    return x + 1


def edit_embedding(of, x, batch):
    batch.embedding().sub_(0.1)
    return x + 1


def edits_weights(edit):
    """Return a builder of a steering that edits a weight, which all subjects share."""

    def build(context):
        def steer(x, batch):
            weight = context.model.visual.proj.detach()
            edit(weight)
            return x + 1

        return steer

    return build


def refuses_rounded(of, x, batch):
    return raises() if torch.equal(x, x.bfloat16().float()) else x + 1


def other_each_time(context, number=count()):  # noqa: B008
    by = next(number)
    return Of(lambda of, x, batch: x + by)


def with_attribute(value):
    of = Of(lambda of, x, batch: x + 1)
    of.value = value
    return of


STEERINGS = {
    "builds": [(raises, "ZeroDivisionError: no luck"), (lambda context: 3, "built 3")],
    "runs": [(Of(raises), "no luck"), (Of(lambda of, x, batch: "x"), "it returned str; expected activations")],
    "shape": [(Of(lambda of, x, batch: x[:, :5]), "it returned [8, 5] for [8, 128]; expected [8, 128]"),
              (Of(lambda of, x, batch: x[:1].expand(8, -1)), "it returned [8, 128] for [1, 128]")],
    "dtype": [(Of(lambda of, x, batch: x.double()), "it returned torch.float64; expected torch.float32")],
    "device": [(Of(lambda of, x, batch: x.to("meta")), "it returned a tensor on meta; expected one on")],
    "finite": [(Of(lambda of, x, batch: x / x.norm(dim=1, keepdim=True)), "NaN or infinity for digits of which")],
    "in place": [(Of(add_in_place), "edited what it was given in place"), (Of(edit_images), "edited batch.images"),
                 (Of(edit_embedding), "edited batch.embedding() in place"),
                 (edits_weights(lambda weight: weight.mul_(1)), "edited context.model.visual.proj in place"),
                 (edits_weights(lambda weight: weight.data.mul_(1.1)), "it edited context.model.visual.proj; exp"),
                 (edits_weights(lambda weight: np.negative(weight.numpy(), out=weight.numpy())), "visual.proj; exp")],
    "facts": [(Of(lambda of, x, batch: x + 1, share=float("nan")), "it has the fact 'share' = nan")],
    "images": [(Of(raises), "ZeroDivisionError: no luck")],
    "deterministic": [(Of(lambda of, x, batch: x + torch.rand_like(x)), "other numbers a second time, by up to"),
                      (other_each_time, "by a model that was loaded anew")],
    "independent": [(Of(lambda of, x, batch: x - x.mean(0)), "other numbers beside other images, by up to")],
    "copies": [(with_attribute(threading.Lock()), "cannot pickle '_thread.lock' object")],
    "pickles": [(Of(lambda of, x, batch: x + 1), "pickle")],
    "gradients": [(Of(lambda of, x, batch: torch.from_numpy(x.numpy() + 1)), "Can't call numpy() on Tensor"),
                  (Of(lambda of, x, batch: x + (x - x.detach()).norm(dim=1, keepdim=True).sqrt()), "gradient of what")],
    "autocast": [(Of(refuses_rounded), "ZeroDivisionError: no luck")],
}  # fmt: skip
BAD = [(name, *row) for name, rows in STEERINGS.items() for row in rows]


@pytest.fixture
def declare(monkeypatch):
    """A function that makes a method known, as a plugin would."""

    def add(built, **declared):
        build = built if not isinstance(built, Of) else lambda context, **options: built
        method = Method("bad", build, **{"needs_checkpoint": False, **declared})
        monkeypatch.setitem(registry().methods, "bad", method)
        monkeypatch.setitem(registry().owners, "bad", "a test")
        return "bad"

    return add


def problems(method):
    return {finding.check: finding.problem for finding in findings(method) if finding.problem}


@pytest.mark.parametrize(("name", "built", "fragment"), BAD, ids=[f"{row[0]}: {row[2]}" for row in BAD])
def test_each_check_can_fail(name, built, fragment, declare):
    subject = Subject(declare(built))
    weight = Subject("centre").model.model.visual.proj
    before = weight.detach().clone()
    finding = found_by(BY_NAME[name], subject)
    with torch.no_grad():
        weight.copy_(before)
    assert fragment in finding.problem and "\n" not in finding.problem
    assert finding.check == name and finding.about


def test_neighbours_are_not_to_be_edited(declare):
    def build(context):
        def steer(x, batch):
            context.retriever.neighbours(batch).rows.zero_()
            return x + 1

        return steer

    finding = found_by(BY_NAME["in place"], Subject(declare(build, gallery="neighbours", needs_checkpoint=True)))
    assert "edited neighbours.rows in place" in finding.problem


def test_automatic_options_have_to_begin_with_nothing(declare):
    strength = Option("strength", float, 1.0, auto=(0.5, 1.0))
    build = lambda context, strength: lambda x: x * (1 + strength * x.sign())  # noqa: E731
    subject = Subject(declare(build, options=[strength], needs_checkpoint=True))
    assert "with strength=0.5 it moves images, by up to" in found_by(automatic, subject).problem


def test_every_check_is_tried():
    assert {*STEERINGS, "automatic", "replays"} == BY_NAME.keys()


class Adding:
    """Adds a number of the batch, or, where it reads it, that of another batch when it is replayed."""

    def __init__(self, reads):
        self.reads = reads

    def __call__(self, x):
        return x + float(x[-1, 0]) if self.reads else x + x[-1, 0]


@pytest.mark.parametrize("broken", [False, True])
def test_what_cannot_be_replayed_is_told(broken, declare, monkeypatch):
    from ..tape import replay_all

    replay_all(monkeypatch)
    steering = Adding(broken)
    finding = found_by(replays, Subject(declare(lambda context: steering)))
    assert finding.skipped == "since it does not say that it is replayable"
    steering.replayable = True
    finding = found_by(replays, Subject(declare(lambda context: steering)))
    assert "replayed it gives other numbers" in finding.problem if broken else finding[2:] == (None, "")


def vote(context):
    return lambda x: (100 * x @ context.classifier).log_softmax(-1).logsumexp(1)


def drifting(context):
    seen = []

    def read(x):
        seen.append(x.mean(0, keepdim=True))
        return 100 * F.normalize(x - 0.2 * torch.cat(seen).mean(0), dim=1) @ context.classifier

    return read


LOGITS = [
    ("shape", lambda context: lambda x: x, "image", "expected [8, 10]"),
    ("shape", lambda context: lambda x: (x @ context.classifier)[0], "stream", "expected [1, 10]"),
    ("in place", lambda context: lambda x: x @ context.classifier.mul_(1), "image", "edited context.classifier"),
    ("in place", lambda context: lambda x: x @ context.unlabeled.mul_(1)[:10].T, "unlabeled", "edited context.unl"),
    ("runs", lambda context: lambda x: x @ context.unlabeled.T, "image", "'NoneType' object has no attribute 'T'"),
    ("runs", lambda context: lambda x: Move(None, 1.0), "image", "it returned Move; expected logits"),
    ("independent", drifting, "image", "or for a method on logits the protocol stream or transductive"),
    ("finite", lambda context: lambda x: (x @ context.classifier).log(), "image", "NaN or infinity"),
]


@pytest.mark.parametrize(("name", "build", "protocol", "fragment"), LOGITS)
def test_each_check_can_fail_of_methods_on_logits(name, build, protocol, fragment, declare):
    assert fragment in found_by(BY_NAME[name], Subject(declare(build, site="logits", protocol=protocol))).problem


@pytest.mark.parametrize("protocol", ["stream", "transductive"])
def test_who_sees_other_images_may_depend_on_them(protocol, declare):
    subject = Subject(declare(drifting, site="logits", protocol=protocol))
    assert found_by(BY_NAME["independent"], subject).skipped == f"since its protocol is {protocol}"
    assert not any(found_by(BY_NAME[name], subject).problem for name in ("runs", "shape", "images", "deterministic"))


def test_views_are_shown(declare):
    assert problems(f"{declare(vote, site='logits', views=True)}@views=4") == {}


def test_a_function_within_another_need_not_be_pickled(declare):
    subject = Subject(declare(lambda context: lambda x: x + 1))
    assert "an nn.Module or an object can be pickled" in found_by(BY_NAME["pickles"], subject).skipped
    assert not found_by(BY_NAME["copies"], subject).problem


def test_all_that_is_wrong_is_told_at_once(declare, capsys):
    name = declare(Of(lambda of, x, batch: torch.rand_like(x).double()))
    with pytest.raises(AssertionError) as error:
        check(name)
    lines = str(error.value).splitlines()
    assert lines[0] == "method 'bad' fails 1 of its checks:" and lines[1].startswith("  dtype: it returned torch")
    assert main(["methods", "--check", name]) == 1
    text = capsys.readouterr().out
    assert "  ok  builds: it is built" in text and "  !!  dtype: it returned torch.float64; expected" in text
    assert "  --  images: not checked, since dtype fails" in text and text.endswith("bad: 1 of 17 checks failed\n")


def test_the_command_prints_a_line_for_each_check(capsys, monkeypatch):
    monkeypatch.setattr("vs2_plugin.testing.checks.can_replay", can_replay)  # with --replayed, another
    assert main(["methods", "--check", "centre@alpha=2"]) == 0
    text = capsys.readouterr().out
    assert "  --  replays: not checked, since there is no GPU" in text
    assert text.count("\n  ok  ") == len(CHECKS) - 2 and text.endswith("centre@alpha=2: no check failed\n")


@pytest.mark.parametrize("name", ["nope", "centre@nope=1", "latents"])
def test_what_cannot_be_asked_for_is_told(name, capsys):
    if name == "latents":  # it is known, and cannot be built so
        assert "no latents are chosen" in problems(name)["builds"]
        return
    with pytest.raises(ModelStringError, match="unknown"):
        check(name)
    assert main(["methods", "--check", name]) == 2
