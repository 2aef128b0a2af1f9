"""The word ``auto`` in a model string: options chosen from a checkpoint's gallery once the classes are known.

Needed are the gallery's activations at the tower's last site, the plain embeddings and the class embeddings; no labels,
and no image of the data set under evaluation. A choice is kept in the gallery's folder:

auto/<key>.json     the evidence; the key is a digest of checkpoint, method, options and class embeddings
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vs2_plugin import __version__
from vs2_plugin.arrays import digest_of, spread
from vs2_plugin.checkpoint.checkpoint import Checkpoint
from vs2_plugin.clip.edits import in_float32
from vs2_plugin.clip.sites import ClipModel, Site
from vs2_plugin.errors import HarnessError, ModelStringError, PluginError
from vs2_plugin.files import atomic_file, json_digest
from vs2_plugin.gallery.gallery import CLIP, Gallery
from vs2_plugin.method import Method, Scalar
from vs2_plugin.model.candidates import ZeroShot
from vs2_plugin.modelstring import ModelString
from vs2_plugin.steering.batch import Batch, Steering, call, steer
from vs2_plugin.steering.move import Move
from vs2_plugin.steering.neighbours import Activations, gallery_batches
from vs2_plugin.steering.retriever import Retriever
from vs2_plugin.strength import NEIGHBOURS, RULE, Choice, neighbour_graph
from vs2_plugin.strength import choose as choose_by_evidence

__all__ = ["Automatic", "choose", "read_prior", "settle"]

logger = logging.getLogger(__name__)

#: Images that are looked at, evenly spread over a larger gallery, and how many at a time.
_IMAGES, _BATCH = 10_000, 2048
#: Of its norm, how far an activation may be moved by rounding alone.
_STILL = 1e-4


class Automatic(nn.Module):
    """A steering that is built with values of its automatic options: with each candidate, and then to stay."""

    def __init__(
        self,
        method: Method,
        build: Callable[[Mapping[str, Scalar | None]], Steering],
        given: Mapping[str, Scalar | None],
    ) -> None:
        """``build`` makes the steering of ``method`` of all its options, of which some are automatic in ``given``."""
        super().__init__()
        self.method = method
        self._build, self._given = build, given
        options = method.automatic(given)
        #: Every combination of values; the first leaves activations as they are.
        self.candidates = [
            dict(zip([option.name for option in options], values, strict=True))
            for values in product(*(option.auto or () for option in options))
        ]
        self.choice: Choice | None = None
        self.steering: Steering | None = None

    @property
    def fixed(self) -> dict[str, float]:
        """The numbers given for options that accept auto."""
        given = ((option.name, self._given[option.name]) for option in self.method.options if option.auto)
        return {name: value for name, value in given if isinstance(value, (int, float))}

    def build(self, values: Mapping[str, Scalar]) -> Steering:
        """The steering with these values."""
        return self._build({**self._given, **values})

    def use(self, steering: Steering) -> None:
        """Steer so."""
        self._modules.pop("steering", None)  # torch would refuse a function where a module was
        self.steering = steering

    def settle(self, choice: Choice, classifier: Tensor | None = None) -> None:
        """Steer with the values that were chosen (for these classes) from now on."""
        self.use(self.build(choice.values))
        self.choice, self._classes = choice, None if classifier is None else digest_of({"": classifier})

    def is_settled(self, classifier: Tensor) -> bool:
        """Tell whether the choice was made for these classes."""
        return self.choice is not None and self._classes == digest_of({"": classifier})

    @property
    def facts(self) -> dict[str, Scalar]:
        """Those of the steering, and of the choice."""
        return {**getattr(self.steering, "facts", {}), **({} if self.choice is None else self.choice.facts)}

    @property
    def replayable(self) -> bool:
        """Whether the steering is."""
        return bool(getattr(self.steering, "replayable", False))

    def reset(self) -> None:
        """Forget the images seen so far."""
        if self.steering is not None and hasattr(self.steering, "reset"):
            self.steering.reset()

    def forward(self, x: Tensor, batch: Batch) -> Tensor | Move:
        """Steer ``[batch, d]``. Raises HarnessError while the classes are not known."""
        if self.steering is None:
            raise HarnessError(
                "auto needs the classes of the data set, but none are known; in Python, load the model with "
                "classes=['cat', 'dog'], or call model.set_classifier(classifier) first"
            )
        moved: Tensor | Move = call(self.steering, x, batch)
        return moved


def choose(
    automatic: Automatic,
    steer: Callable[..., Tensor],
    model: ClipModel,
    site: Site,
    checkpoint: Checkpoint,
    retriever: Retriever | None,
    classifier: Tensor,
    spec: ModelString,
    classes: Sequence[str] | None,
    quiet: bool,
) -> None:
    """Choose among the candidates of ``automatic``, or take the choice that was kept, and log it unless ``quiet``.

    Args:
        steer: ``automatic`` with what is around it (a gate).
        classes: names of the classes, as far as they are known.

    The others are as for :func:`settle`.
    """
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
        return settle(
            automatic, steer, model, site, gallery, classifier, retriever, prior, None if quiet else name
        )

    automatic.settle(_kept(checkpoint.gallery_folder / "auto", identity, classifier, make), classifier)
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
) -> Choice:
    """Choose among the candidates by the zero-shot classes that they give to images of the gallery.

    Args:
        automatic: the candidates.
        steer: steers activations ``[batch, d]`` of a ``batch`` by the candidate in use.
        model: the open_clip model.
        site: its last site, or the output.
        gallery: the images.
        classifier: ``[embed_dim, classes]``, as clip_benchmark makes it.
        retriever: what the steering asks about the images at hand.
        prior: shares of the classes, if known.
        name: of the progress bar; None: there is none.
    """
    rows = spread(len(gallery), _IMAGES)
    if len(rows) < 2:
        raise HarnessError(f"auto is chosen with images of the gallery, but there is {len(rows)}; expected a few "
                           "hundred")
    embeddings = Activations(gallery.embeddings[CLIP], classifier.device)
    graph = neighbour_graph(torch.cat([embeddings[part] for part in rows.split(_BATCH)]))
    # The candidates share batches, and with them codes and neighbours.
    batches = [*gallery_batches(gallery, site.hookpoint, retriever, classifier.device, rows)]
    # All of them take each batch in turn: many classes come of a few products then.
    steerings = [automatic.build(values) for values in automatic.candidates]
    automatic.use(steerings[0])
    _check_first(automatic, batches)
    ways: list[Tensor] = []
    with torch.no_grad(), torch.autocast(classifier.device.type, enabled=False):
        zero_shot = ZeroShot(model, site, classifier.float())
        for x, batch in tqdm(batches, name, unit="batch", disable=None if name else True, leave=False):
            steered = []
            for steering in steerings:
                automatic.use(steering)
                steered.append(in_float32(partial(steer, batch=batch), x))
            ways.append(zero_shot(steered))
    return choose_by_evidence(automatic.candidates, torch.cat(ways).unbind(1), graph, classifier.shape[1], prior)


@torch.no_grad()
def _check_first(automatic: Automatic, batches: Sequence[tuple[Tensor, Batch]]) -> None:
    """Raise PluginError unless the first candidate, in use, leaves activations as they are."""
    for x, batch in batches:
        moved = (in_float32(partial(steer, automatic, batch=batch), x) - x).norm(dim=-1)
        if not (moved <= _STILL * x.norm(dim=-1)).all():
            chosen = ", ".join(automatic.candidates[0])
            told = ", ".join(f"{name}={value:g}" for name, value in automatic.candidates[0].items())
            if fixed := automatic.fixed:
                raise ModelStringError(
                    f"with {', '.join(f'{name}={value:g}' for name, value in fixed.items())}, method "
                    f"{automatic.method.name!r} steers whatever {chosen} is, and auto chooses between steering and the "
                    f"model as it is; expected auto for {', '.join(fixed)} too, or numbers for all"
                )
            raise PluginError(
                f"method {automatic.method.name!r} moves activations by up to {float(moved.max()):.3g} with {told}; "
                "expected that its automatic options, all at their first value, leave activations as they are, since "
                "auto compares the others with that"
            )


def _kept(folder: Path, identity: Mapping[str, Any], classifier: Tensor, make: Callable[[], Choice]) -> Choice:
    """The choice that was made before with the same ``identity`` and classifier; else it is made, and kept if possible.

    Args:
        folder: where choices are kept.
        identity: plain values that the choice depends on.
        classifier: the class embeddings, which hold classes and prompts.
        make: makes the choice.
    """
    key = json_digest({**identity, "classifier": digest_of({"": classifier})})
    path = folder / f"{key[:32]}.json"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["sha256"] != json_digest(kept["choice"]):
            raise ValueError("it is not what was written")
        return Choice.from_json(kept["choice"])
    except (OSError, ValueError, TypeError, AttributeError, LookupError):  # none yet, or no choice: it is made anew
        choice = make()
    with suppress(OSError):  # in a folder that cannot be written, the choice serves this run only
        folder.mkdir(exist_ok=True)
        with atomic_file(path) as scratch:
            written = choice.to_json()
            scratch.write_text(json.dumps({"choice": written, "sha256": json_digest(written)}))
    return choice


def read_prior(path: str, classes: Sequence[str] | None = None, count: int | None = None) -> Tensor:
    """Shares of the classes ``[classes]``, float64 with sum 1, from a JSON file: {class: share}, or a list.

    Args:
        path: the file.
        classes: their names in order, as far as they are known.
        count: their number, as far as it is known.

    Raises:
        ModelStringError: the file cannot be read, or does not fit the classes.
    """

    def wrong(problem: str) -> ModelStringError:
        return ModelStringError(
            f'option prior={path!r}: {problem}; expected a JSON file such as {{"cat": 0.9, "dog": 0.1}}, or a list of '
            "shares in the order of the classes"
        )

    try:
        found = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: too deep, or a home folder of nobody
        raise wrong(" ".join(str(error).split())) from None
    by_name = isinstance(found, dict)
    shares = list(found.values()) if by_name else found
    if not isinstance(shares, list) or not all(map(_is_share, shares)) or sum(shares) <= 0:
        raise wrong("shares must be numbers of at least 0, not all of them 0")
    if by_name and classes is not None:
        unknown = sorted(set(found) - set(classes))
        if unknown:
            raise wrong(f"{', '.join(map(repr, unknown[:3]))} is not a class of the data set")
        shares = [found.get(name, 0) for name in classes]
    if count is not None and (len(shares) != count or (by_name and classes is None)):
        raise wrong(f"{len(shares)} shares for {count} classes, whose names are {'' if classes else 'not '}known")
    prior = torch.tensor(shares, dtype=torch.float64)
    return prior / prior.sum()


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 2.0**63
