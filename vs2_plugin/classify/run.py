"""Runs a classification from its plan to its table: trains the SAE if there is none, and keeps rows as they come."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from vs2_plugin import __version__
from vs2_plugin.classify.page import Sheet
from vs2_plugin.classify.plan import Plan
from vs2_plugin.classify.table import Part, Row, columns, rows_of, write_table
from vs2_plugin.data.folders import FolderImages
from vs2_plugin.data.loading import leave_interruptions, read
from vs2_plugin.devices import emulates_bfloat16, own_device
from vs2_plugin.errors import DataError
from vs2_plugin.harness.loader import load
from vs2_plugin.model.automatic import Automatic
from vs2_plugin.model.classifier import Classifier
from vs2_plugin.model.description import told
from vs2_plugin.model.steered import SteeredCLIP
from vs2_plugin.seeds import seeded
from vs2_plugin.steering.context import Task
from vs2_plugin.text import counted, reason_of
from vs2_plugin.training.run import train

__all__ = ["Summary", "classify"]

_LOG = logging.getLogger(__name__)
#: With fewer images than this, an SAE hardly generalises to others.
_FEW = 50
#: Shows the user a line of text.
Report = Callable[[str], None]


@dataclass
class Summary:
    """The result of a classification, in numbers."""

    images: int = 0
    """Images that could be read."""
    unreadable: int = 0
    changed: int = 0
    """Images that have another class than without steering."""
    classes: Counter[str] = field(default_factory=Counter)
    """Images of each class."""
    written: list[str] = field(default_factory=list)
    """Paths of the written files."""

    def counting(self, rows: Iterator[Row]) -> Iterator[Row]:
        """Yield the rows, and count them in this summary."""
        for row in rows:
            if row.get("error"):
                self.unreadable += 1
            else:
                self.images += 1
                self.changed += row["changed"]
                self.classes[row["class"]] += 1
            yield row


def classify(plan: Plan, report: Report = _LOG.info, quiet: bool = False) -> Summary:
    """Train the SAE if there is none, classify the images, and write the table and, if requested, the page.

    After an interruption, the same plan continues where the first run ended.

    Args:
        plan: the checked request.
        report: shows the user a line of text.
        quiet: show no progress bars.

    Raises:
        Vs2Error: a model, an SAE or a file cannot be loaded, trained or written.
    """
    part = Part(plan.out)
    with part.opened():
        plan = _with_sae(plan, report, quiet)
        model, transform = _load(plan)
        facts = _facts(plan, model)
        _tell_steering(model, dict(facts), report)
        paths = plan.images.paths
        done, different = part.settle(_settings(plan, model), paths, plan.request.batch_size)
        if different:
            report(f"an interrupted run had other settings ({', '.join(different)}); starting again")
        elif done:
            report(f"{done:,} of {counted(len(paths), 'image')} are already classified; continuing from there")
        with tqdm(total=len(paths), initial=done, unit="img", disable=quiet or None, leave=False) as bar:
            for batch in _batches(plan, transform, done):
                predictions = None if batch.images is None else model.classify(batch.images, len(batch.images))
                part.append(rows_of(paths[done : done + len(batch.errors)], batch.errors, predictions))
                done += len(batch.errors)
                bar.update(len(batch.errors))
        summary = Summary()
        if plan.request.page is not None:
            title = [("model", plan.request.model), *facts]
            summary.written.append(str(Sheet.of(part.rows()).write(plan.request.page, title)))
        write_table(plan.out, columns(len(plan.classes)), summary.counting(part.rows()))
        summary.written.append(str(plan.out))
        part.remove()
    return summary


def _with_sae(plan: Plan, report: Report, quiet: bool) -> Plan:
    """Train the SAE if the plan asks for it, and return the plan with its checkpoint."""
    request = plan.training
    if request is None:
        return plan
    what = " ".join(plan.request.train_images) or "the photos themselves, without labels (transductive)"
    report(f"there is no SAE for this yet: training one on {what}")

    def tell(line: str) -> None:
        if not line.startswith("evaluate with:"):  # the SAE is used here at once
            report(line)

    (checkpoint,) = train(replace(request, quiet=quiet), report=tell)
    if checkpoint.data.images < _FEW:
        _LOG.warning(
            "the SAE learned from %s, too few for steering along it to be worth much; name a folder of a few hundred "
            "or more with --train_images, and a store of its own, or use vs2-train-sae --overwrite, or compare with "
            "the columns plain_class and plain_probability", counted(checkpoint.data.images, "image"),
        )  # fmt: skip
    return replace(plan, checkpoint=checkpoint, training=None)


def _load(plan: Plan) -> tuple[SteeredCLIP, Callable[[Any], Tensor]]:
    """Load the model with its classes, on a GPU if there is one, and its preprocessing."""
    request, spec = plan.request, plan.spec
    if plan.checkpoint is not None and spec.checkpoint is None:
        spec = replace(spec, checkpoint=plan.checkpoint.name)
    with seeded(request.seed):  # for models with random weights
        model, transform, tokenizer = load(
            str(spec), request.pretrained, request.model_cache_dir, own_device(), store=plan.store
        )
    if plan.checkpoint is not None:
        model.bind(Task(plan.checkpoint.data.datasets[0], classes=list(plan.classes), templates=list(plan.prompts)))
    model.set_classifier(Classifier.of(model, tokenizer, plan.classes, plan.prompts, _amp(plan)))
    return model, transform


def _facts(plan: Plan, model: SteeredCLIP) -> list[tuple[str, str]]:
    """Return names and values that describe the steering, and whether the SAE was trained on the photos."""
    facts = told(model.spec, model.places, model.classifier)
    folders = {os.path.abspath(path if os.path.isdir(path) else os.path.dirname(path)) for path in plan.request.photos}
    if plan.checkpoint is None or not any(map(plan.checkpoint.data.holds, folders)):
        return facts
    among = ", including photos that are classified"
    return [(name, value + among if name == "checkpoint" else value) for name, value in facts]


def _tell_steering(model: SteeredCLIP, facts: Mapping[str, str], report: Report) -> None:
    """Report which SAE is used, and whether ``auto`` decided against steering."""
    if "checkpoint" in facts:
        report(f"SAE: {facts['checkpoint']}")
    choices = [place.steering.choice for place in model.places if isinstance(place.steering, Automatic)]
    if choices and all(choice is not None and choice.index == 0 for choice in choices):
        report("no strength clearly helps on these classes, so the model is left as it is: nothing is steered")


def _amp(plan: Plan) -> bool:
    return not emulates_bfloat16() if plan.request.amp is None else plan.request.amp


def _settings(plan: Plan, model: SteeredCLIP) -> dict[str, Any]:
    """Return everything that rows depend on, as JSON values."""
    return {
        "version": [__version__, torch.__version__],
        "--model": [plan.request.model, model.vs2_facts()],
        "--pretrained": plan.request.pretrained,
        "--classes": plan.classes,
        "--prompts": plan.prompts,
        "--batch_size": plan.request.batch_size,
        "--amp": _amp(plan),
        "--seed": plan.request.seed,
        "device": own_device(),
        "photos": plan.images.fingerprint(),
    }


class _Batch(NamedTuple):
    """Preprocessed images of a batch, and the errors of those that cannot be read."""

    images: Tensor | None
    """The images that could be read, ``[images, 3, height, width]``; None if there are none."""
    errors: list[str]
    """For every image of the batch, why it could not be read; empty if it could."""


class _Readable(Dataset[tuple[Tensor | None, str]]):
    """Preprocessed images, each with an error text if it cannot be read."""

    def __init__(self, images: FolderImages, transform: Callable[[Any], Tensor]) -> None:
        self._images, self._transform = images, transform

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor | None, str]:
        try:
            return self._transform(self._images.picture(index)), ""
        except DataError as error:
            return None, str(error)
        except Exception as error:  # transforms may raise anything for a strange picture
            return None, reason_of(error)


def _batch(items: Sequence[tuple[Tensor | None, str]]) -> _Batch:
    images = [image for image, _ in items if image is not None]
    return _Batch(torch.stack(images) if images else None, [error for _, error in items])


def _batches(plan: Plan, transform: Callable[[Any], Tensor], first: int) -> Iterator[_Batch]:
    """Yield the images in batches, from number ``first`` on."""
    images = _Readable(plan.images, transform)
    left = Subset(images, range(first, len(images)))
    loader = DataLoader(
        left,
        batch_size=plan.request.batch_size,
        num_workers=min(plan.request.num_workers, len(left)),
        collate_fn=_batch,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=leave_interruptions,
    )
    yield from read(loader)
