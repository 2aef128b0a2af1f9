"""The study on embeddings of a real CLIP: a file of them as it is, or settings made from one.

The SAE is at the tower's output, where these embeddings are from. The embeddings themselves stay where they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from methods import PAPER, Bench, alone, curve, percent, train_plain
from settings import HALVES
from table import LOSS, grid
from torch import Tensor, nn

from vs2_plugin.clip.sites import OUTPUT, Site
from vs2_plugin.errors import DataError
from vs2_plugin.gallery.gallery import CLIP, Gallery
from vs2_plugin.model.automatic import Automatic
from vs2_plugin.modelstring import parse
from vs2_plugin.steering.move import keep_norm

__all__ = ["METHODS", "Draw", "draws", "evaluate", "read", "table"]

#: Name in the tables -> the model string without its backbone; None for what is no method of the package.
METHODS = {
    "zero-shot": None, "vs2": "vs2:x", "auto": "vs2:x@alpha=auto", "vs2s": "vs2s:x", "centring": None, "DN": None,
}  # fmt: skip
#: Weight of the mean in distribution normalisation (arXiv 2302.11084).
_DN = 0.25
#: Activations that an SAE sees where many are trained, and with --quick; a file as it is gets the package's default.
_SAMPLES, _QUICK = 40_000, 4_000
ARRAYS = ("unlabeled", "test", "test_labels", "text")
WHOLE = ("image", "label", "text")


@dataclass(frozen=True)
class Draw:
    """Unlabeled and test images, drawn from a file with ``image`` and ``label``."""

    kind: str
    """What is looked at: ``random``, ``close`` and ``groups`` of classes; see the README beside this file."""
    count: int
    """Classes."""
    images: int
    """Unlabeled images of a class in the file; the others are for the test."""
    shares: str = "as they are"
    """``3:2:1`` unlabeled images, for a third of the classes each; or of groups, as they are or ``even``."""
    shift: float = 0.0
    """A vector of this multiple of the mean distance from the mean, added to all images."""

    @property
    def name(self) -> str:
        """What it is called in tables."""
        words = [f"{self.count} {self.kind}", f"{self.images} images"]
        words += [self.shares] * (self.shares != "as they are") + [f"shifted {self.shift:g}"] * (self.shift > 0)
        return ", ".join(words)


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file: those of :data:`ARRAYS`, or those of :data:`WHOLE` and perhaps further ``text_*``.

    Raises:
        DataError: it cannot be used.
    """
    expected = (
        "expected an .npz with unlabeled [n, d], test [m, d], test_labels [m] and text [classes, d], as one setting; "
        "or with image [n, d], label [n] and text [classes, d], of which settings are made"
    )
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: {error}; {expected}") from None
    names = next((names for names in (ARRAYS, WHOLE) if set(names) <= set(found)), None)
    if names is None:
        raise DataError(f"{path} holds {', '.join(found) or 'nothing'}; {expected}")
    labels = found[names[-2]]
    images = found["test" if names is ARRAYS else "image"]
    texts = [name for name in found if name == "text" or (name.startswith("text_") and names is WHOLE)]
    for name in (*texts, *(name for name in ("unlabeled", "test", "image") if name in names)):
        array = found[name]
        if array.ndim != 2 or array.dtype.kind != "f" or array.shape[1] != found["text"].shape[-1] or len(array) < 2:
            raise DataError(f"{path}: {name} is {array.dtype} {array.shape}; {expected}, all of one width d")
        if not np.isfinite(array).all():
            raise DataError(f"{path}: {name} holds NaN or infinity")
        if (np.abs(array).sum(1) == 0).any():
            raise DataError(f"{path}: {name} holds rows of zeros, which have no direction")
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise DataError(f"{path}: {names[-2]} is {labels.dtype} {labels.shape}, for images {images.shape}")
    if labels.min() < 0 or labels.max() >= len(found["text"]):
        raise DataError(
            f"{path}: {names[-2]} goes from {labels.min()} to {labels.max()}; expected 0 to {len(found['text']) - 1}, "
            "one for each row of text"
        )
    return found


def draws(half: str) -> list[Draw]:
    """What is drawn of a file with ``image`` and ``label``. Each is seen with every set of prompts, and with more names
    than classes."""
    # The first would be 10 images, too few for an SAE.
    found = [Draw("random classes", count, images) for count in (10, 20, 50, 100, 300) for images in (1, 2, 3)][1:]
    found += [Draw("close classes", count, images) for count in (20, 60) for images in (2, 3)]
    found += [Draw("random classes", count, 3, "3:2:1") for count in (100, 300)]
    found += [Draw("random classes", 100, 3, shift=shift) for shift in (0.5, 1.0)]
    for count in (5, 15, 40):
        found += [Draw("groups", count, 3, shares) for shares in ("as they are", "even")]
        found += [Draw("groups", count, 3, shift=shift) for shift in (0.5, 1.0)]
    # The whole is what the failure was found on; the rule was made elsewhere.
    return found + [Draw("random classes", 1000, images) for images in (1, 2, 3)] * (half == "report")


def evaluate(path: Path, draw: Draw | None, seed: int, half: str, quick: bool) -> list[dict[str, Any]]:
    """Rows of all methods: of the file as it is, or of one draw with each set of names and prompts."""
    samples = _QUICK if quick else 0 if draw is None else _SAMPLES
    return alone(_evaluate, read(path), path.stem, draw, seed, half, samples)


def _evaluate(
    arrays: Mapping[str, np.ndarray], name: str, draw: Draw | None, seed: int, half: str, samples: int
) -> list[dict[str, Any]]:
    if draw is None:
        unlabeled, test, labels = arrays["unlabeled"], arrays["test"], arrays["test_labels"]
        texts = {name: arrays["text"]}
    else:
        unlabeled, test, labels, texts = _drawn(arrays, draw, seed, half)
    # float16 as in a checkpoint.
    stored = np.ascontiguousarray(_unit(unlabeled).numpy().astype(np.float16))
    trained = train_plain(stored, seed, samples)
    digests = np.arange(len(stored), dtype=np.uint64)
    gallery = Gallery({OUTPUT: stored}, {CLIP: stored}, digests, None, {"study": 0})
    site, images, targets = Site(OUTPUT, stored.shape[1]), _unit(test), torch.from_numpy(labels)
    rows = []
    for setting, text in texts.items():
        classifier = _unit(text).T.contiguous()
        bench = Bench(nn.Identity(), site, site, classifier, gallery, {"plain": trained}, images, targets)
        about = {
            "setting": setting, "seed": seed, "classes": len(text), "unlabeled": len(stored), "test": len(images),
            "fvu": trained.figures.fvu,
        }  # fmt: skip
        rows += [{**about, **row} for row in _rows(bench, torch.from_numpy(stored).float())]
    return rows


def _rows(bench: Bench, unlabeled: Tensor) -> Iterator[dict[str, Any]]:
    mean, known = unlabeled.mean(0), {}
    for name, text in METHODS.items():
        told: dict[str, Any] = {}
        if text is not None:
            _, steering = bench.build(parse(text))
            right = bench.right(steering)
            if isinstance(steering, Automatic):
                choice = steering.choice
                told = {**choice.values, "reason": choice.reason, "evidence": choice.to_json()}
                told["accuracies"] = [percent(right) for right in curve(bench, parse(text), steering, known)]
        elif name == "DN":
            normalised = F.normalize(bench.weights - _DN * bench.weights.mean(1, keepdim=True), dim=0)
            right = ((bench.plain - _DN * mean) @ normalised).argmax(1) == bench.labels
        elif name == "centring":
            right = bench.right(lambda x: keep_norm(x + PAPER * (x - mean), x))
        else:
            right = bench.right(lambda x: x)
        yield {"method": name, "accuracy": percent(right), **told}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the rows say, in Markdown: a summary, means over settings of a kind, and a line for each setting."""
    names, settings = list(METHODS), {}
    for row in rows:
        settings.setdefault(row["setting"], {}).setdefault(row["method"], []).append(row)
    lines, kinds, changes = [], {}, {name: ([], []) for name in names[1:]}
    for setting, found in settings.items():
        accuracy = {name: np.array([row["accuracy"] for row in found[name]]) for name in names}
        for name in names[1:]:
            each = accuracy[name] - accuracy["zero-shot"]
            changes[name][0].append(each.mean())
            changes[name][1].append(each.min())
        first = found["zero-shot"][0]
        chosen = ["; ".join(f"{row['alpha']:g}" for row in found["auto"])]
        chosen += ["; ".join(f"{row['p']:g}/{row['alpha']:g}" for row in found["vs2s"])]
        means = [float(accuracy[name].mean()) for name in names]
        cells = [setting, str(first["classes"]), str(first["unlabeled"]), str(first["test"])]
        lines.append(cells + [f"{mean:.1f}" for mean in means] + chosen)
        kinds.setdefault(_kind(first["draw"]), []).append(means)
    summary = []
    for name, (means, runs) in changes.items():
        worse = str(sum(mean < LOSS for mean in means))
        summary.append([name, f"{np.mean(means):+.2f}", f"{min(means):+.1f}", worse, f"{min(runs):+.1f}"])
    columns = ["setting", "classes", "unlabeled", "test", *names, "auto: alpha", "vs2s: p/alpha"]
    return "\n\n".join(
        [
            f"{len(settings)} settings, {len(rows) // len(names)} runs; accuracy in percent, changes in points.",
            grid(["method", "mean change", "worst setting", f"settings below {LOSS}", "worst run"], summary),
            grid(
                ["kind", "settings", *names, "worst of auto", "worst of vs2s"],
                [[kind, str(len(found)), *_means(np.array(found), names)] for kind, found in kinds.items()],
            ),
            grid(columns, lines),
        ]
    )


def _kind(draw: str) -> str:
    """A draw without its number of images, and groups without their number."""
    words = [word for word in draw.split(", ") if not re.fullmatch(r"\d images", word)]
    return re.sub(r"^\d+ groups", "groups", ", ".join(words))


def _means(found: np.ndarray, names: Sequence[str]) -> list[str]:
    changes = found[:, 1:] - found[:, :1]
    worst = [f"{changes[:, names.index(name) - 1].min():+.1f}" for name in ("auto", "vs2s")]
    return [f"{found[:, 0].mean():.1f}", *(f"{change:+.1f}" for change in changes.mean(0)), *worst]


def _unit(array: np.ndarray) -> Tensor:
    return F.normalize(torch.from_numpy(array.astype(np.float32)), dim=1)


def _drawn(
    arrays: Mapping[str, np.ndarray], draw: Draw, seed: int, half: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Unlabeled and test images, the test's labels, and the class embeddings by the setting's name."""
    rng = np.random.default_rng([seed, draw.count, draw.images, int(10 * draw.shift), *draw.kind.encode()])
    labels, text = arrays["label"], _unit(arrays["text"]).numpy()
    own = np.arange(len(text))
    if draw.count < len(text):  # the halves share no class
        own = own[sorted(HALVES).index(half) :: 2]
    groups = _groups(text, own, draw, rng)
    chosen = np.concatenate(groups)
    place = np.full(len(text), -1)
    for index, members in enumerate(groups):
        place[members] = index
    unlabeled, test = [], []
    for order, label in enumerate(chosen):
        rows = rng.permutation(np.flatnonzero(labels == label))
        count = min(draw.images, len(rows) - 1)
        unlabeled.append(rows[: count if draw.shares != "3:2:1" else min(count, 1 + order % 3)])
        test.append(rows[count:])
    unlabeled, test = np.concatenate(unlabeled), np.concatenate(test)
    images = _unit(arrays["image"]).numpy()
    if draw.shift:
        mean = images.mean(0)
        direction = (images - mean).T @ rng.standard_normal(len(images))
        size = np.linalg.norm(images - mean, axis=1).mean()
        images = images + draw.shift * size * direction / np.linalg.norm(direction)
    texts = {}
    for prompts in sorted(name for name in arrays if name.startswith("text")):
        each = _unit(arrays[prompts]).numpy()
        suffix = "" if prompts == "text" else f", {prompts}"
        texts[draw.name + suffix] = np.stack([each[members].mean(0) for members in groups])
    rest = np.setdiff1d(own, chosen)
    if draw.kind != "groups" and len(rest):
        absent = rng.permutation(rest)[: max(len(chosen), 50)]
        texts[f"{draw.name}, {len(absent)} absent"] = np.concatenate([texts[draw.name], text[absent]])
    return images[unlabeled], images[test], place[labels[test]], texts


def _groups(text: np.ndarray, own: np.ndarray, draw: Draw, rng: np.random.Generator) -> list[np.ndarray]:
    """Classes of the file that are one class of the setting."""
    if draw.kind == "random classes":
        return [np.array([label]) for label in np.sort(rng.permutation(own)[: draw.count])]
    if draw.kind == "close classes":  # a class, and those whose texts are nearest
        near = own[np.argsort(-text[own] @ text[rng.choice(own)])]
        return [np.array([label]) for label in np.sort(near[: draw.count])]
    from sklearn.cluster import KMeans

    fitted = KMeans(draw.count, n_init=4, random_state=int(rng.integers(2**31))).fit(text[own])
    groups = [own[fitted.labels_ == index] for index in range(draw.count)]
    least = min(map(len, groups))
    return groups if draw.shares != "even" else [rng.permutation(group)[:least] for group in groups]
