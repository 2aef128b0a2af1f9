"""Where a model is steered and by what: put together from a model string, a checkpoint and a tower."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

from torch import Tensor, nn

from vs2_plugin import __version__
from vs2_plugin.checkpoint.checkpoint import Checkpoint
from vs2_plugin.checkpoint.records import RETRAIN, SiteSAE
from vs2_plugin.clip.sites import ClipModel, Site, Sites, embedding_from
from vs2_plugin.errors import CheckpointError, ModelStringError, PluginError
from vs2_plugin.method import LABELS_USED, Scalar, widest
from vs2_plugin.model.automatic import Automatic, choose
from vs2_plugin.model.builder import Builder, read_by_all, whose
from vs2_plugin.model.facts import facts_of
from vs2_plugin.model.parts import Parts
from vs2_plugin.model.readout import Readout, plain_gallery, steered_gallery
from vs2_plugin.modelstring import ModelString
from vs2_plugin.steering.batch import Batch, Steering, call, steer, unchanged
from vs2_plugin.steering.context import Context, Task
from vs2_plugin.steering.gate import Gate, threshold
from vs2_plugin.steering.move import Move
from vs2_plugin.steering.replay import Replays, can_replay
from vs2_plugin.steering.retriever import Retriever
from vs2_plugin.steering.tally import Tally

__all__ = ["Place", "Places", "build_places"]

_LOG = logging.getLogger(__name__)


class Current:
    """The batch that a tower is running on. One object is shared by a model and its places, also in a copy of both."""

    batch: Batch | None = None


class Place(nn.Module):
    """One site at which a model is steered."""

    def __init__(
        self,
        name: str,
        site: Site,
        facts: SiteSAE | None,
        steering: Steering,
        gate: Gate | None,
        retriever: Retriever | None,
        current: Current,
    ) -> None:
        super().__init__()
        #: Of the method.
        self.name = name
        self.site = site
        self.retriever = retriever
        #: What the checkpoint tells of the SAE there, if the method steers along one.
        self.facts = facts
        #: The method's own steering, without the gate.
        self.steering = steering
        #: Around it, where there is an SAE. It holds the SAE and its mean.
        self.gate = gate
        self.current = current
        #: Of the first place, at the tower's end: the model, whose plain embedding is what the rest of the tower makes
        #: of the activation here. In a tuple: the model is no part of its own steering.
        self.shows: tuple[ClipModel, ...] = ()
        self.replays = Replays()
        self._tally = Tally()

    @property
    def of_sae(self) -> dict[str, Scalar]:
        """What tells the SAE here from others, for the results; empty where there is none."""
        if self.gate is None:
            return {}
        config, trained = self.gate.sae.config, {} if self.facts is None else self.facts.training
        facts: dict[str, Scalar] = {"k": config.k, "latents": config.num_latents}
        facts["expansion"] = round(config.num_latents / config.d_in, 3)
        told = {"seed": trained.get("seed"), "pass_weight": trained.get("pass_weight") or None}
        return facts | {name: value for name, value in told.items() if value is not None}

    def steer(self, x: Tensor, batch: Batch, wait: bool = True) -> Tensor:
        """The steered activations ``[batch, d]``, float32, of the images at hand.

        Raises:
            PluginError: they are no such activations; or not finite though x is, and accuracy would be computed of
                them all the same; or the method edited what is not its own. Without ``wait``, a GPU is not waited for,
                and :meth:`require_finite` tells of activations that are not finite.
        """
        return self._checked(self.gate or partial(steer, self.steering), x, batch, wait)

    def steer_all(self, x: Tensor, batch: Batch) -> Tensor:
        """The same without the gate."""
        return self._checked(partial(steer, self.steering), x, batch, True)

    def _checked(self, steer: Callable[[Tensor, Batch], Tensor], x: Tensor, batch: Batch, wait: bool) -> Tensor:
        sae = None if self.gate is None else self.gate.sae
        try:
            with unchanged(lambda: {"its activations": x, **read_by_all(sae, self.retriever, batch)}):
                steered = steer(x, batch)
        except PluginError as error:
            raise PluginError(f"{self.whose} failed at {self.site}: {error}") from error
        if not wait and x.device.type != "cpu":
            self._tally.add(steered=steered.detach(), given=x.detach())
        elif not steered.isfinite().all() and x.isfinite().all():
            raise self._not_finite()
        return steered

    def require_finite(self) -> None:
        """Raise PluginError if activations that were finite have been steered to others since :meth:`reset`.

        It is for those that :meth:`steer` did not wait for.
        """
        means = self._tally.means()
        if means and not math.isfinite(means["steered"]) and math.isfinite(means["given"]):
            raise self._not_finite()

    def _not_finite(self) -> PluginError:
        return PluginError(
            f"{self.whose} steered to NaN or infinity at {self.site}; expected finite activations (a division by "
            "0, or a strength beyond float32?)"
        )

    def reset(self) -> None:
        """Forget the images seen so far."""
        for part in (self._tally, self.gate, self.steering):
            getattr(part, "reset", lambda: None)()

    @property
    def whose(self) -> str:
        """The method with its plugin, in words."""
        return whose(self.name)

    def move(self, x: Tensor, batch: Batch) -> Move | None:
        """How the method moves ``[batch, d]`` along latents, without the gate; None for a method that tells no move."""
        moved = call(self.steering, x, batch)
        return moved if isinstance(moved, Move) else None

    def forward(self, x: Tensor) -> Tensor:
        """Steer ``[batch, d]`` in the tower that is running."""
        batch = self.current.batch
        if batch is None:  # the tower runs by itself
            return self.steer(x, Batch(), wait=False)
        return self._steer_in(x, batch)

    def _steer_in(self, x: Tensor, batch: Batch) -> Tensor:
        if self.shows and batch.embed is None:
            batch.embed = lambda: embedding_from(self.shows[0], self.site, x)
        return self.steer(x, batch, wait=False)

    def replay(self, x: Tensor) -> Tensor | None:
        """The same on a GPU, in the dtype of ``[batch, d]``, as a CUDA graph; None where it has to be told anew: only a
        steering with an attribute ``replayable`` does the same with all batches, and asks nothing but the GPU."""
        if not can_replay(x) or getattr(self, "_is_replica", False) or (self.gate is not None and self.gate.recording):
            return None
        batch = self.current.batch
        if self.retriever is not None and (not self.shows or batch is None or batch.embed is not None):
            return None
        if not getattr(self.steering, "replayable", False):
            return None
        steered = self.replays(self._steer_in, x)
        # What is written among other tokens is copied there.
        return steered.clone() if steered is not None and self.site.token_dim is None else steered

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Place:
        self.replays.forget()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


class Places(Sequence[Place]):
    """Where one model is steered, in the order of the tower."""

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
        #: Whether steering begins before the tower's end. The plain embedding then takes a run of its own.
        self.inside = not parts.sites.at_end(places[0].site)
        if not self.inside:
            places[0].shows = self._model
        #: The method on logits that reads what comes out of the tower, if there is one.
        self.readout = self._readout(parts)
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
        """The gates; none for a method that steers along no SAE."""
        return [place.gate for place in self if place.gate is not None]

    @property
    def transductive(self) -> bool:
        """Whether images that are evaluated were trained on, as far as that is known."""
        if self.checkpoint is None:
            return False
        return self.checkpoint.transductive or self.checkpoint.data.holds(self.task.folder if self.task else "")

    def _describe(self) -> dict[str, Scalar]:
        checkpoint, options = self.checkpoint, self.spec.all_options
        facts: dict[str, Scalar] = {
            "method": self.spec.name,
            "version": __version__,
            "site": "+".join(place.site.hookpoint for place in self),
            "protocol": widest([self.spec.protocol, "transductive" if self.transductive else "image"]),
        }
        facts |= {name: value for name, value in options.items() if value is not None}
        if "labels" in facts:  # the word also says which labels were used at all, just below
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
        facts = {**facts, **of_sae, **facts}  # an option of that name stays
        facts["labels"] = max(used, key=LABELS_USED.index)
        return facts

    def results(self) -> dict[str, Scalar]:
        """The metrics that describe the steering: flat scalars.

        ``vs2_coverage`` and ``vs2_mean_fvu`` are of the images seen since :meth:`reset`, at the last of several sites.

        Raises:
            PluginError: a GPU, which is not waited for sooner, steered to what is not finite.
        """
        for place in self:
            place.require_finite()
        last = self[-1]
        told, problems = facts_of(last.steering)
        for problem in problems:  # an evaluation is not lost for it
            _LOG.warning("%s has %s; it is left out of the results", last.whose, problem)
        seen = {**told, **({} if last.gate is None else last.gate.facts)}
        seen |= {} if self.readout is None else self.readout.facts
        return {f"vs2_{name}": value for name, value in {**self._declared, **seen}.items()}

    def _require_facts(self) -> None:
        """Raise PluginError where a method says of itself what cannot stand in results."""
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
        """Tell the zero-shot classifier ``[embed_dim, classes]``. Options that are ``auto`` are chosen by it."""
        if self.retriever is not None:
            self.retriever.set_classifier(classifier)
        classifier = classifier.detach()
        for place in self:
            place.replays.forget()
            # A sweep tells them twice; the steering keeps what it has seen in between.
            if isinstance(place.steering, Automatic) and not place.steering.is_settled(classifier):
                self._choose(place, place.steering, classifier, quiet)
        if self.readout is not None:
            self.readout.set_classifier(classifier)
        self._require_facts()

    def _choose(self, place: Place, automatic: Automatic, classifier: Tensor, quiet: bool) -> None:
        assert self.checkpoint is not None  # its gallery tells: a method without a checkpoint has no automatic option
        gated = self.spec.options.get("gate") is not None
        choose(
            automatic,
            place.steer if gated else place.steer_all,
            self._model[0],
            place.site,
            self.checkpoint,
            self.retriever,
            classifier,
            self.spec,
            None if self.task is None else self.task.classes,
            quiet,
        )
        if gated and place.gate is not None:
            place.gate.reset()  # it saw the gallery

    def _readout(self, parts: Parts) -> Readout | None:
        """The method on logits.

        Raises:
            ModelStringError: it learns from steered images, of which the gallery holds too little.
        """
        reading = self.spec.reading
        if reading is None:
            return None
        context = partial(Context, parts.model, "logits", parts.sites.output.width, task=deepcopy(self.task))
        if reading.method.protocol_of(reading.options) != "unlabeled":
            return Readout(reading, context, None)
        assert self.checkpoint is not None  # it needs one
        gallery = parts.gallery(self.checkpoint)
        if self.spec.outer is None:
            return Readout(reading, context, partial(plain_gallery, gallery, parts.device))
        if self.inside:
            raise ModelStringError(
                f"model {str(self.spec)!r}: {reading.method.name} learns from the gallery's images as they are steered,"
                f" of which activations at the end of the tower are known, and steering begins at {self[0].site}; "
                "expected @unlabeled=test, or no @blocks"
            )
        return Readout(reading, context, partial(steered_gallery, gallery, parts.model, self[0]))

    def per_image(self) -> dict[str, Tensor]:
        """The last site's gate on each image, while it was recording: ``fvu`` and ``steered``."""
        gate = self[-1].gate
        return gate.per_image() if gate is not None and gate.recording else {}


def build_places(
    spec: ModelString, checkpoint: Checkpoint | None, task: Task | None, parts: Parts, current: Current
) -> Places:
    """Build the steerings of a model string. The tower itself is not touched.

    Raises:
        CheckpointError: the checkpoint is of another tower, or lacks something.
        ModelStringError: options that do not go with the sites.
        PluginError: the method could not be built.
    """
    if checkpoint is not None:
        assert parts.tower is not None
        checkpoint.require_tower(parts.tower, spec.backbone, spec.name)
    if checkpoint is not None and spec.reading is not None:
        checkpoint.require_gallery()
    retriever = None if checkpoint is None else parts.retriever(checkpoint, spec)
    sites = _sites(spec, checkpoint, parts.sites)
    _require_end(spec, [site for site, _ in sites], parts.sites)
    places = [_place(site, facts, spec, checkpoint, task, retriever, parts, current) for site, facts in sites]
    return Places(spec, places, parts, checkpoint, task, retriever)


def _sites(spec: ModelString, checkpoint: Checkpoint | None, sites: Sites) -> list[tuple[Site, SiteSAE | None]]:
    """Where to steer, with the SAE there, if the method steers along one."""
    if spec.method.site in ("output", "logits"):
        return [(sites.output, None)]
    if checkpoint is None:
        return [(sites.default, None)]
    chosen: list[tuple[Site, SiteSAE | None]] = []
    blocks = spec.options["blocks"]
    for facts in checkpoint.select(None if blocks is None else str(blocks), spec.method.sae):
        site = sites.find(facts.hookpoint)
        if site.width != facts.width:
            raise CheckpointError(
                f"checkpoint {checkpoint.name!r} has width {facts.width} at {site}, the tower has {site.width}"
            )
        chosen.append((site, facts))
    return chosen


def _require_end(spec: ModelString, chosen: Sequence[Site], sites: Sites) -> None:
    """Refuse to choose further in: of the gallery's images, only the activations are known."""
    automatic = spec.method.automatic(spec.options)
    if automatic and not all(map(sites.at_end, chosen)):
        names = ", ".join(option.name for option in automatic)
        raise ModelStringError(
            f"model {str(spec)!r}: {names}=auto is told by activations at the end of the tower, and steering "
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
    given = (site.hookpoint, site.width)
    task = deepcopy(task)  # a plugin's own, as the mean and the quantiles: it may do with them as it likes
    if facts is None or checkpoint is None:
        context = Context(parts.model, *given, task=task, retriever=retriever)
        steering = as_it_is if spec.method.site == "logits" else _steering(spec, context)
        return Place(spec.method.name, site, None, steering, None, retriever, current)
    sae, mean = parts.sae(checkpoint, facts)
    if facts.warning:
        told = f"checkpoint {checkpoint.name!r}: the SAE at {site} is of no use: {facts.warning}; {RETRAIN}"
        parts.once(("warning", checkpoint.folder, facts.folder), lambda: _LOG.warning("%s", told))
    shared: dict[str, Any] = parts.once(("shared", checkpoint.folder, facts.folder), dict)
    context = Context(parts.model, *given, sae, mean.clone(), dict(facts.fvu_quantiles), task, retriever, shared)
    steering, q = _steering(spec, context), spec.options["gate"]
    gate = Gate(steering, sae, mean, None if q is None else threshold(facts.fvu_quantiles, float(q)))
    return Place(spec.method.name, site, facts, steering, gate, retriever, current).to(parts.device).eval()


def as_it_is(x: Tensor, batch: Batch) -> Tensor:
    """What a method on logits does to activations: nothing."""
    return x


def _steering(spec: ModelString, context: Context) -> Steering:
    options = {option.name: spec.options[option.name] for option in spec.method.options}
    build, automatic = Builder(spec.method, context), spec.method.automatic(options)
    return Automatic(spec.method.name, build, options, automatic) if automatic else build(options)
