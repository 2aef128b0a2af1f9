"""A stress test, from its request to its files."""

from __future__ import annotations

import csv
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor
from tqdm import tqdm

from vs2_plugin.errors import DataError, SettingError
from vs2_plugin.files import atomic_file
from vs2_plugin.model.predictions import best_first
from vs2_plugin.names import is_steered
from vs2_plugin.stress.figure import draw
from vs2_plugin.stress.outcomes import ALL, Outcome
from vs2_plugin.stress.request import StressRequest
from vs2_plugin.stress.subsets import Rows, batch, few, long_tail, of_classes, shuffled
from vs2_plugin.sweep.evaluate import OnePass, one_pass
from vs2_plugin.sweep.request import PassRequest, SweepRequest
from vs2_plugin.sweep.run import plan

__all__ = ["stress"]

_LOG = logging.getLogger(__name__)

#: Images of a batch, as in arXiv 2501.03729.
_BATCH = 64


def stress(request: StressRequest, quiet: bool = False) -> tuple[list[Outcome], list[Path]]:
    """Evaluate models on subsets of the test images, encoding each image once.

    Methods that learn from the checkpoint's gallery use all of it: only the test images change.

    Returns:
        The outcomes, and the files written.

    Raises:
        Vs2Error: something cannot be loaded or written, or the data set is unsuitable.
    """
    folder = Path(request.output)
    for text in request.model:
        if is_steered(text) and any("," in word or ":" in word.partition("=")[2] for word in text.split("@")[1:]):
            raise SettingError(f"--model {text}: expected one value for each option; vs2 sweep takes several")
    shared = {field.name: getattr(request, field.name) for field in fields(PassRequest)}
    planned = plan(SweepRequest(**shared, output=str(folder / "{model}.json")))
    outcomes: list[Outcome] = []
    for backbone in planned.backbones:
        points = [point for point in planned.points.values() if point.spec.backbone == backbone]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create")  # --num_workers is as in clip_benchmark
            with one_pass(planned.request, backbone, points, quiet, identify=True) as images:
                outcomes += _outcomes(images, backbone, request, quiet)
    return outcomes, [_write(outcomes, folder / "stress.csv"), draw(outcomes, folder / "stress.png")]


def _outcomes(images: OnePass, backbone: str, request: StressRequest, quiet: bool) -> Iterator[Outcome]:
    plain, targets = images.classify(None)
    if targets.ndim != 1:
        raise DataError(f"{request.dataset} has several labels per image; expected one")
    labels = targets.numpy().astype(np.int64)
    zero_shot = _predictions(plain)
    _warn_of_few(labels, request)
    # Drawn from the images in the order of their content, so that no draw depends on batches or loader workers.
    order = np.argsort(np.array(images.digests, np.uint64), kind="stable")
    subsets, streams = (
        [(axis, value, number, order[rows]) for axis, value, number, rows in draws(labels[order], request)]
        for draws in (_subsets, _orders)
    )
    yield from _judged(backbone, "image", labels, zero_shot, subsets, lambda rows: zero_shot[rows])
    for group in tqdm(images.groups, "models", disable=quiet or None, leave=False):
        whole = _predictions(images.classify(group[0])[0])
        protocol, readout = str(group[0].vs2_facts()["vs2_protocol"]), group[0].readout
        predict: Callable[[Rows], Rows] = whole.__getitem__
        if readout is not None and readout.protocol in ("stream", "transductive"):
            predict = partial(_read_again, readout.logits)
        mine = [*subsets, *streams] if readout is not None and readout.protocol == "stream" else subsets
        for model in group:
            yield from _judged(model.name, protocol, labels, zero_shot, mine, predict)


def _read_again(logits: Callable[[Sequence[int]], Tensor], rows: Rows) -> Rows:
    return _predictions(logits(rows.tolist()))


def _predictions(logits: Tensor) -> Rows:
    predicted: Rows = best_first(logits)[:, 0].numpy()
    return predicted


Subset = tuple[str, str, int, Rows]


def _warn_of_few(labels: Rows, request: StressRequest) -> None:
    """Warn of values of --present, --tail, --images and --batches that need more classes or images than there are."""
    counts = np.sort(np.unique(labels, return_counts=True)[1])
    least = int(counts.min())
    for share in request.present:
        if round(share * len(counts)) < 1:
            _LOG.warning("--present %g of %d classes is less than one class: one is taken", share, len(counts))
    for ratio in request.tail:
        if ratio > least:
            _LOG.warning(
                "--tail %g: the smallest class has %d image(s), so the most frequent class has at most %d times as "
                "many images as the rarest", ratio, least, least,
            )  # fmt: skip
    for count in request.images:
        if count >= len(labels):
            _LOG.warning("--images %d is left out: there are only %d images", count, len(labels))
    for classes in request.batches:
        held = int(counts[:classes].sum())
        if held < _BATCH:
            _LOG.warning("--batches %d: so many classes may have only %d images, not %d", classes, held, _BATCH)


def _subsets(labels: Rows, request: StressRequest) -> Iterator[Subset]:
    """Yield each subset: axis, value, draw number and rows."""
    for draw_number in range(request.draws):
        yield ALL, "", draw_number, shuffled(labels, draw_number)
        for share in request.present:
            yield "present", f"{share:.3g}", draw_number, of_classes(labels, share, draw_number)
        for ratio in request.tail:
            yield "tail", f"{ratio:g}", draw_number, long_tail(labels, ratio, draw_number)
        for count in request.images:
            if count < len(labels):
                yield "images", str(count), draw_number, few(labels, count, draw_number)
        for classes in request.batches:
            yield "batch", str(classes), draw_number, batch(labels, _BATCH, classes, classes, draw_number)


def _orders(labels: Rows, request: StressRequest) -> Iterator[Subset]:
    """Yield subsets of all rows class by class, as in a stream that is not shuffled."""
    for draw_number in range(request.draws):
        ranked = np.random.default_rng(draw_number).permutation(labels.max() + 1)
        order = shuffled(labels, draw_number)
        yield "order", "by class", draw_number, order[np.argsort(ranked[labels[order]], kind="stable")]


def _judged(
    model: str, protocol: str, labels: Rows, zero_shot: Rows, subsets: Sequence[Subset], predict: Callable[[Rows], Rows]
) -> Iterator[Outcome]:
    for axis, value, draw_number, rows in subsets:
        right, target = predict(rows) == labels[rows], labels[rows]
        recalls = [right[target == label].mean() for label in np.unique(target)]
        yield Outcome(
            model, protocol, axis, value, draw_number, len(rows), len(recalls), float(right.mean()),
            float(np.mean(recalls)), float((zero_shot[rows] == target).mean()),
        )  # fmt: skip


def _write(outcomes: Sequence[Outcome], path: Path) -> Path:
    with atomic_file(path) as scratch, scratch.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Outcome)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, outcomes))
    return path
