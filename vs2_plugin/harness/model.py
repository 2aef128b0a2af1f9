"""The steered model, as clip_benchmark sees it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from vs2_plugin import __version__
from vs2_plugin.gallery.files import index_file, open_gallery
from vs2_plugin.checkpoint.checkpoint import Checkpoint, SiteFacts
from vs2_plugin.clip.backbone import Loaded, Tower
from vs2_plugin.clip.sites import Edit, Site, default_site, edit, embedding_from, find_site, output_site, paused
from vs2_plugin.data.images import image_digest
from vs2_plugin.errors import CheckpointError, ModelStringError, PluginError, Vs2Error
from vs2_plugin.harness.automatic import Automatic, kept, read_prior, settle
from vs2_plugin.harness.plain import PlainEmbedding
from vs2_plugin.method import Scalar
from vs2_plugin.modelstring import ModelString
from vs2_plugin.plugins import registry
from vs2_plugin.gallery.encoders import load_encoder
from vs2_plugin.gallery.gallery import CLIP, Gallery
from vs2_plugin.gallery.retriever import Retriever
from vs2_plugin.gallery.search import Search, open_search
from vs2_plugin.sae.topk import TopKSAE
from vs2_plugin.steering.context import Context, Task
from vs2_plugin.steering.gate import Gate, threshold
from vs2_plugin.strength import NEIGHBOURS, RULE

__all__ = ["Place", "SteeredCLIP"]

_LABELS = ("none", "train", "oracle")


class Place(NamedTuple):
    """One site at which a model is steered."""

    site: Site
    facts: SiteFacts | None
    """The SAE there, if the method steers along one."""
    edit: Edit
    steering: Callable[[Tensor], Tensor]
    """The method's own, without the gate."""
    gate: Gate | None
    """Around it, where there is an SAE. It holds the SAE and its mean."""


class SteeredCLIP(nn.Module):
    """An open_clip model whose image activations are steered in every forward pass.

    It has the methods and attributes of the model inside (``encode_image``, ``encode_text``, ``generate``,
    ``logit_scale``, …). Steering sits in a hook of the vision tower, so whatever runs the tower is steered.
    """

    def __init__(
        self,
        spec: ModelString,
        loaded: Loaded,
        find_checkpoint: Callable[[Task | None], Checkpoint | None],
        tower: Tower | None = None,
    ) -> None:
        super().__init__()
        self.model = loaded.model
        self.spec = spec
        self.checkpoint: Checkpoint | None = None
        self._tower = tower or (Tower.of(loaded.model, loaded.transform) if spec.method.needs_checkpoint else None)
        self._find_checkpoint = find_checkpoint
        self._edits: list[Edit] = []
        self._steerings: list[Callable[[Tensor], Tensor]] = []
        self._gates: list[Gate] = []
        self._retriever: Retriever | None = None
        self._two_passes = False
        self._targets: Tensor | None = None
        self._task: Task | None = None
        self._plain: PlainEmbedding | None = None
        self._facts: dict[str, Scalar] = {}
        self.eval()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def bind(self, task: Task | None) -> None:
        """Find the checkpoint for ``task`` (None: the one that the model string names) and start steering.

        Raises:
            CheckpointError: there is none, or it is of another tower.
            PluginError: the method could not be built.
        """
        self._detach()
        # Only when all of it could be built is the tower touched.
        self._attach(self._prepare(task))

    @property
    def places(self) -> list[Place]:
        """Where the tower is steered, in its order."""
        gates = self._gates or [None] * len(self._edits)
        steerings = [part.steering if isinstance(part, Automatic) else part for part in self._steerings]
        rows = zip(self._sites(), self._edits, steerings, gates, strict=True)
        return [Place(site, facts, handle, steering, gate) for (site, facts), handle, steering, gate in rows]

    @property
    def retriever(self) -> Retriever | None:
        """What knows the gallery, if the method has one."""
        return self._retriever

    def _attach(self, steered: list[tuple[Site, Callable[[Tensor], Tensor]]]) -> None:
        self._edits += [edit(self.model, site, steering) for site, steering in steered]

    def _detach(self) -> None:
        while self._edits:
            self._edits.pop().remove()

    def _prepare(self, task: Task | None) -> list[tuple[Site, Callable[[Tensor], Tensor]]]:
        """Where to steer and by what, for ``task``."""
        self.checkpoint = checkpoint = self._find_checkpoint(task)
        if checkpoint is not None:
            checkpoint.require_tower(self._tower)
        self._retriever = self._open_retriever()
        self._task = task
        sites = self._sites()
        self._require_end([site for site, _ in sites])
        built = [self._at(site, facts, task) for site, facts in sites]
        device = next(self.model.parameters()).device
        self._steerings = [steering for _, steering in built]
        self._gates = [gate for gate, _ in built if isinstance(gate, Gate)]
        # Where the first steering is at the tower's end, the plain embedding is had from the activation there.
        self._two_passes = sites[0][0] not in (default_site(self.model), output_site(self.model))
        steered = []
        for index, ((site, _), (outer, _)) in enumerate(zip(sites, built, strict=True)):
            if self._retriever is not None and index == 0 and not self._two_passes:
                outer = _Looking(outer, self._retriever, self.model, site)
            if isinstance(outer, nn.Module):
                outer.to(device).eval()
            steered.append((site, outer))
        self._facts = self._describe([site for site, _ in sites])
        return steered

    def _sites(self) -> list[tuple[Site, SiteFacts | None]]:
        """Where to steer, with the SAE there, if the method steers along one."""
        if self.spec.method.site == "output":
            return [(output_site(self.model), None)]
        if self.checkpoint is None:
            return [(default_site(self.model), None)]
        found = []
        for facts in self.checkpoint.select(self.spec.options["blocks"], self.spec.method.sae):
            site = find_site(self.model, facts.hookpoint)
            if site.width != facts.width:
                raise CheckpointError(
                    f"checkpoint {self.checkpoint.name!r} has width {facts.width} at {site}, the tower has {site.width}"
                )
            found.append((site, facts))
        return found

    def _require_end(self, sites: list[Site]) -> None:
        """Refuse to choose further in: of the gallery's images, only the activations are known."""
        automatic = self.spec.method.automatic(self.spec.options)
        if automatic and any(site not in (default_site(self.model), output_site(self.model)) for site in sites):
            names = ", ".join(option.name for option in automatic)
            raise ModelStringError(
                f"model {str(self.spec)!r}: {names}=auto is told by activations at the end of the tower, and steering "
                f"begins at {sites[0]}; expected numbers for {names}, or no @blocks"
            )

    def _open_retriever(self) -> Retriever | None:
        method, options = self.spec.method, self.spec.options
        if method.gallery == "none":
            return None
        device = next(self.model.parameters()).device
        oracle = method.gallery == "neighbours" and method.labels_used(options) == "oracle"
        if method.gallery == "images":
            self.checkpoint.require_gallery()
            return Retriever(open_gallery(self.checkpoint), device)
        name = options["encoder"]
        facts = self.checkpoint.require_gallery(oracle, name, options["n"])["encoders"][name]
        gallery = open_gallery(self.checkpoint)
        encoder = None if name == CLIP else self._load_encoder(name, facts)
        search = self._open_search(name, gallery)
        return Retriever(
            gallery, device, n=options["n"], search=search, encode=encoder, encoder=name, digest=image_digest
        )

    def _load_encoder(self, name: str, facts: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
        device = next(self.model.parameters()).device
        return load_encoder(name, facts["weights"], self._tower.preprocessing, device, facts)

    def _open_search(self, name: str, gallery: Gallery) -> Search:
        device = next(self.model.parameters()).device
        file = index_file(self.checkpoint, name)
        return open_search(self.spec.options["search"], gallery.embeddings[name], file, device)

    def _load_sae(self, facts: SiteFacts) -> tuple[TopKSAE, Tensor]:
        device = next(self.model.parameters()).device
        sae, mean = self.checkpoint.load(facts)
        return sae.to(device), mean.to(device)

    def _at(self, site: Site, facts: SiteFacts | None, task: Task | None) -> tuple[Any, Callable[[Tensor], Tensor]]:
        """What to put at a site: the method's steering, gated where it steers along an SAE; and the steering itself."""
        if facts is None:
            steering = self._steering(
                Context(self.model, site.hookpoint, site.width, task=task, retriever=self._retriever)
            )
            return steering, steering
        sae, mean = self._load_sae(facts)
        steering = self._steering(
            Context(self.model, site.hookpoint, site.width, sae, mean, facts.fvu_quantiles, task, self._retriever)
        )
        q = self.spec.options["gate"]
        return Gate(steering, sae, mean, None if q is None else threshold(facts.fvu_quantiles, q)), steering

    def _steering(self, context: Context) -> Callable[[Tensor], Tensor]:
        method = self.spec.method
        options = {option.name: self.spec.options[option.name] for option in method.options}
        automatic = method.automatic(options)
        if not automatic:
            return self._build(context, options)
        device = next(self.model.parameters()).device
        # No lambda: a copy of the model has to build along its own retriever.
        return Automatic(partial(self._build, context), options, automatic, device)

    def _build(self, context: Context, options: Mapping[str, Scalar | None]) -> Callable[[Tensor], Tensor]:
        method = self.spec.method
        try:
            steering = method.build(context, **options)
        except Vs2Error:
            raise
        except Exception as error:
            owner = registry().owners.get(method.name, "?")
            raise PluginError(
                f"method {method.name!r} of {owner} could not be built: {type(error).__name__}: {error}"
            ) from error
        if not callable(steering):
            raise PluginError(
                f"method {method.name!r} built {steering!r}; expected a function from activations to activations"
            )
        return steering

    def _describe(self, sites: list[Site]) -> dict[str, Scalar]:
        checkpoint, method, options = self.checkpoint, self.spec.method, self.spec.options
        facts = {
            "method": method.name,
            "version": __version__,
            "site": "+".join(site.hookpoint for site in sites),
        }
        facts |= {name: value for name, value in options.items() if value is not None}
        if "labels" in facts:  # the word also says which labels were used at all, just below
            facts["neighbour_labels"] = facts.pop("labels")
        used = [method.labels_used(options), *(site.labels for _, site in self._sites() if site is not None)]
        if checkpoint is not None:
            facts |= {
                "checkpoint": checkpoint.name,
                "checkpoint_digest": checkpoint.digest[:16],
                "transductive": checkpoint.transductive,
            }
        if self._gates:
            config = self._gates[-1].sae.config
            facts = {**facts, "k": config.k, "latents": config.num_latents, **facts}  # an option of that name stays
        facts["labels"] = max(used, key=_LABELS.index)
        return facts

    def set_classifier(self, classifier: Tensor, quiet: bool = False) -> None:
        """Tell a method that needs the classes the zero-shot classifier ``[embed_dim, classes]``. The harness glue does
        so; in Python it is up to the caller, before the first image is encoded. Options that are ``auto`` are chosen
        now, and the choice is printed unless ``quiet``."""
        if self._retriever is not None:
            self._retriever.set_classifier(classifier)
        for place, steering in enumerate(self._steerings):
            # A sweep tells them twice; the steering keeps what it has seen in between.
            if isinstance(steering, Automatic) and not steering.is_settled(classifier.detach()):
                self._choose(place, steering, classifier.detach(), quiet)

    def _choose(self, place: int, automatic: Automatic, classifier: Tensor, quiet: bool) -> None:
        site, checkpoint, options = self._sites()[place][0], self.checkpoint, self.spec.options
        gallery = open_gallery(checkpoint) if self._retriever is None else self._retriever.gallery
        prior = None
        if options["prior"] is not None:
            classes = None if self._task is None else self._task.classes
            prior = read_prior(options["prior"], classes, classifier.shape[1])
        steer = self._gates[place] if options.get("gate") is not None else automatic
        identity = {
            "version": __version__,
            "rule": [*RULE, NEIGHBOURS],
            "checkpoint": checkpoint.digest,
            "method": self.spec.method.name,
            "options": options | {"prior": None if prior is None else prior.tolist()},
            "candidates": automatic.candidates,
            "site": site.hookpoint,
        }
        name = str(self.spec)

        def make():
            bar = None if quiet else name
            return settle(automatic, steer, self.model, site, gallery, classifier, self._retriever, prior, bar)

        automatic.settle(kept(checkpoint.folder / "auto", identity, classifier, make), classifier)
        if steer is not automatic:
            steer.reset()  # it saw the gallery
        if not quiet:
            print(f"vs2: {name}: {automatic.choice}", file=sys.stderr)

    def set_targets(self, targets: Tensor | None) -> None:
        """Tell an oracle the true classes ``[batch]`` of the images that are encoded next."""
        self._targets = targets

    def reset_statistics(self) -> None:
        """Forget the images seen so far; the harness glue calls this before each evaluation."""
        for part in (*self._gates, *self._steerings):
            if hasattr(part, "reset"):
                part.reset()

    def vs2_facts(self) -> dict[str, Scalar]:
        """What the results' metrics say of the steering, as flat scalars.

        ``vs2_coverage`` and ``vs2_mean_fvu`` are of the images seen since :meth:`reset_statistics`, at the last
        of several sites.
        """
        seen = {**getattr(self._steerings[-1], "facts", {})} if self._steerings else {}
        seen |= self._gates[-1].facts if self._gates else {}
        return {f"vs2_{name}": value for name, value in {**self._facts, **seen}.items()}

    def record_images(self, recording: bool, show: Callable[[Callable[[], Tensor]], None] | None = None) -> None:
        """Keep, or no longer keep, what :meth:`per_image` tells.

        ``show`` is called after each batch, under the autocast of the moment, with a function that gives the plain
        model's embedding of the same images ``[batch, embed_dim]``, bit for bit. Without it there is none to be had.
        """
        for gate in self._gates:
            gate.recording = recording
        if self._plain is not None:
            self._plain.remove()
        self._plain = None
        if recording and show is not None:
            self._plain = PlainEmbedding(
                self.model, self._edits, None if self._two_passes else self._sites()[0][0], show
            )

    def per_image(self) -> dict[str, Tensor]:
        """What the last site's gate saw of each image since :meth:`reset_statistics`: ``fvu`` and ``steered``."""
        return self._gates[-1].per_image() if self._gates and self._gates[-1].recording else {}

    def encode_image(self, image: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The steered image embedding ``[batch, embed_dim]``, in the dtype of the model inside."""
        if not self._edits:
            raise ModelStringError(
                f"model {str(self.spec)!r} does not know its data set yet; name a checkpoint ({self.spec.method.name}:"
                f"{self.spec.backbone}@NAME) or pass dataset= to vs2_plugin.load"
            )
        with self._batch(image) as plain:
            embedding = self.model.encode_image(image, *args, **kwargs)
        if self._plain is not None:
            self._plain.show(image, plain)
        return embedding

    @contextmanager
    def _batch(self, image: Tensor | None) -> Iterator[Tensor | None]:
        """Within the block the tower runs on these images, which a method with a gallery has to know. Gives their plain
        embedding, if the tower had to run for it."""
        if self._retriever is None or image is None:
            yield None
            return
        plain = None
        self._retriever.begin(image, self._targets)
        try:
            if self._two_passes:
                with paused(self._edits):
                    plain = self.model.encode_image(image)
                self._retriever.embed(lambda: plain)
            yield plain
        finally:
            self._retriever.end()

    def encode_text(self, text: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The text embedding; steering leaves it alone."""
        return self.model.encode_text(text, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass of the model inside, of images and texts."""
        with self._batch(kwargs.get("image", args[0] if args else None)):
            return self.model(*args, **kwargs)


class _Looking(nn.Module):
    """Around the first steering, at the tower's end: shows the retriever the plain embedding of the batch."""

    def __init__(
        self, steering: Callable[[Tensor], Tensor], retriever: Retriever, model: nn.Module, site: Site
    ) -> None:
        super().__init__()
        self.steering, self.retriever, self.site = steering, retriever, site
        self._model = [model]  # in a list: the model is no part of its own steering

    def forward(self, x: Tensor) -> Tensor:
        self.retriever.embed(lambda: embedding_from(self._model[0], self.site, x))
        return self.steering(x)
