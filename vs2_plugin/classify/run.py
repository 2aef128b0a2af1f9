"""A classification from its plan to its table: the SAE trained where there is none, rows as they come."""

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
from vs2_plugin.model.description import told
from vs2_plugin.model.predictions import Classifier
from vs2_plugin.model.steered import SteeredCLIP
from vs2_plugin.seeds import seeded
from vs2_plugin.steering.context import Task
from vs2_plugin.text import counted, reason_of
from vs2_plugin.training.run import train

__all__ = ["Summary", "classify"]

_LOG = logging.getLogger(__name__)
#: With fewer images than this, an SAE knows little more than them.
_FEW = 50
Report = Callable[[str], None]


@dataclass
class Summary:
    """What came of it."""

    images: int = 0
    """Those that could be read."""
    unreadable: int = 0
    changed: int = 0
    """How many have another class than without steering."""
    classes: Counter[str] = field(default_factory=Counter)
    """How many images have each class."""
    written: list[str] = field(default_factory=list)
    """The files."""

    def counting(self, rows: Iterator[Row]) -> Iterator[Row]:
        """Yield the rows, and count what they tell."""
        for row in rows:
            if row.get("error"):
                self.unreadable += 1
            else:
                self.images += 1
                self.changed += row["changed"]
                self.classes[row["class"]] += 1
            yield row


def classify(plan: Plan, report: Report = _LOG.info, quiet: bool = False) -> Summary:
    """Train the SAE if there is none, classify the images, and write the table, and the page if there is to be one.

    After an interruption the same plan goes on where it ended.

    Args:
        plan: what is to be done.
        report: tells the user a line.
        quiet: show no progress.

    Raises:
        Vs2Error: something cannot be loaded, trained or written.
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
                found = None if batch.images is None else model.classify(batch.images, len(batch.images))
                part.append(rows_of(paths[done : done + len(batch.errors)], batch.errors, found))
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
    """Train the SAE if there is none, and say what it is of."""
    request = plan.training
    if request is None:
        return plan
    what = "the photos themselves, without labels (transductive)" if plan.transductive else plan.train_on
    report(f"there is no SAE for this yet: training one on {what}")

    def tell(line: str) -> None:
        if not line.startswith("evaluate with:"):  # it is used here and now
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
    """Load the model, on a GPU if there is one."""
    request, spec = plan.request, plan.spec
    if plan.checkpoint is not None and spec.checkpoint is None:
        spec = replace(spec, checkpoint=plan.checkpoint.name)
    with seeded(request.seed):  # random weights
        model, transform, tokenizer = load(
            str(spec), request.pretrained, request.model_cache_dir, own_device(), store=plan.store
        )
    if plan.checkpoint is not None:
        model.bind(Task(plan.checkpoint.data.datasets[0], classes=list(plan.classes), templates=list(plan.prompts)))
    model.set_classifier(Classifier.of(model, tokenizer, plan.classes, plan.prompts, _amp(plan)))
    return model, transform


def _facts(plan: Plan, model: SteeredCLIP) -> list[tuple[str, str]]:
    """Return names and values that say how the model steers, and whether its SAE was trained on the photos."""
    facts = told(model.spec, model.places, model.classifier)
    folders = {os.path.abspath(one if os.path.isdir(one) else os.path.dirname(one)) for one in plan.request.photos}
    if plan.checkpoint is None or not any(map(plan.checkpoint.data.holds, folders)):
        return facts
    among = ", including photos that are classified"
    return [(name, value + among if name == "checkpoint" else value) for name, value in facts]


def _tell_steering(model: SteeredCLIP, facts: Mapping[str, str], report: Report) -> None:
    """Say which SAE is used, and whether the model is left alone."""
    if "checkpoint" in facts:
        report(f"SAE: {facts['checkpoint']}")
    choices = [place.steering.choice for place in model.places if isinstance(place.steering, Automatic)]
    if choices and all(choice is not None and choice.index == 0 for choice in choices):
        report("no strength clearly helps on these classes, so the model is left as it is: nothing is steered")


def _amp(plan: Plan) -> bool:
    return not emulates_bfloat16() if plan.request.amp is None else plan.request.amp


def _settings(plan: Plan, model: SteeredCLIP) -> dict[str, Any]:
    """Return all that rows depend on, as plain JSON values."""
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
    images: Tensor | None
    """Those that could be read, ``[images, 3, height, width]``; None if there are none."""
    errors: list[str]
    """Why each of all images could not be read; empty where it could."""


class _Readable(Dataset[tuple[Tensor | None, str]]):
    """Images, or what is wrong with them."""

    def __init__(self, images: FolderImages, transform: Callable[[Any], Tensor]) -> None:
        self._images, self._transform = images, transform

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor | None, str]:
        try:
            return self._transform(self._images.picture(index)), ""
        except DataError as error:
            return None, str(error)
        except Exception as error:  # whatever a transform makes of a strange picture
            return None, reason_of(error)


def _batch(items: Sequence[tuple[Tensor | None, str]]) -> _Batch:
    images = [image for image, _ in items if image is not None]
    return _Batch(torch.stack(images) if images else None, [error for _, error in items])


def _batches(plan: Plan, transform: Callable[[Any], Tensor], first: int) -> Iterator[_Batch]:
    """Yield the images from the one numbered ``first`` on."""
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
