"""Makes clip_benchmark know the steered models. Called by ``autoload`` when a module of it has been imported.

What is changed, and nothing else:

- ``models.TYPE2FUNC`` and ``models.MODEL_TYPES``, in place: the open_clip loader sees steered names, and each method
  is a model type of its own;
- ``datasets.builder.build_dataset``: tells a model loaded before it which data set it is evaluated on;
- ``metrics.*.evaluate``: a steered model's facts join the metrics;
- ``metrics.zeroshot_classification.run_classification``: a steered model learns the classifier, and an oracle the
  targets; where ``VS2_PER_IMAGE`` asks for it, the images of any model are recorded;
- ``cli.main_eval`` and ``cli.run``: everything is checked before the first model is loaded, and this package's
  errors end the command with one line on stderr and exit code 2.

A model that is not steered passes through all of them unchanged.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from copy import copy
from types import ModuleType
from typing import TYPE_CHECKING

from vs2_plugin.errors import DataError, HarnessError, Vs2Error
from vs2_plugin.names import is_steered, with_method
from vs2_plugin.plugins import registry
from vs2_plugin.text import reason_of

if TYPE_CHECKING:
    from vs2_plugin.harness.recorder import Recorder

__all__ = ["PER_IMAGE", "SUPPORTED", "patch"]

SUPPORTED = "1.6"
#: The environment variable that asks for per-image results.
PER_IMAGE = "VS2_PER_IMAGE"


def patch(module: ModuleType) -> None:
    """Patch a freshly imported module of clip_benchmark.

    Raises:
        HarnessError: it lacks what is to be patched.
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


def _patch_models(module: ModuleType) -> None:
    stock = module.TYPE2FUNC["open_clip"]
    if not isinstance(module.MODEL_TYPES, list):
        raise AttributeError("MODEL_TYPES is no list")
    known = registry()
    for label, problem in known.broken.items():
        print(f"vs2_plugin: plugin {label} failed to load, its methods are not available: {problem}", file=sys.stderr)

    @functools.wraps(stock)
    def load_open_clip(*args, **kwargs):
        arguments = inspect.signature(stock).bind(*args, **kwargs)
        name = arguments.arguments.get("model_name", "")
        return _load(name, arguments) if is_steered(name) else stock(*args, **kwargs)

    def loader_of(method: str):
        @functools.wraps(stock)
        def load_steered(*args, **kwargs):
            arguments = inspect.signature(stock).bind(*args, **kwargs)
            arguments.apply_defaults()
            return _load(with_method(method, arguments.arguments["model_name"]), arguments)

        return load_steered

    def _load(name: str, arguments: inspect.BoundArguments):
        from vs2_plugin.harness import loader

        arguments.apply_defaults()
        given = arguments.arguments
        return loader.load(name, given["pretrained"], given["cache_dir"], given["device"])

    module.TYPE2FUNC["open_clip"] = load_open_clip
    for name in (*known.names, *known.conflicts):
        if name not in module.TYPE2FUNC:
            module.TYPE2FUNC[name] = loader_of(name)
            module.MODEL_TYPES.append(name)


def _patch_builder(module: ModuleType) -> None:
    stock = module.build_dataset
    signature = inspect.signature(stock)
    for needed in ("dataset_name", "root", "split"):
        if needed not in signature.parameters:
            raise AttributeError(f"build_dataset has no parameter {needed!r}")

    @functools.wraps(stock)
    def build_dataset(*args, **kwargs):
        loader = sys.modules.get("vs2_plugin.harness.loader")
        if loader is None or not loader.is_waiting():  # no steered model was loaded before
            return stock(*args, **kwargs)
        arguments = signature.bind(*args, **kwargs)
        arguments.apply_defaults()
        name, root, split = (arguments.arguments[key] for key in ("dataset_name", "root", "split"))
        try:
            dataset = stock(*args, **kwargs)
        except Exception as error:  # a download, a missing file or package: anything
            raise DataError(
                f"clip_benchmark could not build the split {split!r} of {name!r} in {root!r}: {reason_of(error)}"
            ) from error
        loader.bind_waiting(name, root, split, dataset)
        return dataset

    module.build_dataset = build_dataset


def _patch_metrics(module: ModuleType) -> None:
    stock = module.evaluate
    signature = inspect.signature(stock)
    if "model" not in signature.parameters:
        raise AttributeError(f"{module.__name__}.evaluate has no parameter 'model'")

    @functools.wraps(stock)
    def evaluate(*args, **kwargs):
        arguments = signature.bind(*args, **kwargs)
        model = arguments.arguments["model"]
        if _recorder is not None:
            _recorder.classes = arguments.arguments.get("classnames")
        if not hasattr(model, "vs2_facts"):
            metrics = stock(*args, **kwargs)
            return metrics if _recorder is None else {**metrics, **_recorder.facts()}
        model.reset_statistics()
        if "model_id" in arguments.arguments:
            # The linear probe caches features under this name: another checkpoint must not find them.
            arguments.arguments["model_id"] += f"-{model.vs2_facts().get('vs2_checkpoint_digest', 'vs2')}"
        metrics = stock(*arguments.args, **arguments.kwargs)
        if not isinstance(metrics, dict):
            return metrics
        unreported = model.spec.method.unreported
        kept = {name: value for name, value in metrics.items() if name not in unreported}
        return {**kept, **model.vs2_facts(), **({} if _recorder is None else _recorder.facts())}

    module.evaluate = evaluate
    if module.__name__.endswith(".zeroshot_classification"):
        _patch_classification(module)


#: Records the run at hand for per-image results; None where nobody asked for them.
_recorder: Recorder | None = None


def _patch_classification(module: ModuleType) -> None:
    """Tell steered models the classifier, which exists before the first image is encoded, and oracles the targets.
    Record the images, if asked to."""
    stock = module.run_classification
    signature = inspect.signature(stock)
    for needed in ("model", "classifier", "dataloader"):
        if needed not in signature.parameters:
            raise AttributeError(f"run_classification has no parameter {needed!r}")

    @functools.wraps(stock)
    def run_classification(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        model = given["model"] if hasattr(given["model"], "vs2_facts") else None
        if model is not None:
            model.set_classifier(given["classifier"])
            if _recorder is not None:
                model.record_images(True, functools.partial(_recorder.see_plain, given["classifier"]))
        if model is not None or _recorder is not None:
            given["dataloader"] = _Telling(given["dataloader"], model)
        try:
            logits, target = stock(**given)
            if _recorder is not None:
                _recorder.finish(logits, target, {} if model is None else model.per_image())
        finally:
            if model is not None:
                model.set_targets(None)
                model.record_images(False)
        return logits, target

    module.run_classification = run_classification


class _Telling:
    """A data loader that tells a steered model the targets of each batch just before it hands out the images."""

    def __init__(self, dataloader, model) -> None:
        self._dataloader, self._model = dataloader, model

    def __getattr__(self, name: str):
        return getattr(self._dataloader, name)

    def __len__(self) -> int:
        return len(self._dataloader)

    def __iter__(self):
        for images, target in self._dataloader if _recorder is None else _recorder.watch(self._dataloader):
            if self._model is not None:
                self._model.set_targets(target)
            yield images, target


def _patch_cli(module: ModuleType) -> None:
    stock_main_eval, stock_run = module.main_eval, module.run

    @functools.wraps(stock_run)
    def run(args):
        global _recorder
        args = _as_model_string(args)
        if os.environ.get(PER_IMAGE, "") in ("", "0"):
            return stock_run(args)
        from vs2_plugin.harness import preflight, recorder

        _recorder = recorder.Recorder()
        try:
            done = stock_run(args)
            _recorder.save(preflight.output_file(args))
        finally:
            _recorder = None
        return done

    @functools.wraps(stock_main_eval)
    def main_eval(base):
        from vs2_plugin import messages
        from vs2_plugin.harness import preflight

        messages.show()
        try:
            preflight.check(base, _planned_runs(base))
            return stock_main_eval(base)
        except Vs2Error as error:
            print(f"vs2: error: {' '.join(str(error).split())}", file=sys.stderr)
            raise SystemExit(2) from None

    def _planned_runs(base) -> list:
        """What ``main_eval`` would run: its own expansion of models, files and data sets, with the runs recorded."""
        planned: list = []
        quiet = copy(base)
        quiet.verbose = False
        module.run = lambda args: planned.append(_as_model_string(args))
        try:
            stock_main_eval(quiet)
        except Exception:
            return planned  # clip_benchmark's own complaint comes when it runs for real
        finally:
            module.run = run
        return planned

    module.run, module.main_eval = run, main_eval


def _as_model_string(args):
    """``--model_type vs2 --model X`` as ``--model vs2:X``, so that results name the method."""
    known = registry()
    if args.model_type in known.names or args.model_type in known.conflicts:
        args = copy(args)
        args.model, args.model_type = with_method(args.model_type, args.model), "open_clip"
    return args
