"""Words on a checkpoint that is missing, and the command that trains it."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Sequence

from vs2_plugin.checkpoint.store import Store
from vs2_plugin.clip.backbone import ignores_pretrained
from vs2_plugin.data.splits import without_training_split
from vs2_plugin.errors import CheckpointNotFound
from vs2_plugin.host import Evaluation, unknown_data_set
from vs2_plugin.modelstring import ModelString

__all__ = ["missing_checkpoint"]


def missing_checkpoint(missing: Sequence[tuple[ModelString, Evaluation]], store: Store) -> CheckpointNotFound:
    """Return the error that names the missing checkpoints and the commands that train them."""
    sentences, commands = [], []
    for model, run in missing:
        if model.checkpoint:
            advice = f" (as an option: @{model.checkpoint}=VALUE)" if model.method.option(model.checkpoint) else ""
            sentences.append(f"{store.without(model.checkpoint)}, and no folder of that name holds one{advice}")
        else:
            weights = "" if ignores_pretrained(model.backbone) else f" ({run.pretrained or 'random weights'})"
            name = store.name_for(model.backbone, run.pretrained, run.dataset)
            sentences.append(
                f"no SAE checkpoint for {model.backbone}{weights} on {run.dataset} in the store {store.root}"
                f"{_similar(name, model, store)}"
            )
            unknown = unknown_data_set(run.dataset)
            if unknown is None:
                commands.append(_train_command(model, run, store))
            else:
                sentences.append(unknown)
    hint = f"; train it with: {' && '.join(dict.fromkeys(commands))}" if commands else ""
    return CheckpointNotFound("; ".join(dict.fromkeys(sentences)) + hint)


def _similar(name: str, model: ModelString, store: Store) -> str:
    """Return words on checkpoints of a similar name: those of several seeds or settings, else the most similar one."""
    names = store.names()
    variants = [other for other in names if other.startswith(f"{name}-")]
    if not variants:
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.8)
        return "".join(f" (there is {similar!r})" for similar in close)
    more = f" and {len(variants) - 3} more" if len(variants) > 3 else ""
    return (
        f" (there is {', '.join(map(repr, variants[:3]))}{more}; name one: {model.name}:{model.backbone}@{variants[0]})"
    )


def _train_command(model: ModelString, run: Evaluation, store: Store) -> str:
    """Return the ``vs2-train-sae`` command that makes, in a store, the checkpoint that an evaluation needs."""
    method, options, tagged = model.method, model.options, not ignores_pretrained(model.backbone)
    words = ["vs2-train-sae", "--model", model.backbone]
    if tagged:
        words += ["--pretrained", run.pretrained]
    words += _data_words(run)
    for flag, folder in (("--model_cache_dir", run.model_cache_dir), ("--wds_cache_dir", run.wds_cache_dir)):
        words += [] if folder is None else [flag, folder]
    if tagged and not run.pretrained and run.seed:
        words += ["--seed", str(run.seed)]  # random weights: the same seed gives the same tower
    if method.sae == "pass":
        words += ["--pass_weight", "0.8"]
    if method.gallery == "neighbours":
        words += ["--gallery_labels"] if method.labels_used(options) == "oracle" else []
        words += [] if options["encoder"] == "clip" else ["--retrieval_encoder", str(options["encoder"])]
    if not run.amp:
        words.append("--no_amp")
    return shlex.join([*words, *store.words])


def _data_words(run: Evaluation) -> list[str]:
    """Return the words of a training command that name the data."""
    data = run.data_set
    words = data.words if data.home else ["--dataset", run.dataset]
    words += ["--transductive"] if without_training_split(data.name, data.root) else []
    return words if data.home or run.dataset_root == "root" else [*words, "--dataset_root", run.dataset_root]
