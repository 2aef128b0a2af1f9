"""The word ``auto`` in a model string: options that are chosen from a checkpoint's gallery once the classes are known.

A choice reads the gallery's activations at the tower's last site, the plain embeddings and the class embeddings, but no
labels and no image of the data set under evaluation. It is stored in the gallery's folder:

auto/<key>.json     the choice and its evidence; the key is a digest of checkpoint, method, options and class embeddings
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vs2_plugin import __version__
from vs2_plugin.arrays import digest_of, spread
from vs2_plugin.checkpoint.checkpoint import Checkpoint
from vs2_plugin.clip.edits import in_float32
from vs2_plugin.clip.sites import ClipModel, Site
from vs2_plugin.errors import HarnessError, PluginError
from vs2_plugin.files import atomic_file, json_digest
from vs2_plugin.gallery.gallery import CLIP, Gallery
from vs2_plugin.method import Method, Scalar
from vs2_plugin.model.candidates import ZeroShot
from vs2_plugin.model.place import Place
from vs2_plugin.modelstring import ModelString
from vs2_plugin.steering.batch import Batch, Steering, call, steer
from vs2_plugin.steering.move import Move
from vs2_plugin.steering.neighbours import Activations, gallery_batches
from vs2_plugin.steering.retriever import Retriever
from vs2_plugin.strength import NEIGHBOURS, RULE, Choice, choose, neighbour_graph
from vs2_plugin.strength.prior import read_prior

__all__ = ["Automatic", "choose_at", "settle"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Most images of a gallery that a choice reads, evenly spread over the gallery, and images in one batch.
_IMAGES, _BATCH = 10_000, 2048
#: Largest change of an activation, as a share of its norm, that counts as rounding error.
_STILL = 1e-4


class Automatic(nn.Module):
    """A steering whose automatic options are tried with each candidate and then set to the chosen values."""

    def __init__(
        self,
        method: Method,
        build: Callable[[Mapping[str, Scalar | None]], Steering],
        given: Mapping[str, Scalar | None],
    ) -> None:
        """``build`` makes the steering of ``method`` from all its options, some of which are ``auto`` in ``given``."""
        super().__init__()
        self.method = method
        self._build, self._given = build, given
        options = method.automatic(given)
        #: Every combination of the automatic options' values; the first one leaves activations unchanged.
        self.candidates = [
            dict(zip([option.name for option in options], values, strict=True))
            for values in product(*(option.auto or () for option in options))
        ]
        self.choice: Choice | None = None
        self.steering: Steering | None = None

    @property
    def fixed(self) -> dict[str, float]:
        """Options that accept ``auto`` but were given as numbers, with these numbers."""
        values = ((option.name, self._given[option.name]) for option in self.method.options if option.auto)
        return {name: value for name, value in values if isinstance(value, (int, float))}

    def build(self, values: Mapping[str, Scalar]) -> Steering:
        """Return the steering with these values of the automatic options."""
        return self._build({**self._given, **values})

    def use(self, steering: Steering) -> None:
        """Make ``steering`` the one in use."""
        self._modules.pop("steering", None)  # torch refuses to replace a module by a plain function
        self.steering = steering

    def settle(self, choice: Choice) -> None:
        """Steer with the chosen values from now on."""
        self.use(self.build(choice.values))
        self.choice = choice

    @property
    def facts(self) -> dict[str, Scalar]:
        """Facts of the steering in use and of the choice, for the results."""
        return {**getattr(self.steering, "facts", {}), **({} if self.choice is None else self.choice.facts)}

    @property
    def replayable(self) -> bool:
        """Whether a GPU may replay the steering in use."""
        return bool(getattr(self.steering, "replayable", False))

    def reset(self) -> None:
        """Forget the images seen so far."""
        if self.steering is not None and hasattr(self.steering, "reset"):
            self.steering.reset()

    def forward(self, x: Tensor, batch: Batch) -> Tensor | Move:
        """Steer activations ``[batch, d]``. Raises HarnessError while the classes are not known."""
        if self.steering is None:
            raise HarnessError(
                "auto needs the classes of the data set, but none are known; in Python, load the model with "
                "classes=['cat', 'dog'], or call model.set_classifier(classifier) first"
            )
        moved: Tensor | Move = call(self.steering, x, batch)
        return moved


def choose_at(
    place: Place,
    model: ClipModel,
    checkpoint: Checkpoint,
    classifier: Tensor,
    spec: ModelString,
    classes: Sequence[str] | None,
    quiet: bool,
) -> None:
    """Choose among the candidates at a place whose steering is :class:`Automatic`, or read the stored choice; log the
    choice unless ``quiet``.

    Args:
        place: the place.
        model: the open_clip model.
        checkpoint: the checkpoint, with the gallery whose images are classified.
        classifier: class embeddings ``[embed_dim, classes]``, as clip_benchmark makes them.
        spec: the model string.
        classes: names of the classes, if they are known.
        quiet: whether to log nothing and to show no bar.
    """
    automatic, site, retriever = place.steering, place.site, place.retriever
    assert isinstance(automatic, Automatic)
    path = spec.options["prior"]
    prior = None if path is None else read_prior(str(path), classes, classifier.shape[1])
    gallery = checkpoint.open_gallery() if retriever is None else retriever.gallery
    name = str(spec)
    identity = {
        "version": __version__,
        "rule": [*RULE, NEIGHBOURS],
        "checkpoint": checkpoint.digest,
        "method": spec.method.name,
        "options": spec.options | {"prior": None if prior is None else prior.tolist()},
        "candidates": automatic.candidates,
        "site": site.hookpoint,
    }

    def make() -> Choice:
        bar = None if quiet else name
        if spec.options.get("gate") is None:
            act, move = place.steer_all, place.move
            return settle(automatic, act, model, site, gallery, classifier, retriever, prior, bar, move)
        return settle(automatic, place.steer, model, site, gallery, classifier, retriever, prior, bar)

    automatic.settle(_kept(checkpoint.gallery_folder / "auto", identity, classifier, make))
    if place.gate is not None:
        place.gate.reset()  # its figures so far are of the gallery's images
    if not quiet:
        logger.info("%s: %s", name, automatic.choice)


def settle(
    automatic: Automatic,
    steer: Callable[..., Tensor],
    model: ClipModel,
    site: Site,
    gallery: Gallery,
    classifier: Tensor,
    retriever: Retriever | None = None,
    prior: Tensor | None = None,
    name: str | None = None,
    move: Callable[..., Move | None] | None = None,
) -> Choice:
    """Choose among the candidates by the zero-shot classes that the gallery's images get under each of them.

    Args:
        automatic: the candidates.
        steer: steers activations ``[batch, d]`` of a ``batch`` by the candidate in use.
        model: the open_clip model.
        site: the model's last site, or its output.
        gallery: the gallery whose images are classified.
        classifier: class embeddings ``[embed_dim, classes]``, as clip_benchmark makes them.
        retriever: looks up neighbours of the images, for a steering that needs them.
        prior: shares of the classes ``[classes]``, if known.
        name: label of the progress bar; None shows no bar.
        move: returns the move that ``steer`` applies, if it is one.
    """
    rows = spread(len(gallery), _IMAGES)
    if len(rows) < 2:
        raise HarnessError(f"auto is chosen with images of the gallery, but there is {len(rows)}; expected a few "
                           "hundred")
    embeddings = Activations(gallery.embeddings[CLIP], classifier.device)
    graph = neighbour_graph(torch.cat([embeddings[part] for part in rows.split(_BATCH)]))
    # All candidates use the same batches, so that sparse codes and neighbours are computed once.
    batches = [*gallery_batches(gallery, site.hookpoint, retriever, classifier.device, rows)]
    # All candidates steer a batch before the next one: ZeroShot then classifies them by a few matrix products.
    steerings = [automatic.build(values) for values in automatic.candidates]
    automatic.use(steerings[0])
    _check_first(automatic, batches)
    classes: list[Tensor] = []
    with torch.no_grad(), torch.autocast(classifier.device.type, enabled=False):
        zero_shot = ZeroShot(model, site, classifier.float())
        move = move if zero_shot.mixes else None
        for x, batch in tqdm(batches, name, unit="batch", disable=None if name else True, leave=False):
            moves = [] if move is None else _under_each(steerings, automatic, move, x, batch)
            if _are_lines(moves, x):
                classes.append(zero_shot.along(x, moves))
            else:
                move = None
                classes.append(zero_shot(_under_each(steerings, automatic, steer, x, batch)))
    return choose(automatic.candidates, torch.cat(classes).unbind(1), graph, classifier.shape[1], prior)


def _under_each(
    steerings: Sequence[Steering], automatic: Automatic, act: Callable[..., T], x: Tensor, batch: Batch
) -> list[T]:
    """Return what ``act`` returns of activations ``[batch, d]`` with each of the steerings in use."""
    returned = []
    for steering in steerings:
        automatic.use(steering)
        returned.append(act(x, batch=batch))
    return returned


def _are_lines(moves: Sequence[Move | None], x: Tensor) -> TypeGuard[Sequence[Move]]:
    """Return whether all are moves, from activations x along finite directions, that keep the norm."""
    lines = [move for move in moves if move is not None and _keeps_norm(move)]
    if not lines or len(lines) < len(moves):
        return False
    furthest = max(abs(move.strength) for move in lines)
    for direction in (code.direction for code in {move.code for move in lines}):
        same = direction.shape == x.shape and direction.dtype == x.dtype
        if not same or not (furthest * direction.norm()).square().isfinite():
            return False
    return True


def _keeps_norm(move: Move) -> bool:
    is_number = isinstance(move.strength, (int, float)) and math.isfinite(move.strength)
    return is_number and move.base == "x" and move.keep_norm


@torch.no_grad()
def _check_first(automatic: Automatic, batches: Sequence[tuple[Tensor, Batch]]) -> None:
    """Raise PluginError unless the first candidate moves no activation."""
    for x, batch in batches:
        moved = (in_float32(partial(steer, automatic, batch=batch), x) - x).norm(dim=-1)
        if not (moved <= _STILL * x.norm(dim=-1)).all():
            values = ", ".join(f"{name}={value:g}" for name, value in automatic.candidates[0].items())
            fixed = "".join(f" and {name}={value:g} as given" for name, value in automatic.fixed.items())
            raise PluginError(
                f"method {automatic.method.name!r} moves activations by up to {float(moved.max()):.3g} with {values}"
                f"{fixed}; expected that its automatic options, all at their first value, leave activations as they "
                "are, since auto compares the others with that"
            )


def _kept(folder: Path, identity: Mapping[str, Any], classifier: Tensor, make: Callable[[], Choice]) -> Choice:
    """Return the choice stored for the same ``identity`` and classifier; else make one and store it if possible.

    Args:
        folder: the folder of stored choices.
        identity: JSON values that the choice depends on.
        classifier: the class embeddings, which depend on class names and prompts.
        make: makes a new choice.
    """
    key = json_digest({**identity, "classifier": digest_of({"": classifier})})
    path = folder / f"{key[:32]}.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["sha256"] != json_digest(record["choice"]):
            raise ValueError("it is not what was written")
        return Choice.from_json(record["choice"])
    except (OSError, ValueError, TypeError, AttributeError, LookupError):  # no file yet, or a damaged one: choose anew
        choice = make()
    with suppress(OSError):  # where the folder cannot be written, the choice serves this run only
        folder.mkdir(exist_ok=True)
        with atomic_file(path) as scratch:
            written = choice.to_json()
            scratch.write_text(json.dumps({"choice": written, "sha256": json_digest(written)}))
    return choice
