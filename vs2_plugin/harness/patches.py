"""Patches of clip_benchmark, so that it knows the steered models. ``autoload`` asks for them module by module.

Only these are changed:

- ``models.TYPE2FUNC`` and ``models.MODEL_TYPES``, in place: the open_clip loader sees steered names and those of
  models of transformers, and each method is a model type of its own;
- ``datasets.builder.build_dataset``: opens folders of images and listed shards; tells a model loaded before it which
  data set it is evaluated on; shards name the sample that cannot be read;
- ``metrics.*.evaluate``: a steered model's facts are added to the metrics, and text embeddings are cached;
- ``metrics.zeroshot_classification.run_classification``: a steered model is told the classifier, with a warning of
  equal classes, and an oracle the targets, and a method on logits gives the logits; where ``VS2_PER_IMAGE`` asks for
  it, the images of any model are recorded;
- ``cli.main_eval`` and ``cli.run``: everything is checked before the first model is loaded, this package's errors end
  the command with one line on stderr and exit code 2, results of steered models get a digest of their own, and a
  results file of any model that could not be written whole is removed.

A model that is not steered passes through all patches unchanged, except for what clip_benchmark itself does not have:
models of transformers, and as data sets folders of images and listed shards. In one command with a steered model, its
name and weights are checked before anything is loaded, and it reads the same data in the same way: by as many loader
workers as the shards can serve, and with the same message for a sample that cannot be read. It is loaded and encodes
texts as usual; later steered models of its backbone reuse both.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vs2_plugin.data.loading import read
from vs2_plugin.data.naming import DataSet
from vs2_plugin.errors import DataError, HarnessError, Vs2Error, is_interruption
from vs2_plugin.files import json_digest, without_part
from vs2_plugin.messages import complain
from vs2_plugin.names import TRANSFORMERS, file_stem, is_steered, split, weights_tag, with_method
from vs2_plugin.paths import listed_once
from vs2_plugin.plugins import registry
from vs2_plugin.text import said_by, sentence_of

if TYPE_CHECKING:
    from torch import Tensor

    from vs2_plugin.harness.recorder import Recorder
    from vs2_plugin.harness.shared import Shared
    from vs2_plugin.model.steered import SteeredCLIP

__all__ = ["PER_IMAGE", "SUPPORTED", "patch"]

SUPPORTED = "1.6"
#: The environment variable that asks for per-image results.
PER_IMAGE = "VS2_PER_IMAGE"

#: Records the current run for per-image results; None if they were not asked for.
_recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


@dataclass(frozen=True)
class _Command:
    """State of a command with a steered model, or with shards that serve fewer loader workers."""

    fewer_workers: dict[str, int]
    """Data set -> number of loader workers, if its shards cannot serve as many as asked for."""
    shared: Shared
    compared: set[tuple[str, str]] = field(default_factory=set)
    """Data set and backbone, where the embeddings of the classes have been compared with each other."""


#: The command that is running; None if it has no such state.
_command: ContextVar[_Command | None] = ContextVar("command", default=None)


def patch(module: ModuleType) -> None:
    """Patch a freshly imported module of clip_benchmark.

    Raises:
        HarnessError: the module lacks something that is to be patched.
    """
    patches = {
        "clip_benchmark.models": _patch_models,
        "clip_benchmark.datasets.builder": _patch_builder,
        "clip_benchmark.cli": _patch_cli,
    }
    try:
        patches.get(module.__name__, _patch_metrics)(module)
    except AttributeError as error:
        raise HarnessError(f"this clip_benchmark differs from the supported {SUPPORTED}.x: {error}") from error


def _signature(function: Callable[..., Any], *needed: str) -> inspect.Signature:
    """Return the signature of ``function``. Raises AttributeError if a needed parameter is missing."""
    signature = inspect.signature(function)
    for name in needed:
        if name not in signature.parameters:
            raise AttributeError(f"{function.__module__}.{function.__name__} has no parameter {name!r}")
    return signature


def _patch_models(module: Any) -> None:
    stock = module.TYPE2FUNC["open_clip"]
    signature = _signature(stock, "model_name", "pretrained", "cache_dir", "device")
    if not isinstance(module.MODEL_TYPES, list):
        raise AttributeError("MODEL_TYPES is not a list")
    plugins = registry()
    for label, problem in plugins.broken.items():
        complain(f"vs2_plugin: plugin {label} failed to load, its methods are not available: {problem}")

    def loader_of(method: str | None) -> Callable[..., Any]:
        @functools.wraps(stock)
        def load(*args: Any, **kwargs: Any) -> Any:
            arguments = signature.bind(*args, **kwargs)
            arguments.apply_defaults()
            values = arguments.arguments
            name = values["model_name"] if method is None else with_method(method, values["model_name"])
            command, others = _command.get(), (values["pretrained"], values["cache_dir"], values["device"])
            if is_steered(name):
                from vs2_plugin.harness import loader

                return loader.load(name, *others, shared=None if command is None else command.shared)
            load_plain = functools.partial(stock, *args, **kwargs)
            if name.startswith(TRANSFORMERS):
                from vs2_plugin.clip.hf import load_library

                load_plain = functools.partial(load_library, name, *others)
            return load_plain() if command is None else command.shared.load(load_plain, name, *others)

        return load

    module.TYPE2FUNC["open_clip"] = loader_of(None)
    for method in (*plugins.names, *plugins.conflicts):
        if method not in module.TYPE2FUNC:
            module.TYPE2FUNC[method] = loader_of(method)
            module.MODEL_TYPES.append(method)


def _patch_builder(module: Any) -> None:
    stock = module.build_dataset
    signature = _signature(stock, "dataset_name", "root", "split")

    @functools.wraps(stock)
    def build_dataset(*args: Any, **kwargs: Any) -> Any:
        loader = sys.modules.get("vs2_plugin.harness.loader")
        waiting = loader is not None and loader.is_waiting()  # a steered model was loaded before
        arguments = signature.bind(*args, **kwargs)
        arguments.apply_defaults()
        name, root, split = (arguments.arguments.pop(key) for key in ("dataset_name", "root", "split"))
        own = DataSet(name, root).home != ""
        if not own and not waiting and _command.get() is None:
            return _built_by_stock(stock, name, args, kwargs)
        from vs2_plugin import host

        try:
            if own:
                dataset = host.build(DataSet(name, root), split, **arguments.arguments)
            else:
                host.require_texts(**arguments.arguments)
                dataset = host.with_texts(stock(*args, **kwargs), **arguments.arguments)
        except Vs2Error:
            raise
        except (Exception, SystemExit) as error:  # a failed download, a missing file, package or tool: any exception
            raise host.not_built(name, root, split, error) from error
        recorder = _recorder.get()
        if recorder is not None:
            recorder.see_data(dataset)
        if loader is not None and waiting:
            loader.bind_waiting(name, root, split, dataset)
        if not name.startswith("wds/"):
            return dataset
        from vs2_plugin.data.evaluated import name_samples

        return name_samples(dataset)

    module.build_dataset = build_dataset


def _built_by_stock(stock: Callable[..., Any], name: str, args: Any, kwargs: Any) -> Any:
    """Return the data set that ``stock`` builds. Raises DataError if ``name`` is a folder that was meant as a path."""
    try:
        return stock(*args, **kwargs)
    except ValueError:
        if not os.path.isdir(name):
            raise
        from vs2_plugin import host

        raise DataError(host.unknown_data_set(name) or f"{name!r} is a folder; expected {name}/") from None


def _patch_metrics(module: Any) -> None:
    stock = module.evaluate
    signature = _signature(stock, "model")

    @functools.wraps(stock)
    def evaluate(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        values = bound.arguments
        model, recorder, command = _steered(values["model"]), _recorder.get(), _command.get()
        if recorder is not None:
            recorder.classes = values.get("classnames")
        if command is not None and "tokenizer" in values:  # there are texts
            values["model"] = command.shared.with_texts(values["model"], steered=model is not None)
        if model is not None:
            model.reset_statistics()
        if "model_id" in values:
            values["model_id"] += _told_apart(model, values)
        metrics = stock(*bound.args, **bound.kwargs)
        if not isinstance(metrics, dict):
            return metrics
        if model is not None:
            facts = model.vs2_facts()
            if "model_id" in values:  # a linear probe encodes training images too, or reads features from its cache
                model.reset_statistics()
                facts = model.vs2_facts()
            unreported = {name for method, _ in model.spec.methods for name in method.unreported}
            metrics = {name: value for name, value in metrics.items() if name not in unreported} | facts
        return metrics if recorder is None else metrics | recorder.facts()

    module.evaluate = evaluate
    if module.__name__.endswith(".zeroshot_classification"):
        _patch_classification(module)


def _told_apart(model: SteeredCLIP | None, given: dict[str, Any]) -> str:
    """Return a suffix for the name under which the linear probe caches features, so that neither another checkpoint, a
    changed file of options, another root nor other images in a folder of the same name find them."""
    known: list[Any] = []
    if model is not None:
        root = None if model.places.task is None else model.places.task.root
        known = [model.vs2_facts(), root if root is None or "://" in root else os.path.abspath(root)]
    known += [_fingerprint(given.get(name)) for name in ("train_dataloader", "val_dataloader", "dataloader")]
    return "".join(f"-{json_digest(value)[:16]}" for value in known if value is not None)


def _fingerprint(loader: Any) -> Any:
    """Return what tells the images of a loader, or of a part of them, from others of the same name; None where
    clip_benchmark finds them by their name."""
    dataset = getattr(loader, "dataset", None)
    indices = getattr(dataset, "indices", None)
    if indices is not None:  # a part, by --val_proportion
        whole = _fingerprint(dataset)
        return None if whole is None else [whole, list(map(int, indices))]
    own = getattr(dataset, "fingerprint", None)
    return None if own is None else own()


def _steered(model: Any) -> SteeredCLIP | None:
    return model if hasattr(model, "vs2_facts") else None


def _patch_classification(module: Any) -> None:
    """Patch ``run_classification`` to tell steered models the classifier, before the first image is encoded, and
    oracles the targets; and to record the images, if asked to."""
    stock = module.run_classification
    signature = _signature(stock, "model", "classifier", "dataloader")

    @functools.wraps(stock)
    def run_classification(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        values = signature.bind(*args, **kwargs).arguments
        model, recorder = _steered(values["model"]), _recorder.get()
        if model is not None:
            model.set_classifier(values["classifier"])
            _compare_classes(model, values["classifier"])
            if recorder is not None:
                model.record_images(True, functools.partial(recorder.see_plain, values["classifier"]))
        if model is not None or recorder is not None:
            values["dataloader"] = _Telling(values["dataloader"], model, recorder)
        readout = None if model is None else model.readout
        if readout is not None:
            from vs2_plugin.model.readout import Read

            values["model"] = Read(model, readout)
        try:
            logits, target = stock(**values)
            logits = logits if readout is None else readout.replace(logits)
            if recorder is not None:
                recorder.finish(logits, target, {} if model is None else model.per_image())
        finally:
            if model is not None:
                model.set_targets(None)
                model.record_images(False)
        return logits, target

    module.run_classification = run_classification


def _compare_classes(model: SteeredCLIP, classifier: Tensor) -> None:
    """Warn of classes that a steered model cannot tell apart, once for a data set and a backbone of a command."""
    from vs2_plugin.model.classifier import warn_of_equals

    command, task = _command.get(), model.places.task
    if command is None or task is None or (task.dataset, model.spec.backbone) in command.compared:
        return
    command.compared.add((task.dataset, model.spec.backbone))
    if task.classes is not None and len(task.classes) == classifier.shape[-1]:  # --load_clfs may bring any classes
        warn_of_equals(task.classes, classifier)


class _Telling:
    """A data loader that tells a steered model the targets of each batch just before it hands out the images."""

    def __init__(self, dataloader: Any, model: SteeredCLIP | None, recorder: Recorder | None) -> None:
        self._dataloader, self._model, self._recorder = dataloader, model, recorder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataloader, name)

    def __len__(self) -> int:
        return len(self._dataloader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches: Iterator[tuple[Tensor, Tensor]] = read(self._dataloader)
        done = 0
        try:
            for images, target in batches if self._recorder is None else self._recorder.watch(batches):
                if self._model is not None:
                    self._model.set_targets(target)
                yield images, target
                done += len(target)
        except OSError as error:
            if error.errno is not None:  # of the system
                raise
            raise DataError(  # PIL does not say which picture is damaged
                f"cannot read an image of the split, number {done} or one of the batch after it, counted from 0: "
                f"{type(error).__name__}: {' '.join(said_by(error).split())}"
            ) from error


def _code_of(error: BaseException, steered: bool) -> int | None:
    """Print in one line how an exception ended a command, and return the exit code; None if clip_benchmark is to
    report it. With a ``steered`` model, errors of the system and interruptions are reported here too."""
    if isinstance(error, Vs2Error) or (steered and isinstance(error, OSError)):
        complain(f"vs2: error: {sentence_of(error)}")
        return 2
    if steered and is_interruption(error):
        complain("vs2: interrupted; finished results are kept, and --skip_existing skips them")
        return 130
    return None


def _patch_cli(module: Any) -> None:
    stock_main_eval, stock_run = module.main_eval, module.run

    @functools.wraps(stock_run)
    def run(args: Namespace) -> Any:
        return _run(stock_run, _with_workers(_as_read(args)))

    @functools.wraps(stock_main_eval)
    @listed_once()
    def main_eval(base: Namespace) -> Any:
        from vs2_plugin import messages
        from vs2_plugin.harness import preflight
        from vs2_plugin.host import Evaluation

        messages.show()
        steered, token = False, _command.set(None)
        try:
            base = copy(base)
            base.dataset = preflight.data_sets(base.dataset)
            preflight.check_pairs(base.pretrained_model)
            planned = planned_runs(base)
            steered = any(is_steered(args.model) for args in planned)
            evaluations = [Evaluation.of(args) for args in planned]
            preflight.check_outputs(evaluations)
            fewer = preflight.check(evaluations)
            if steered or fewer:
                from vs2_plugin.harness.shared import Shared

                _command.set(_Command(fewer, Shared()))
            return stock_main_eval(base)
        except (Vs2Error, OSError, KeyboardInterrupt, RuntimeError) as error:
            code = _code_of(error, steered)
            if code is None:
                raise
            raise SystemExit(code) from None
        finally:
            _command.reset(token)

    def planned_runs(base: Namespace) -> list[Namespace]:
        """Return the settings of each run of ``main_eval``, by its own expansion of models, files and data sets."""
        planned: list[Namespace] = []
        quiet = copy(base)
        quiet.verbose = False
        module.run = lambda args: planned.append(_as_read(args))
        try:
            stock_main_eval(quiet)
        except Vs2Error:
            raise
        except Exception:
            return planned  # clip_benchmark raises it again when it really runs
        finally:
            module.run = run
        return planned

    module.run, module.main_eval = run, main_eval


def _run(stock: Callable[[Namespace], Any], args: Namespace) -> Any:
    """Evaluate one model, and sign its results with a digest if it is steered or its images are recorded. Results of
    another split than ``test`` name it: clip_benchmark's do not."""
    from vs2_plugin.harness.recorder import Recorder
    from vs2_plugin.host import Evaluation
    from vs2_plugin.results.runs import forget_images, sign

    recorder = Recorder() if os.environ.get(PER_IMAGE, "") not in ("", "0") else None
    output = Path(Evaluation.of(args).output_file)
    skipped = args.skip_existing and output.exists()
    token = _recorder.set(recorder)
    try:
        with without_part(output):  # a full disk leaves an empty file, which --skip_existing would skip ever after
            result = stock(args)
    finally:
        _recorder.reset(token)
    if not skipped:
        facts = {} if args.split == "test" else {"vs2_split": args.split}
        if recorder is not None or is_steered(args.model) or facts:
            sign(output, **facts)
        forget_images(output)  # of an earlier run; this one may record none
        if recorder is not None:
            recorder.save(str(output))
    return result


def _with_workers(args: Namespace) -> Namespace:
    """Return the settings with as many loader workers as the data set's shards can serve."""
    command = _command.get()
    if command is not None and args.dataset in command.fewer_workers:
        args = copy(args)
        args.num_workers = command.fewer_workers[args.dataset]
    return args


def _as_read(args: Namespace) -> Namespace:
    """Return the settings of one evaluation as this package reads them, so that results name model and data."""
    args, plugins = copy(args), registry()
    if args.model_type in plugins.names or args.model_type in plugins.conflicts:  # --model_type vs2 --model X is vs2:X
        args.model, args.model_type = with_method(args.model_type, args.model), "open_clip"
    if args.dataset == "folder" or args.dataset.startswith("folder/") or DataSet.is_path(args.dataset):
        data = DataSet.of(args.dataset, args.dataset_root)
        args.dataset, args.dataset_root = data.name, data.template
    of_library = args.model_type == "open_clip" and split(args.model).backbone.startswith(TRANSFORMERS)
    if of_library or is_steered(args.model) or "/" in args.model:  # a file name cannot hold '/'
        args.output = args.output.replace("{model}", file_stem(args.model).replace("{", "{{").replace("}", "}}"))
    if of_library:  # to such a model, a weights tag means nothing
        args.pretrained = weights_tag(args.model, args.pretrained)
    return args
