"""Checks every planned run before the first one starts, so that a mistake costs a second and not an evaluation."""

from __future__ import annotations

import errno
import logging
import os
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from vs2_plugin.checkpoint.store import Store
from vs2_plugin.clip.backbone import check_backbone, ignores_pretrained, require_weights, warn_about_quickgelu
from vs2_plugin.data.evaluated import CLASSIFICATION, fewer_workers, look
from vs2_plugin.data.naming import DataSet
from vs2_plugin.devices import emulates_bfloat16
from vs2_plugin.errors import CheckpointNotFound, DataError, HarnessError, ModelStringError, SettingError, Vs2Error
from vs2_plugin.harness.advice import missing_checkpoint
from vs2_plugin.host import Evaluation, build
from vs2_plugin.model.parts import find_checkpoint, require
from vs2_plugin.modelstring import GRAMMAR, ModelString, is_steered, parse
from vs2_plugin.names import TRANSFORMERS
from vs2_plugin.paths import PICTURES
from vs2_plugin.results.runs import read_run
from vs2_plugin.strength.prior import read_prior
from vs2_plugin.text import counted

__all__ = ["check", "check_outputs", "check_pairs", "data_sets"]

_LOG = logging.getLogger(__name__)
_EMULATED = (
    "this processor has no bfloat16 units, so autocast is emulated and slow; --no_amp evaluates in float32, which "
    "takes about a ninth of the time for a ViT-B-32"
)


def data_sets(names: Sequence[str] | str) -> Sequence[str] | str:
    """Return the values of ``--dataset``, tar files as ``file:NAME``: clip_benchmark takes every file for a list.

    Raises:
        DataError: a name is that of an image file.
    """
    if isinstance(names, str):
        return names
    for name in filter(os.path.isfile, names):
        if os.path.splitext(name)[1].lower() in PICTURES:
            raise DataError(f"--dataset {name!r} is an image; expected the folder of folders of images that it is in")
    return [f"file:{name}" if name.endswith(".tar") and os.path.isfile(name) else name for name in names]


def check_pairs(names: Sequence[str] | str | None) -> None:
    """Refuse a steered model in ``--pretrained_model`` without weights. Raises ModelStringError."""
    for name in [names] if isinstance(names, str) else names or []:
        if is_steered(name) and not os.path.isfile(name) and name.count(",") != 1:
            example = name.split(",", 1)[0]
            raise ModelStringError(f"--pretrained_model {name!r}: expected MODEL,WEIGHTS, for example {example},openai")


def check(evaluations: Sequence[Evaluation]) -> dict[str, int]:
    """Check the evaluations of steered models that one command makes, and the data of all evaluations that read
    folders or listed shards.

    Returns:
        Data set -> the number of loader workers that its shards can serve, if that is fewer than asked for.

    Raises:
        Vs2Error: the first thing that would go wrong.
    """
    parsed = [(parse(run.model), run) for run in _steered(evaluations)]
    for flag, least in (("batch_size", 1), ("num_workers", 0)):
        lowest = min((getattr(run, flag) for _, run in parsed), default=least)
        if lowest < least:
            raise SettingError(f"--{flag} is {lowest}; expected a whole number, at least {least}")
    _check_plain(evaluations, beside_steered=bool(parsed))
    for model, run in parsed:
        check_backbone(model.backbone, run.pretrained)
    pending = [(model, run) for model, run in parsed if not _is_skipped(run)]
    _warn_of_earlier(parsed)
    for model, run in pending:
        warn_about_quickgelu(model.backbone, run.pretrained)
        _check_task(model, run)
        if model.labels_used == "oracle":
            _LOG.info("%s is an oracle: it reads labels; its accuracy is an upper bound", run.model)
    fewer = _look_at_data(evaluations)  # first, since a missing checkpoint is to be trained on it
    _check_checkpoints(pending)
    if emulates_bfloat16() and any(run.amp for _, run in pending):
        _LOG.info(_EMULATED)
    return fewer


def _warn_of_earlier(planned: Sequence[tuple[ModelString, Evaluation]]) -> None:
    """Warn of results that are kept, though they are of another SAE than the checkpoint's now."""
    for model, run in planned:
        if not _is_skipped(run) or run.skip_load:
            continue
        with suppress(Vs2Error):  # what is not evaluated need not be in order
            told = read_run(Path(run.output_file)).fact("checkpoint_digest")
            checkpoint = find_checkpoint(model, Store.default(), run.pretrained, run.dataset, run.data_set.home)
            if checkpoint is not None and told not in (None, checkpoint.digest[:16]):
                _LOG.warning(
                    "%s is kept (--skip_existing), though it holds results of another SAE than %s is now; remove it to "
                    "have it evaluated again", run.output_file, checkpoint.name,
                )  # fmt: skip


def _check_plain(evaluations: Sequence[Evaluation], beside_steered: bool) -> None:
    """Refuse a plain model that cannot be loaded, as far as that can be told: one of transformers, and beside a steered
    model also one of open_clip. Commands of open_clip's plain models alone are left to clip_benchmark."""
    for run in (run for run in evaluations if run.model_type == "open_clip" and not is_steered(run.model)):
        if run.model.startswith(TRANSFORMERS):
            check_backbone(run.model, run.pretrained)
            if not _is_skipped(run):
                require_weights(run.model, run.pretrained, run.model_cache_dir)
        elif beside_steered and not _is_skipped(run):
            check_backbone(run.model, run.pretrained)


def _check_checkpoints(pending: Sequence[tuple[ModelString, Evaluation]]) -> None:
    """Refuse models without weights or checkpoint, or whose checkpoint lacks something that the method needs."""
    store, missing = Store.default(), []
    for model, run in pending:
        try:
            checkpoint = find_checkpoint(model, store, run.pretrained, run.dataset, run.data_set.home)
            if checkpoint is not None:
                require(checkpoint, model)
        except CheckpointNotFound:
            missing.append((model, run))
        else:
            require_weights(model.backbone, run.pretrained, run.model_cache_dir)
    if missing:
        raise missing_checkpoint(missing, store)


def _steered(evaluations: Sequence[Evaluation]) -> Iterator[Evaluation]:
    """Yield the evaluations of steered models; refuse a model string in which the method was forgotten."""
    for run in (run for run in evaluations if run.model_type == "open_clip"):
        if is_steered(run.model):
            yield run
        elif ignores_pretrained(run.model) and "@" in run.model and not os.path.isdir(run.model.partition(":")[2]):
            raise ModelStringError(
                f"model {run.model!r}: it contains an '@', but no steering method comes before it; expected {GRAMMAR}, "
                f"for example vs2:{run.model}"
            )


def check_outputs(evaluations: Sequence[Evaluation]) -> None:
    """Refuse output files that could not be written, or to which several evaluations, some of them ours, write.

    Raises:
        ModelStringError: a model string cannot be read.
        HarnessError: an output file is refused.
    """
    for run in _steered(evaluations):
        parse(run.model)
        _check_output(run)
    files: dict[str, Evaluation] = {}
    for run in evaluations if any(map(_is_ours, evaluations)) else ():
        other = files.setdefault(run.output_file, run)
        if other != run and (_is_ours(run) or _is_ours(other)):
            fields = ("model", "pretrained_full_path", "dataset", "language", "task")
            differ = other.dataset != run.dataset
            one, two = (f"{each.model} on {each.dataset}" if differ else each.model for each in (other, run))
            raise HarnessError(
                f"--output {run.output!r} puts the results of {one} and of {two} into one file, "
                f"{run.output_file!r}, and only the last would be kept; expected a name that contains what differs, "
                f"out of {', '.join(f'{{{name}}}' for name in fields)}"
            )


def _is_ours(run: Evaluation) -> bool:
    """Return whether an evaluation is of a steered model, or of data that this package reads."""
    return is_steered(run.model) or bool(run.data_set.home)


def _is_skipped(run: Evaluation) -> bool:
    return run.skip_load or (run.skip_existing and os.path.exists(run.output_file))


def _check_task(model: ModelString, run: Evaluation) -> None:
    """Refuse a task that the method cannot be evaluated in."""
    task, method, options = run.own_task, model.method, model.options
    if task == "captioning":
        raise HarnessError(
            f"{run.model}: captions are written from the tokens of the image tower, which steering leaves alone; "
            f"evaluate the plain model: --model {shlex.quote(model.backbone)}"
        )
    automatic = method.automatic(options)
    if model.needs_classes and task != "zeroshot_classification":
        chosen = "".join(f"@{option.name}=auto" for option in automatic)
        how = "" if method.classes or model.outer else f" with {chosen or '@labels=pseudo'}"
        raise HarnessError(
            f"{run.model}: {model.name}{how} needs classes, but {task} has none; expected the task "
            "zeroshot_classification"
        )
    if automatic and options["prior"] is not None:
        read_prior(str(options["prior"]))
    if task == "linear_probe":
        _check_probe(model, run)


def _check_probe(model: ModelString, run: Evaluation) -> None:
    """Refuse a linear probe that clip_benchmark could not run."""
    if model.method.gallery != "none":
        raise HarnessError(
            f"{run.model}: a linear probe encodes images in several copies of the model, and {model.method.name} looks "
            "up the neighbours of one batch at a time; expected another task, or a method without a gallery"
        )
    if not torch.cuda.is_available():
        raise HarnessError(f"{run.model}: clip_benchmark's linear probe needs a CUDA device, but there is none")


def _check_output(run: Evaluation) -> None:
    """Refuse an output file that could not be written once the evaluation is over, without touching it."""
    output = run.output_file
    folder, name = os.path.split(output)
    if os.path.isdir(output) or not name:
        example = os.path.join(run.output, os.path.basename(Evaluation.output))
        raise HarnessError(f"--output {output!r} is a folder; expected a file: --output {shlex.quote(example)}")
    if folder and not os.path.isdir(folder):
        raise HarnessError(
            f"the results could not be written to {output!r}: no folder {folder!r}; make it with: mkdir -p "
            f"{shlex.quote(folder)}"
        )
    try:
        with suppress(FileNotFoundError):
            os.stat(output)  # fails if the name is too long
            if not os.access(output, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        tempfile.TemporaryFile(dir=folder or ".").close()
    except OSError as error:
        raise HarnessError(
            f"the results could not be written to {output!r}: {error.strerror}; give another --output"
        ) from None


def _look_at_data(runs: Sequence[Evaluation]) -> dict[str, int]:
    """Check the folders and shards that are to be evaluated, once for each task, and return what :func:`check` does.
    Stock data sets of plain models are not checked."""
    fewer: dict[str, int] = {}
    planned = [(run.data_set, run) for run in runs if not _is_skipped(run) and _is_ours(run)]
    for data, run in {(data, run.own_task): (data, run) for data, run in planned}.values():
        if data.is_folder:
            _look_at_folder(data, run)
        if not data.is_shards:
            continue
        if data.is_listed:
            build(data, run.split, **_custom_files(run))
            _refuse_probe(run, f"{data.root} is one list of shards")
        counts = look(
            data.root,
            run.split,
            run.own_task,
            names=run.custom_classname_file is None,
            templates=run.custom_template_file is None and not data.is_listed,
        )
        number = run.num_workers if counts is None else fewer_workers(counts, run.num_workers)
        if number < run.num_workers:
            fewer[run.dataset] = min(number, fewer.get(run.dataset, number))
            _LOG.info(
                "%s is read by %s, and not %d: every worker needs shards with images of its own, and there are %d",
                run.dataset, counted(number, "loader worker"), run.num_workers, sum(map(bool, counts or ())),
            )  # fmt: skip
    return fewer


def _look_at_folder(named: DataSet, run: Evaluation) -> None:
    """Refuse a folder of images that is not suitable for the evaluation."""
    if run.own_task not in (CLASSIFICATION, "linear_probe"):
        raise HarnessError(f"{named.root}: a folder of images has classes, but nothing for the task {run.own_task}")
    images = build(named, run.split, **_custom_files(run))
    _LOG.info("%s", images.about)
    if images.folder == named.home:
        _refuse_probe(run, f"{named.root} has no folders train/ and test/")


def _refuse_probe(run: Evaluation, why: str) -> None:
    """Refuse a linear probe on images without a training split."""
    if run.own_task == "linear_probe":
        raise HarnessError(f"{why}, so a linear probe would be trained on the images that it is evaluated on")


def _custom_files(run: Evaluation) -> dict[str, Any]:
    return {"custom_classname_file": run.custom_classname_file, "custom_template_file": run.custom_template_file}
