"""Checks every planned run before the first one starts, so that a mistake costs a second and not an evaluation."""

from __future__ import annotations

import os
import re
import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence

from vs2_plugin.checkpoint.store import Store, checkpoint_name
from vs2_plugin.clip.backbone import check_backbone, ignores_pretrained, warn_about_quickgelu
from vs2_plugin.data.splits import without_training_split
from vs2_plugin.devices import emulates_bfloat16
from vs2_plugin.errors import CheckpointNotFound, HarnessError, ModelStringError
from vs2_plugin.modelstring import ModelString, is_steered, parse

__all__ = ["check", "missing_checkpoint", "output_file", "train_command"]


def check(base: Namespace, runs: Sequence[Namespace]) -> None:
    """Check the steered ones of ``runs``, which clip_benchmark expanded from its command line ``base``.

    Raises:
        Vs2Error: the first thing that would go wrong.
    """
    _check_pairs(base)
    steered = [args for args in runs if args.model_type == "open_clip" and is_steered(args.model)]
    parsed = [(args, parse(args.model)) for args in steered]
    store = Store.default()
    missing = []
    slow = False
    for args, model in parsed:
        check_backbone(model.backbone, args.pretrained)
        output = output_file(args)
        _check_output(args, output, alone=len({run.model for run in runs}) == 1)
        if args.skip_load or (args.skip_existing and os.path.exists(output)):
            continue
        slow = slow or getattr(args, "amp", False)
        warn_about_quickgelu(model.backbone, args.pretrained)
        _check_task(model, args)
        if model.method.labels_used(model.options) == "oracle":
            print(f"vs2: {args.model} is an oracle: it reads labels; its accuracy is an upper bound", file=sys.stderr)
        if model.method.needs_checkpoint:
            try:
                _find(model, args, store)
            except CheckpointNotFound:
                missing.append((model, args))
    if missing:
        raise missing_checkpoint(missing, store)
    if slow and emulates_bfloat16():
        print(
            "vs2: this processor has no bfloat16 units, so autocast is emulated and slow; --no_amp evaluates in "
            "float32, which takes about a ninth of the time for a ViT-B-32",
            file=sys.stderr,
        )


def _check_pairs(base: Namespace) -> None:
    names = base.pretrained_model or []
    for name in [names] if isinstance(names, str) else names:
        if is_steered(name) and not os.path.isfile(name) and name.count(",") != 1:
            example = name.split(",")[0]
            raise ModelStringError(f"--pretrained_model {name!r}: expected MODEL,WEIGHTS, for example {example},openai")


def output_file(args: Namespace) -> str:
    """The results file of a run, as clip_benchmark's ``cli.run`` makes its name."""
    name = args.dataset.removeprefix("wds/")
    is_file = os.path.isfile(args.pretrained)
    task = _task(args)
    values = {
        "model": args.model,
        "pretrained": os.path.basename(args.pretrained) if is_file else args.pretrained,
        "pretrained_full_path": args.pretrained.replace("/", "_") if is_file else args.pretrained,
        "task": task,
        "dataset": name.replace("/", "_"),
        "language": args.language,
    }
    try:
        return args.output.format(**values)
    except (KeyError, IndexError, ValueError) as error:
        fields = ", ".join(f"{{{name}}}" for name in values)
        raise HarnessError(f"--output {args.output!r} cannot be filled in ({error}); known fields: {fields}") from None


def _task(args: Namespace) -> str:
    if args.task != "auto":
        return args.task
    from clip_benchmark.datasets.builder import get_dataset_default_task

    return get_dataset_default_task(args.dataset.removeprefix("wds/"))


def _check_task(model: ModelString, args: Namespace) -> None:
    """Refuse a task in which the method has nothing to say."""
    task, name = _task(args), model.method.name
    if task == "captioning":
        raise HarnessError(
            f"{args.model}: captions are written from the tokens of the image tower, which steering leaves alone; "
            f"evaluate the plain model: --model {shlex.quote(model.backbone)}"
        )
    if model.method.needs_classes(model.options) and task != "zeroshot_classification":
        automatic = [f"@{option.name}=auto" for option in model.method.automatic(model.options)]
        how = "" if model.method.classes else f" with {''.join(automatic) or '@labels=pseudo'}"
        raise HarnessError(
            f"{args.model}: {name}{how} needs classes, and {task} has none; expected the task zeroshot_classification"
        )
    if model.method.automatic(model.options) and model.options["prior"] is not None:
        from vs2_plugin.harness.automatic import read_prior

        read_prior(model.options["prior"])
    if model.method.gallery != "none" and task == "linear_probe":
        raise HarnessError(
            f"{args.model}: a linear probe encodes images in several copies of the model, and {name} looks up the "
            "neighbours of one batch at a time; expected another task, or a method without a gallery"
        )
    if task == "linear_probe" and not _has_cuda():
        raise HarnessError(f"{args.model}: clip_benchmark's linear probe needs a CUDA device, and there is none")


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _check_output(args: Namespace, output: str, alone: bool) -> None:
    """Refuse an output file that could not be written once the evaluation is over."""
    folder = os.path.dirname(output)
    bad = "/" if "/" in args.model else ":" if os.name == "nt" else ""
    if "{model}" in args.output and bad and (bad == ":" or not os.path.isdir(folder)):
        mended = args.output.replace("{model}", re.sub(r"[^A-Za-z0-9.@=+-]+", "-", args.model))
        call = "" if alone else ", in a call of its own,"
        raise HarnessError(
            f"the model name {args.model!r} holds {bad!r}, so the results could not be written to "
            f"{output!r}; run it{call} with "
            f"--output {shlex.quote(mended)}"
        )
    if folder and not os.path.isdir(folder):
        raise HarnessError(
            f"the results could not be written to {output!r}: no folder {folder!r}; make it with: mkdir -p "
            f"{shlex.quote(folder)}"
        )


def _find(model: ModelString, args: Namespace, store: Store) -> None:
    found = store.find(model.checkpoint or checkpoint_name(model.backbone, args.pretrained, args.dataset))
    method, options = model.method, model.options
    if method.site == "checkpoint":
        found.select(options["blocks"], method.sae)
    if method.gallery == "images" or method.automatic(options):
        found.require_gallery()
    if method.gallery == "neighbours":
        found.require_gallery(method.labels_used(options) == "oracle", options["encoder"], options["n"])


def train_command(
    backbone: str,
    pretrained: str,
    dataset: str,
    args: Namespace | None = None,
    sae: str = "plain",
    labels: bool = False,
    encoder: str = "clip",
) -> str:
    """The ``vs2-train-sae`` command that makes the checkpoint of a backbone and a data set.

    Args:
        backbone: open_clip model name.
        pretrained: its weights.
        dataset: the data set.
        args: the evaluation's command line, whose flags are taken over.
        sae: ``plain``, or ``pass``.
        labels: whether the gallery shall hold the training labels.
        encoder: a retrieval encoder.
    """
    words = ["vs2-train-sae", "--model", backbone]
    if not ignores_pretrained(backbone):
        words += ["--pretrained", pretrained]
    words += ["--dataset", dataset]
    if without_training_split(dataset):
        words.append("--transductive")
    for flag, usual in (("dataset_root", "root"), ("model_cache_dir", None), ("wds_cache_dir", None)):
        value = getattr(args, flag, usual)
        if value != usual:
            words += [f"--{flag}", value]
    if not pretrained and getattr(args, "seed", 0) and not ignores_pretrained(backbone):
        words += ["--seed", str(args.seed)]  # random weights: the same seed gives the same tower
    if sae == "pass":
        words += ["--pass_weight", "0.8"]
    if labels:
        words.append("--gallery_labels")
    if encoder != "clip":
        words += ["--retrieval_encoder", encoder]
    if not getattr(args, "amp", True):
        words.append("--no_amp")
    return shlex.join(words)


def missing_checkpoint(missing: Sequence[tuple[ModelString, Namespace]], store: Store) -> CheckpointNotFound:
    """The error that names what is missing and the commands that make it."""
    sentences, commands = [], []
    for model, args in missing:
        if model.checkpoint:
            there = ", ".join(store.names()) or "none"
            sentence = (
                f"no SAE checkpoint {model.checkpoint!r} in the store {store.root} (there: {there}), and no such folder"
            )
            command = ""
        else:
            weights = "" if ignores_pretrained(model.backbone) else f" ({args.pretrained or 'random weights'})"
            sentence = f"no SAE checkpoint for {model.backbone}{weights} on {args.dataset} in the store {store.root}"
            method, options = model.method, model.options
            labels = method.gallery == "neighbours" and method.labels_used(options) == "oracle"
            encoder = options["encoder"] if method.gallery == "neighbours" else "clip"
            command = train_command(model.backbone, args.pretrained, args.dataset, args, method.sae, labels, encoder)
        if sentence not in sentences:
            sentences.append(sentence)
        if command and command not in commands:
            commands.append(command)
    hint = f"; train it with: {' && '.join(commands)}" if commands else ""
    return CheckpointNotFound("; ".join(sentences) + hint)
