"""Evaluates many steered models on one data set with one pass of its images through the plain tower.

Every number is computed by clip_benchmark's own ``evaluate``, as patched by ``harness.register``: once for the plain
model, which is watched meanwhile, and once per point for a model that steers what was seen. Points that steer before
the tower's end have the rest of the tower run for each of them while the batch is at hand.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from vs2_plugin.checkpoint.checkpoint import Checkpoint, SiteFacts
from vs2_plugin.checkpoint.store import Store, checkpoint_name
from vs2_plugin.clip.backbone import Loaded, Tower, load_backbone
from vs2_plugin.clip.sites import Site, embedding_from, finish, in_float32, reading
from vs2_plugin.data.images import leave_interruptions
from vs2_plugin.errors import DataError, HarnessError
from vs2_plugin.gallery.gallery import Gallery
from vs2_plugin.gallery.search import Search
from vs2_plugin.harness.autoload import DISABLE
from vs2_plugin.harness.model import SteeredCLIP
from vs2_plugin.method import NEIGHBOURS, Scalar
from vs2_plugin.modelstring import ModelString
from vs2_plugin.sae.topk import TopKSAE
from vs2_plugin.steering.context import Context, Task
from vs2_plugin.steering.neighbours import NeighbourSteering, PrototypeSteering
from vs2_plugin.sweep.grid import Point, outcome_key
from vs2_plugin.sweep.request import SweepRequest
from vs2_plugin.sweep.shared import Batch, Lookup, Remembered, RememberedSums, remember_codes
from vs2_plugin.sweep.tower import resumed
from vs2_plugin.text import reason_of

__all__ = ["Metrics", "evaluate"]

Metrics = dict[str, Scalar]


def evaluate(args: SweepRequest, backbone: str, points: Sequence[Point], quiet: bool) -> Iterator[tuple[str, Metrics]]:
    """Evaluate the plain model and all points of one backbone.

    Args:
        args: the settings, with clip_benchmark's names.
        backbone: the model's name.
        points: model strings of that backbone.
        quiet: show no progress.

    Yields:
        The name of a model and its metrics, as soon as they are there; the plain model first.

    Raises:
        Vs2Error: something cannot be loaded.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    loaded = load_backbone(backbone, args.pretrained, args.model_cache_dir, device)
    data = _Data(args, backbone, loaded)
    parts = _Parts(loaded, args.pretrained, data.task)
    models = {point.model: _SweptCLIP(point.spec, parts) for point in points}
    groups: dict[tuple, list[Point]] = {}
    for point in points:
        groups.setdefault(outcome_key(point.spec), []).append(point)
    evaluated = [models[group[0].model] for group in groups.values()]

    with _harness() as harness, tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "classifier.pt"
        templates = data.task.templates
        bar = tqdm(data.task.classes, "classes", disable=quiet or None, leave=False)
        classifier = harness.zero_shot_classifier(loaded.model, loaded.tokenizer, bar, templates, device, args.amp)
        torch.save(classifier, file)

        def measure(model: Any, loader: Any) -> Metrics:
            return harness.evaluate(
                model, loader, None, data.task.classes, templates, device, amp=args.amp, load_clfs=[file]
            )

        for model in evaluated:
            model.set_classifier(classifier, quiet)
        first_pass = _FirstPass(loaded.model, evaluated)
        yield backbone, measure(first_pass, _Showing(data.loader, first_pass, quiet))

        replay = _Replay(data.loader.dataset, first_pass.batches)
        bar = tqdm(groups.values(), "points", disable=quiet or None, leave=False)
        for group, model in zip(bar, evaluated, strict=True):
            metrics = measure(model, replay)
            for point in group:
                yield point.model, _metrics_of(models[point.model], model, metrics)


def _metrics_of(point: _SweptCLIP, evaluated: _SweptCLIP, metrics: Metrics) -> Metrics:
    """The metrics of a point that come to the same features as the one that was evaluated."""
    gone = evaluated.declared.keys() - point.declared.keys()
    own = {name: value for name, value in point.declared.items() if evaluated.declared.get(name) != value}
    return {name: value for name, value in metrics.items() if name not in gone} | own


@contextmanager
def _harness() -> Iterator[Any]:
    """clip_benchmark's zero-shot classification, without its progress bars."""
    from clip_benchmark.metrics import zeroshot_classification as module

    if not hasattr(module.evaluate, "__wrapped__"):
        raise HarnessError(f"clip_benchmark does not know the steered models; is {DISABLE} set? See: vs2 doctor")
    bars, module.tqdm = module.tqdm, lambda items: items
    try:
        yield module
    finally:
        module.tqdm = bars


class _Data:
    """The split under evaluation, opened as clip_benchmark's ``cli.run`` does."""

    def __init__(self, args: SweepRequest, backbone: str, loaded: Loaded) -> None:
        from clip_benchmark.datasets.builder import build_dataset, get_dataset_collate_fn

        name = args.dataset.removeprefix("wds/")
        if "nllb-clip" in backbone:
            from clip_benchmark.models.nllb_clip import set_language

            set_language(loaded.tokenizer, args.language)
        try:
            root = args.dataset_root.format(dataset=name, dataset_cleaned=name.replace("/", "-"))
            dataset = build_dataset(
                dataset_name=args.dataset, root=root, transform=loaded.transform, split=args.split,
                annotation_file="", download=True, language=args.language, task=args.task,
                custom_template_file=args.custom_template_file, custom_classname_file=args.custom_classname_file,
                wds_cache_dir=args.wds_cache_dir,
            )  # fmt: skip
        except (Exception, SystemExit) as error:  # a download, a missing file or package: anything
            raise DataError(
                f"clip_benchmark could not build the split {args.split!r} of {args.dataset!r} in "
                f"{args.dataset_root!r}: {reason_of(error)}"
            ) from error
        classes, templates = (getattr(dataset, name, None) for name in ("classes", "templates"))
        if classes is None or templates is None:
            raise DataError(f"{args.dataset} has no classes and templates; a sweep needs a data set for classification")
        #: What the methods are told of it.
        self.task = Task(args.dataset, root, args.split, classes, templates)
        if args.dataset.startswith("wds/"):
            batches, how = dataset.batched(args.batch_size), {"batch_size": None}
        else:
            batches, how = dataset, {"batch_size": args.batch_size, "collate_fn": get_dataset_collate_fn(args.dataset)}
        self.loader = DataLoader(
            batches, shuffle=False, num_workers=args.num_workers, worker_init_fn=leave_interruptions, **how
        )


class _Parts:
    """What the points are put together from. Each part is opened once."""

    def __init__(self, loaded: Loaded, pretrained: str, task: Task) -> None:
        self.loaded, self.task, self._pretrained = loaded, task, pretrained
        self.tower = Tower.of(loaded.model, loaded.transform)
        self._store = Store.default()
        self._opened: dict[tuple, Any] = {}

    def once(self, key: tuple, make: Callable[[], Any]) -> Any:
        """What ``make`` makes, made once for each key."""
        if key not in self._opened:
            self._opened[key] = make()
        return self._opened[key]

    def checkpoint(self, spec: ModelString) -> Checkpoint | None:
        """The checkpoint of a model string, if its method needs one."""
        if not spec.method.needs_checkpoint:
            return None
        name = spec.checkpoint or checkpoint_name(spec.backbone, self._pretrained, self.task.dataset)
        return self.once(("checkpoint", name), lambda: self._store.find(name))


class _SweptCLIP(SteeredCLIP):
    """A point: a steered model that is shown a :class:`Batch` in place of images. It is evaluated at most once."""

    def __init__(self, spec: ModelString, parts: _Parts) -> None:
        super().__init__(spec, parts.loaded, lambda task: parts.checkpoint(spec), parts.tower)
        self._parts = parts
        self._steered = self._prepare(parts.task)
        #: What the results say of it whatever the images.
        self.declared = self.vs2_facts()

    @property
    def site(self) -> Site:
        """Where the tower is steered first."""
        return self._steered[0][0]

    @property
    def needs_tower(self) -> bool:
        """Whether it steers before the tower's end, so that blocks are to be run again."""
        return self._two_passes

    def look(self, batch: Batch, images: Tensor, plain: Tensor) -> None:
        """Find the neighbours of a batch, whose plain embedding ``[batch, e]`` is given, if the method needs them."""
        if self.spec.method.gallery == "neighbours":
            model, site = self.model, self.site
            end = not self.needs_tower
            self._retriever.look(
                batch, images, lambda: embedding_from(model, site, batch.activation(site)) if end else plain
            )

    def run_tower(self, batch: Batch, images: Tensor, output: Tensor | tuple) -> None:
        """Keep the features of a batch, from what the module of :attr:`site` put out in the plain tower."""
        self._attach(self._steered)
        try:
            with self._asked(batch, batch.targets), resumed(self.model, self.site, output):
                batch.features[self] = self.model.encode_image(images)
        finally:
            self._detach()

    def encode_image(self, batch: Batch) -> Tensor:
        """The steered image embedding ``[batch, embed_dim]``."""
        if self in batch.features:
            return batch.features.pop(self)
        [(site, steering)] = self._steered
        with self._asked(batch, self._targets):
            steered = in_float32(steering, batch.activation(site))
        return finish(self.model, site, steered.to(batch.dtype(site)))

    def reset_statistics(self) -> None:
        """Nothing: what was seen in the first pass counts, and there is only one evaluation."""

    @contextmanager
    def _asked(self, batch: Batch, targets: Tensor | None) -> Iterator[None]:
        """Within the ``with`` block, the retriever is asked about the batch."""
        if self._retriever is None:
            yield
            return
        self._retriever.begin(batch, targets)
        try:
            yield
        finally:
            self._retriever.end()

    # -- the parts that points share

    def _once(self, *key: Any, make: Callable[[], Any]) -> Any:
        return self._parts.once((*key, self.checkpoint.folder), make)

    def _load_sae(self, facts: SiteFacts) -> tuple[TopKSAE, Tensor]:
        load = super()._load_sae

        def make():
            sae, mean = load(facts)
            return remember_codes(sae), mean

        return self._once("sae", facts.folder, make=make)

    def _open_retriever(self) -> Lookup | None:
        if self.spec.method.gallery == "none":
            return None
        make, options = super()._open_retriever, self.spec.options
        asked = [options.get(option.name) for option in NEIGHBOURS]
        # The plain embedding is had in another way where steering begins elsewhere.
        where = self._sites()[0][0]
        return self._once(self.spec.method.gallery, *asked, where, make=lambda: Lookup(make()))

    def _load_encoder(self, name: str, facts: Mapping[str, Any]) -> Remembered:
        make = super()._load_encoder
        return self._once("encoder", name, make=lambda: Remembered(make(name, facts)))

    def _open_search(self, name: str, gallery: Gallery) -> Search:
        make = super()._open_search
        return self._once("search", name, self.spec.options["search"], make=lambda: make(name, gallery))

    def _build(self, context: Context, options: Mapping[str, Scalar | None]) -> Callable[[Tensor], Tensor]:
        steering = super()._build(context, options)
        for kind, name in ((NeighbourSteering, "directions"), (PrototypeSteering, "codes")):
            if isinstance(steering, kind):
                self._share_directions(steering, name, context.site)
        return steering

    def _share_directions(self, steering: Any, name: str, site: str) -> None:
        """Let a steering along a gallery's codes or activations use those of the first point that has them."""
        own = getattr(steering, name)

        def make():
            own.combine = RememberedSums(own.combine)
            return own

        setattr(steering, name, self._once(type(own), site, self.spec.method.sae, make=make))


class _FirstPass:
    """The plain model, whose activations are kept while clip_benchmark evaluates it."""

    def __init__(self, model: torch.nn.Module, points: Sequence[_SweptCLIP]) -> None:
        self._model, self._points = model, points
        self._sites = {point.site for point in points}
        self._ends = {point.site for point in points if not point.needs_tower}
        #: What was seen.
        self.batches: list[Batch] = []
        #: The true classes of the batch at hand.
        self.targets: Tensor | None = None

    def encode_image(self, images: Tensor) -> Tensor:
        """The plain image embedding ``[batch, embed_dim]``."""
        with reading(self._model, self._sites, whole=True) as outputs:
            plain = self._model.encode_image(images)
        batch = Batch(self.targets)
        self.batches.append(batch)
        for site in self._ends:
            batch.keep(site, site.read(outputs[site]))
        exact = all(
            torch.equal(finish(self._model, site, batch.activation(site).to(batch.dtype(site))), plain)
            for site in self._ends
        )
        for point in self._points:
            point.look(batch, images, plain)
            if point.needs_tower or not exact:
                point.run_tower(batch, images, outputs[point.site])
        return plain


class _Showing:
    """The data loader of the first pass, which shows how far it is and tells the true classes."""

    def __init__(self, loader: DataLoader, model: _FirstPass, quiet: bool) -> None:
        self.dataset, self._loader, self._model, self._quiet = loader.dataset, loader, model, quiet

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        try:
            total = len(self._loader)
        except TypeError:  # shards
            total = None
        for images, targets in tqdm(
            self._loader, "encoding", total, unit="batch", disable=self._quiet or None, leave=False
        ):
            self._model.targets = targets
            yield images, targets


class _Replay:
    """A data loader of batches that were seen."""

    def __init__(self, dataset: Any, batches: Sequence[Batch]) -> None:
        self.dataset, self._batches = dataset, batches

    def __iter__(self) -> Iterator[tuple[Batch, Tensor]]:
        return ((batch, batch.targets) for batch in self._batches)
