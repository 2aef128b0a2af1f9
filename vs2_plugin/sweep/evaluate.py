"""Evaluates many steered models on one data set with one pass of its images through the plain tower.

Every number is computed by clip_benchmark's own ``evaluate``, as patched by ``harness.patches``: once for the plain
model, whose activations are kept, and once per point for a model that steers the kept activations. For each point that
steers before the tower's end, the rest of the tower is run while the batch is in memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from vs2_plugin.checkpoint.checkpoint import Checkpoint
from vs2_plugin.checkpoint.store import Store
from vs2_plugin.clip.backbone import Loaded, load_backbone
from vs2_plugin.clip.edits import editing, in_float32, outputs
from vs2_plugin.clip.sites import ClipModel, Output, Site, embedding_from, finish
from vs2_plugin.clip.tower import Tower
from vs2_plugin.data.evaluated import name_samples
from vs2_plugin.data.images import image_digest, place_of
from vs2_plugin.data.loading import leave_interruptions, read
from vs2_plugin.data.naming import DataSet
from vs2_plugin.errors import DataError, HarnessError, ModelStringError, PluginError
from vs2_plugin.files import json_digest
from vs2_plugin.harness.autoload import DISABLE
from vs2_plugin.host import build, zero_shot_classification
from vs2_plugin.method import Scalar
from vs2_plugin.model.parts import Parts, find_checkpoint
from vs2_plugin.model.place import Current, Place
from vs2_plugin.model.places import build_places
from vs2_plugin.model.readout import Readout
from vs2_plugin.modelstring import ModelString
from vs2_plugin.steering.batch import Batch
from vs2_plugin.steering.context import Task
from vs2_plugin.sweep.grid import Point, outcome_key
from vs2_plugin.sweep.request import PassRequest, SweepRequest

__all__ = ["Metrics", "OnePass", "Settings", "evaluate", "one_pass"]

Metrics = dict[str, Scalar]
#: What the results depend on besides the models: name in words -> digest, or name.
Settings = dict[str, str]


def evaluate(
    args: SweepRequest, backbone: str, points: Sequence[Point], quiet: bool, check: Callable[[Settings], None]
) -> Iterator[tuple[str, Metrics]]:
    """Evaluate the plain model and all points of one backbone.

    Args:
        args: the settings, with clip_benchmark's names.
        backbone: the model's name.
        points: points of the grids with that backbone.
        quiet: show no progress.
        check: called with what the results depend on, before the first image is encoded.

    Yields:
        The name of a model and its metrics, as soon as they are computed; the plain model first.

    Raises:
        Vs2Error: something cannot be loaded.
    """
    with one_pass(args, backbone, points, quiet) as images:
        check(images.settings)
        yield backbone, images.measure(None)
        for group in tqdm(images.groups, "points", disable=quiet or None, leave=False):
            metrics = images.measure(group[0])
            for model in group:
                yield model.name, _metrics_of(model, group[0], metrics)


class OnePass:
    """The images of one split, encoded once by the plain tower for many models."""

    def __init__(
        self,
        loader: DataLoader[Any],
        first: _FirstPass,
        groups: Sequence[Sequence[_SweptModel]],
        measure: Callable[[Any, Any], Metrics],
        classify: Callable[[Any, Any], tuple[Tensor, Tensor]],
        quiet: bool,
        settings: Settings,
    ) -> None:
        """``measure`` and ``classify`` are clip_benchmark's own functions of a model and a data loader."""
        #: The models, those that give the same features together; only the first of each group can be evaluated.
        self.groups = groups
        #: What the results depend on besides the models.
        self.settings = settings
        self._loader, self._first, self._quiet = loader, first, quiet
        self._measure, self._classify = measure, classify

    def measure(self, model: _SweptModel | None) -> Metrics:
        """Return the metrics of a model. The first call must be for the plain model, None."""
        return self._measure(*self._given(model))

    def classify(self, model: _SweptModel | None) -> tuple[Tensor, Tensor]:
        """Return a model's logits ``[images, classes]`` and the true classes ``[images]``. The first call must be for
        the plain model, None."""
        return self._classify(*self._given(model))

    @property
    def digests(self) -> list[int]:
        """The digest of each image, after the first call."""
        return [digest for seen in self._first.batches for digest in seen.digests or ()]

    def _given(self, model: _SweptModel | None) -> tuple[Any, Any]:
        if model is None:
            return self._first, _Showing(self._loader, self._first, self._quiet)
        return model, _Replay(self._loader.dataset, self._first.batches)


@contextmanager
def one_pass(
    args: PassRequest, backbone: str, points: Sequence[Point], quiet: bool, identify: bool = False
) -> Iterator[OnePass]:
    """Open a backbone, the data and the points of that backbone for evaluation within a ``with`` block. With
    ``identify``, :attr:`OnePass.digests` are known.

    Raises:
        Vs2Error: something cannot be loaded.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    loaded = load_backbone(backbone, args.pretrained, args.model_cache_dir, device)
    task, data_loader = _opened(args, backbone, loaded)
    shared = _Shared(loaded, args.pretrained, task)
    groups: dict[Hashable, list[_SweptModel]] = {}
    for point in points:
        groups.setdefault(outcome_key(point.spec), []).append(_SweptModel(point, shared))
    evaluated = [group[0] for group in groups.values()]
    with zero_shot_classification() as harness, tempfile.TemporaryDirectory() as folder:
        if not hasattr(harness.evaluate, "__wrapped__"):
            raise HarnessError(f"clip_benchmark does not know the steered models; is {DISABLE} set? See: vs2 doctor")
        file = Path(folder) / "classifier.pt"
        classes, templates = task.classes, task.templates
        names = tqdm(classes, "classes", disable=quiet or None, leave=False)
        classifier = harness.zero_shot_classifier(loaded.model, loaded.tokenizer, names, templates, device, args.amp)
        torch.save(classifier, file)
        for model in evaluated:
            model.set_classifier(classifier, quiet)

        def measure(model: Any, loader: Any) -> Metrics:
            metrics: Metrics = harness.evaluate(
                model, loader, None, classes, templates, device, amp=args.amp, load_clfs=[file]
            )
            return metrics

        def classify(model: Any, loader: Any) -> tuple[Tensor, Tensor]:
            logits, targets = harness.run_classification(model, classifier, loader, device, amp=args.amp)
            return logits, targets

        first = _FirstPass(loaded.model, evaluated, identify)
        settings = _settings(task, data_loader, args.amp)
        yield OnePass(data_loader, first, [*groups.values()], measure, classify, quiet, settings)


def _metrics_of(point: _SweptModel, evaluated: _SweptModel, metrics: Metrics) -> Metrics:
    """Return the metrics of a point from those of the ``evaluated`` point, which gives the same features."""
    gone = evaluated.declared.keys() - point.declared.keys()
    own = {name: value for name, value in point.declared.items() if evaluated.declared.get(name) != value}
    return {name: value for name, value in metrics.items() if name not in gone} | own


def _settings(task: Task, loader: DataLoader[Any], amp: bool) -> Settings:
    own = getattr(loader.dataset, "fingerprint", None)  # clip_benchmark finds others by their name
    return {
        "class names": json_digest(task.classes),
        "prompts": json_digest(task.templates),
        "images": "" if own is None else json_digest(own()),
        "precision": "autocast" if amp else "float32",
    }


def _opened(args: PassRequest, backbone: str, loaded: Loaded) -> tuple[Task, DataLoader[Any]]:
    """Open the split under evaluation as clip_benchmark's ``cli.run`` does, and return it with its description."""
    from clip_benchmark.datasets.builder import get_dataset_collate_fn

    if "nllb-clip" in backbone:
        from clip_benchmark.models.nllb_clip import set_language

        set_language(loaded.tokenizer, args.language)
    named = DataSet.of(args.dataset, args.dataset_root)
    dataset = build(
        named, args.split, transform=loaded.transform, annotation_file="", language=args.language,
        task=args.task, custom_template_file=args.custom_template_file,
        custom_classname_file=args.custom_classname_file, wds_cache_dir=args.wds_cache_dir,
    )  # fmt: skip
    shards = named.is_shards  # whose data sets make the batches themselves
    classes, templates = (getattr(dataset, name, None) for name in ("classes", "templates"))
    if classes is None or templates is None:
        raise DataError(f"{args.dataset} has no classes and templates; a sweep needs a data set for classification")
    dataset = name_samples(dataset) if shards else dataset
    loader: DataLoader[Any] = DataLoader(
        dataset.batched(args.batch_size) if shards else dataset,
        batch_size=None if shards else args.batch_size,
        collate_fn=None if shards else get_dataset_collate_fn(args.dataset),
        shuffle=False,
        num_workers=args.num_workers,
        worker_init_fn=leave_interruptions,
    )
    return Task(named.name, named.root, args.split, classes, templates, place_of(named, dataset)), loader


@contextmanager
def _resumed(model: ClipModel, site: Site, output: Output) -> Iterator[None]:
    """Start forward passes at ``site`` within a ``with`` block, with ``output`` as the output of its module.

    Blocks before it return their input unchanged. Hooks run as usual.
    """
    module = site.module(model)
    before = [] if site.block is None else model.visual.transformer.resblocks[: site.block]
    for block in before:
        block.forward = lambda x, *args, **kwargs: x
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        for replaced in (*before, module):
            del replaced.forward


class _Shared:
    """The model, data set and parts that the points of a sweep share."""

    def __init__(self, loaded: Loaded, pretrained: str, task: Task) -> None:
        self.model, self.task, self._pretrained = loaded.model, task, pretrained
        self.parts = Parts(loaded.model, loaded.sites, Tower.of(loaded.model, loaded.transform))
        self.current = Current()
        self._store = Store.default()

    def checkpoint(self, spec: ModelString) -> Checkpoint | None:
        """Return the checkpoint of a model string; None if its method needs none."""
        home = DataSet(self.task.dataset, self.task.root or "").home
        return self.parts.once(
            ("checkpoint", spec.needs_checkpoint, spec.checkpoint, spec.backbone),
            lambda: find_checkpoint(spec, self._store, self._pretrained, self.task.dataset, home),
        )


class _Seen:
    """One batch of the test split as the plain tower encoded it, on which points are evaluated."""

    def __init__(self, images: Tensor, targets: Tensor | None, plain: Tensor) -> None:
        """``plain``: the plain model's features ``[batch, embed_dim]``."""
        self.images: Tensor | None = images
        self.targets, self._plain = targets, plain
        #: Point -> its image features, if the tower had to be run for the point.
        self.features: dict[_SweptModel, Tensor] = {}
        #: Digests of the images, if a point's protocol is a stream, or the caller needs them.
        self.digests: list[int] | None = None
        #: The plain activation ``[batch, d]`` at each site at the tower's end, in float32, and its dtype in the tower.
        self.activations: dict[Site, tuple[Tensor, torch.dtype]] = {}
        self._batches: dict[Site, Batch] = {}

    def batch(self, model: ClipModel, site: Site) -> Batch:
        """Return the batch that is shared by the points that steer first at ``site``."""
        if site not in self._batches:
            batch = Batch(self.images, self.targets, embed=lambda: self._plain)
            if site in self.activations:  # the embedding as a steered model computes it
                x = self.activations[site][0]
                batch.embed = lambda: embedding_from(model, site, x)
            self._batches[site] = batch
        return self._batches[site]

    def forget_images(self) -> None:
        """Drop the images, and keep what was computed from them."""
        self.images = None
        for batch in self._batches.values():
            batch.images = None

    def to(self, device: str) -> _Seen:
        """Return the batch itself, as clip_benchmark moves each batch to the device."""
        return self


class _SweptModel:
    """The model of a point, which clip_benchmark evaluates at most once, on :class:`_Seen` in place of images."""

    def __init__(self, point: Point, shared: _Shared) -> None:
        spec = point.spec
        if spec.reading is not None and spec.reading.method.views:
            raise ModelStringError(
                f"model {str(spec)!r} looks at several views of each image, which is encoded once here; evaluate it "
                "by clip_benchmark eval"
            )
        self.name, self.spec, self._model, self._current = point.model, spec, shared.model, shared.current
        self.places = build_places(spec, shared.checkpoint(spec), shared.task, shared.parts, shared.current)
        #: Facts for the results that do not depend on the images.
        self.declared = self.places.results()

    @property
    def readout(self) -> Readout | None:
        """Method on logits, if there is one."""
        return self.places.readout

    @property
    def first(self) -> Place:
        """First place at which the tower is steered."""
        place: Place = self.places[0]
        return place

    def set_classifier(self, classifier: Tensor, quiet: bool = False) -> None:
        """See :class:`SteeredCLIP`, also for the other methods that the harness glue calls."""
        self.places.set_classifier(classifier, quiet)

    def vs2_facts(self) -> dict[str, Scalar]:
        return self.places.results()

    def set_targets(self, targets: Tensor | None) -> None:
        """Do nothing, since the batches hold their targets."""

    def reset_statistics(self) -> None:
        """Do nothing, since statistics come from the first pass, and there is only one evaluation."""

    def record_images(self, recording: bool, show: object = None) -> None:
        """Do nothing, since a sweep keeps no per-image results."""

    def look(self, seen: _Seen) -> None:
        """Look up the neighbours of a batch while its images are in memory, if the method needs neighbours."""
        retriever = self.places.retriever
        if retriever is not None and self.spec.method.gallery == "neighbours":
            batch = seen.batch(self._model, self.first.site)
            with torch.autocast(retriever.device.type, enabled=False):  # as when a model is steered
                retriever.neighbours(batch)
                retriever.classes(batch)

    def run_tower(self, seen: _Seen, images: Tensor, output: Output) -> None:
        """Compute and keep the features of a batch, from ``output``, of the first site's module in the plain tower."""
        with ExitStack() as stack, self._current.running(seen.batch(self._model, self.first.site)):
            for place in self.places:
                stack.enter_context(editing(self._model, place.site, place))
            stack.enter_context(_resumed(self._model, self.first.site, output))
            stack.enter_context(self._named())
            seen.features[self] = self._model.encode_image(images)

    def eval(self) -> _SweptModel:
        """Return the model itself, since clip_benchmark calls this on each model."""
        return self

    def encode_image(self, seen: _Seen) -> Tensor:
        """Return the steered image embeddings ``[batch, embed_dim]``."""
        if self in seen.features:
            return seen.features.pop(self)
        [place] = self.places
        x, dtype = seen.activations[place.site]
        batch = seen.batch(self._model, place.site)
        with self._named():
            steered = in_float32(lambda x: place.steer(x, batch), x)
        return finish(self._model, place.site, steered.to(dtype))

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Name the point in the error if its method fails within a ``with`` block, since a method may have many."""
        try:
            yield
        except PluginError as error:
            raise PluginError(f"model {self.name!r}: {error}") from error


class _FirstPass:
    """The plain model, whose activations are kept while clip_benchmark evaluates it."""

    def __init__(self, model: ClipModel, points: Sequence[_SweptModel], identify: bool) -> None:
        self._model, self._points = model, points
        self._sites = {point.first.site for point in points}
        self._identify = identify or any(point.spec.protocol == "stream" for point in points)
        self._ends = {point.first.site for point in points if not point.places.inside}
        #: The batches that were encoded.
        self.batches: list[_Seen] = []
        #: The true classes of the current batch.
        self.targets: Tensor | None = None

    def encode_image(self, images: Tensor) -> Tensor:
        """Return the plain image embeddings ``[batch, embed_dim]``, and keep what the points need of the batch."""
        with outputs(self._model, self._sites) as put_out:
            plain: Tensor = self._model.encode_image(images)
        seen = _Seen(images, self.targets, plain)
        if self._identify:
            seen.digests = [image_digest(image) for image in images]
        self.batches.append(seen)
        for site in self._ends:
            activation = site.read(put_out[site]).detach()
            seen.activations[site] = activation.to(torch.float32, copy=True), activation.dtype
        exact = all(
            torch.equal(finish(self._model, site, x.to(dtype)), plain) for site, (x, dtype) in seen.activations.items()
        )
        for point in self._points:
            point.look(seen)
            if point.places.inside or not exact:
                point.run_tower(seen, images, put_out[point.first.site])
        seen.forget_images()
        return plain


class _Showing:
    """The data loader of the first pass, which shows its progress and tells the model the true classes."""

    def __init__(self, loader: DataLoader[Any], model: _FirstPass, quiet: bool) -> None:
        self.dataset, self._loader, self._model, self._quiet = loader.dataset, loader, model, quiet

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        bar = tqdm(self._loader, "encoding", unit="batch", disable=self._quiet or None, leave=False)
        for images, targets in read(bar):
            self._model.targets = targets
            yield images, targets


class _Replay:
    """A data loader of the batches that the first pass has encoded."""

    def __init__(self, dataset: Any, batches: Sequence[_Seen]) -> None:
        self.dataset, self._batches = dataset, batches

    def __iter__(self) -> Iterator[tuple[_Seen, Tensor | None]]:
        return ((batch, batch.targets) for batch in self._batches)
