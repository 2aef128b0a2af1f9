"""The places where a model is steered, built from a model string, a checkpoint and a tower."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from vs2_plugin import __version__
from vs2_plugin.checkpoint.checkpoint import Checkpoint
from vs2_plugin.checkpoint.records import SiteSAE
from vs2_plugin.clip.sites import Site, Sites
from vs2_plugin.errors import CheckpointError, ModelStringError, PluginError
from vs2_plugin.method import LABELS_USED, Scalar, widest
from vs2_plugin.model.automatic import Automatic, choose_at
from vs2_plugin.model.builder import build
from vs2_plugin.model.facts import facts_of
from vs2_plugin.model.parts import Parts, require
from vs2_plugin.model.place import Current, Place
from vs2_plugin.model.readout import Readout, plain_gallery, steered_gallery
from vs2_plugin.modelstring import ModelString
from vs2_plugin.steering.batch import Batch, Steering
from vs2_plugin.steering.context import Context, Task
from vs2_plugin.steering.gate import Gate, threshold
from vs2_plugin.steering.retriever import Retriever

__all__ = ["Places", "build_places"]

_LOG = logging.getLogger(__name__)


class Places(Sequence[Place]):
    """The places where one model is steered, in the order of the tower."""

    def __init__(
        self,
        spec: ModelString,
        places: Sequence[Place],
        parts: Parts,
        checkpoint: Checkpoint | None,
        task: Task | None,
        retriever: Retriever | None,
    ) -> None:
        self.spec, self.checkpoint, self.task, self.retriever = spec, checkpoint, task, retriever
        self._places = tuple(places)
        self._model = (parts.model,)
        #: Whether steering begins before the tower's end. The plain embedding then needs a forward pass of its own.
        self.inside = not parts.sites.at_end(places[0].site)
        if not self.inside:
            places[0].shows = self._model
        #: The method on logits that reads the tower's embeddings as classes, if there is one.
        self.readout = self._readout(parts)
        self._classifier: Tensor | None = None
        self._declared = self._describe()
        self._require_facts()

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        return self._places[index]

    def __iter__(self) -> Iterator[Place]:
        return iter(self._places)

    @property
    def gates(self) -> list[Gate]:
        """The gates of all places; none for a method that steers along no SAE."""
        return [place.gate for place in self if place.gate is not None]

    @cached_property
    def transductive(self) -> bool:
        """Whether the checkpoint was trained on images that are evaluated, as far as that is known."""
        checkpoint, task = self.checkpoint, self.task
        if checkpoint is None or task is None or checkpoint.transductive:
            return checkpoint is not None and checkpoint.transductive
        if task.folder:
            return checkpoint.data.holds(task.folder)
        return checkpoint.data.holds_split(task.dataset, task.split)

    @property
    def _split(self) -> str | None:
        """The split under evaluation; None for the usual one, ``test``."""
        return None if self.task is None or self.task.split == "test" else self.task.split

    def _describe(self) -> dict[str, Scalar]:
        checkpoint, options = self.checkpoint, self.spec.all_options
        facts: dict[str, Scalar] = {
            "method": self.spec.name,
            "version": __version__,
            "site": "+".join(place.site.hookpoint for place in self),
            "protocol": widest([self.spec.protocol, "transductive" if self.transductive else "image"]),
        }
        optional = {"split": self._split, "option_files": self.spec.option_files, **options}
        facts |= {name: value for name, value in optional.items() if value is not None}
        if "labels" in facts:  # "labels" below says which labels were used at all
            facts["neighbour_labels"] = facts.pop("labels")
        used = [self.spec.labels_used, *(place.facts.labels for place in self if place.facts is not None)]
        if checkpoint is not None:
            facts |= {
                "checkpoint": checkpoint.name,
                "checkpoint_digest": checkpoint.digest[:16],
                "transductive": self.transductive,
            }
            warnings = [f"{place.site}: {place.facts.warning}" for place in self if place.facts and place.facts.warning]
            facts |= {"sae_warning": "; ".join(warnings)} if warnings else {}
        of_sae = next((place.of_sae for place in reversed(self) if place.gate is not None), {})
        facts = {**facts, **of_sae, **facts}  # an option of the same name takes precedence
        facts["labels"] = max(used, key=LABELS_USED.index)
        return facts

    def results(self) -> dict[str, Scalar]:
        """Return the metrics that describe the steering, as flat scalars.

        ``vs2_coverage`` and ``vs2_mean_fvu`` are of the images seen since :meth:`reset`, at the last of several sites.

        Raises:
            PluginError: the method steered to NaN or infinity on a GPU, which is checked only here.
        """
        self.require_finite()
        last = self[-1]
        facts, problems = facts_of(last.steering)
        for problem in problems:  # no reason to lose an evaluation
            _LOG.warning("%s has %s; it is left out of the results", last.whose, problem)
        seen = {**facts, **({} if last.gate is None else last.gate.facts)}
        seen |= {} if self.readout is None else self.readout.facts
        return {f"vs2_{name}": value for name, value in {**self._declared, **seen}.items()}

    def require_finite(self) -> None:
        """Raise PluginError if a method steered to NaN or infinity on a GPU since :meth:`reset`."""
        for place in self:
            place.require_finite()

    def _require_facts(self) -> None:
        """Raise PluginError if a method reports a fact that does not fit into results."""
        for place in self:
            for problem in facts_of(place.steering)[1]:
                raise PluginError(f"{place.whose} has {problem}")

    def reset(self) -> None:
        """Forget the images seen so far."""
        for place in self:
            place.reset()
        if self.readout is not None:
            self.readout.start()

    def set_classifier(self, classifier: Tensor, quiet: bool = False) -> None:
        """Set the zero-shot classifier ``[embed_dim, classes]``, and choose options that are ``auto`` by it.

        The same one again changes nothing: a sweep sets it twice, with images in between.
        """
        if self._classifier is not None and torch.equal(self._classifier, classifier):
            return
        self._classifier, own = None, classifier.detach().clone()
        classes = None if self.task is None else self.task.classes
        with torch.autocast(own.device.type, enabled=False):
            if self.retriever is not None:
                self.retriever.set_classifier(own)
            for place in self:
                if isinstance(place.steering, Automatic):
                    assert self.checkpoint is not None  # a method without a checkpoint has no automatic option
                    choose_at(place, self._model[0], self.checkpoint, own, self.spec, classes, quiet)
            if self.readout is not None:
                self.readout.set_classifier(own)
        self._require_facts()
        self._classifier = own

    def _readout(self, parts: Parts) -> Readout | None:
        """Return the method on logits; None if there is none.

        Raises:
            ModelStringError: the method learns from steered images, but the gallery lacks the activations to steer.
        """
        reading = self.spec.reading
        if reading is None:
            return None
        context = partial(Context, parts.model, "logits", parts.sites.output.width, task=deepcopy(self.task))
        if reading.protocol != "unlabeled":
            return Readout(reading, context, None)
        assert self.checkpoint is not None  # a method that learns from unlabeled images needs one
        gallery = parts.gallery(self.checkpoint)
        if self.spec.outer is None:
            return Readout(reading, context, partial(plain_gallery, gallery, parts.device))
        if self.inside:
            raise ModelStringError(
                f"model {str(self.spec)!r}: {reading.method.name} learns from steered images of the gallery, whose "
                f"activations are known only at the end of the tower, but steering begins at {self[0].site}; "
                "expected @unlabeled=test, or no @blocks"
            )
        return Readout(reading, context, partial(steered_gallery, gallery, parts.model, self[0]))

    def per_image(self) -> dict[str, Tensor]:
        """Return what recording gates know of each image: ``fvu`` at the last site, and ``steered`` at any site."""
        records = [gate.per_image() for gate in self.gates if gate.recording]
        return {**records[-1], "steered": torch.stack([item["steered"] for item in records]).any(0)} if records else {}


def build_places(
    spec: ModelString, checkpoint: Checkpoint | None, task: Task | None, parts: Parts, current: Current
) -> Places:
    """Build the places of a model string with their steerings. The tower itself is not changed.

    Raises:
        CheckpointError: the checkpoint is of another tower, or lacks an SAE or a gallery.
        ModelStringError: options that cannot be used at the sites.
        PluginError: the method could not be built.
    """
    retriever, saes = None, []
    if checkpoint is not None:
        assert parts.tower is not None
        checkpoint.require_tower(parts.tower, spec.backbone, spec.name)
        saes = require(checkpoint, spec)
        retriever = parts.retriever(checkpoint, spec)
    sites = _sites(spec, checkpoint, saes, parts.sites)
    _require_end(spec, [site for site, _ in sites], parts.sites)
    places = [_place(site, facts, spec, checkpoint, task, retriever, parts, current) for site, facts in sites]
    return Places(spec, places, parts, checkpoint, task, retriever)


def _sites(
    spec: ModelString, checkpoint: Checkpoint | None, saes: Sequence[SiteSAE], sites: Sites
) -> list[tuple[Site, SiteSAE | None]]:
    """Return the sites to steer at, each with the checkpoint's record of its SAE, if the method steers along one."""
    if spec.method.site in ("output", "logits"):
        return [(sites.output, None)]
    if checkpoint is None or not saes:
        return [(sites.default, None)]
    chosen: list[tuple[Site, SiteSAE | None]] = []
    for facts in saes:
        site = sites.find(facts.hookpoint)
        if site.width != facts.width:
            raise CheckpointError(
                f"checkpoint {checkpoint.name!r} has width {facts.width} at {site}, the tower has {site.width}"
            )
        chosen.append((site, facts))
    return chosen


def _require_end(spec: ModelString, chosen: Sequence[Site], sites: Sites) -> None:
    """Raise ModelStringError for ``auto`` before the tower's end: the gallery holds activations, not images."""
    automatic = spec.method.automatic(spec.options)
    if automatic and not all(map(sites.at_end, chosen)):
        names = ", ".join(option.name for option in automatic)
        raise ModelStringError(
            f"model {str(spec)!r}: {names}=auto is chosen by activations at the end of the tower, but steering "
            f"begins at {chosen[0]}; expected numbers for {names}, or no @blocks"
        )


def _place(
    site: Site,
    facts: SiteSAE | None,
    spec: ModelString,
    checkpoint: Checkpoint | None,
    task: Task | None,
    retriever: Retriever | None,
    parts: Parts,
    current: Current,
) -> Place:
    location = (site.hookpoint, site.width)
    task = deepcopy(task)  # the plugin gets copies, also of mean and quantiles, which it may edit
    if facts is None or checkpoint is None:
        context = Context(parts.model, *location, task=task, retriever=retriever)
        steering = as_it_is if spec.method.site == "logits" else _steering(spec, context)
        return Place(spec.method.name, site, None, steering, None, retriever, current, parts.weights)
    sae, mean = parts.sae(checkpoint, facts)
    if facts.warning:
        parts.warn(f"checkpoint {checkpoint.name!r}: the SAE at {site} is useless: {facts.warning}; {facts.advice}")
    shared: dict[str, Any] = parts.once(("shared", checkpoint.folder, facts.folder), dict)
    context = Context(parts.model, *location, sae, mean.clone(), dict(facts.fvu_quantiles), task, retriever, shared)
    steering, q = _steering(spec, context), spec.options["gate"]
    gate = Gate(steering, sae, mean, None if q is None else threshold(facts.fvu_quantiles, float(q)))
    place = Place(spec.method.name, site, facts, steering, gate, retriever, current, parts.weights)
    return place.to(parts.device).eval()


def as_it_is(x: Tensor, batch: Batch) -> Tensor:
    """Return activations unchanged: the steering of a method on logits."""
    return x


as_it_is.replayable = True  # type: ignore[attr-defined]


def _steering(spec: ModelString, context: Context) -> Steering:
    options = {option.name: spec.options[option.name] for option in spec.method.options}
    if spec.method.automatic(options):
        return Automatic(spec.method, partial(build, spec.method, context), options)  # no closure, to be picklable
    return build(spec.method, context, options)
