"""One run of the study: SAEs for one gallery, and the accuracy of every method with them."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from settings import METHODS, Setting, Sizes
from sources import classifier, draw, images, load_clip, train_clip
from torch import Tensor, nn

from vs2_plugin.clip.edits import in_float32
from vs2_plugin.clip.sites import Site, Sites, embedding_from
from vs2_plugin.gallery.gallery import CLIP, Gallery
from vs2_plugin.gallery.search import ExactSearch
from vs2_plugin.model.automatic import Automatic, settle
from vs2_plugin.modelstring import ModelString, parse
from vs2_plugin.sae.config import TrainConfig
from vs2_plugin.sae.train import Job, Trained, train_saes
from vs2_plugin.steering.batch import Batch, Steering, steer
from vs2_plugin.steering.context import Context
from vs2_plugin.steering.gate import Gate, threshold
from vs2_plugin.steering.move import keep_norm
from vs2_plugin.steering.retriever import Retriever
from vs2_plugin.strength import neighbour_graph

__all__ = ["PAPER", "Bench", "alone", "curve", "percent", "prepare", "run", "run_quietly", "train", "train_plain"]

_CPU = torch.device("cpu")
_BATCH = 2500
_PASS_WEIGHT = 0.8
PAPER = 1.05


class Clock:
    """Seconds of each part of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[part] = round(self.seconds.get(part, 0) + time.perf_counter() - started, 3)


class Bench:
    """A gallery with its SAEs, and the test images that methods are scored on. All are activations at one site."""

    def __init__(
        self,
        model: nn.Module,
        site: Site,
        out: Site,
        weights: Tensor,
        gallery: Gallery,
        saes: dict[str, Trained],
        test: Tensor,
        labels: Tensor,
    ) -> None:
        """``out`` is the output of the tower whose last site is ``site``; ``weights`` the zero-shot classifier."""
        self.model, self.site, self.out = model, site, out
        self.weights, self.gallery, self.saes, self.test, self.labels = weights, gallery, saes, test, labels
        self.search = ExactSearch(gallery.embeddings[CLIP], _CPU)
        self.plain = torch.cat([embedding_from(model, self.site, x) for x in self.test.split(_BATCH)])

    def build(self, spec: ModelString, prior: Tensor | None = None) -> tuple[Steering, Steering]:
        """The steering of a model string, and the same steering without a gate."""
        method, options = spec.method, dict(spec.options)
        retriever = None
        if method.gallery != "none":
            n = min(options.get("n") or 1, len(self.gallery) - 1)
            search = self.search if method.gallery == "neighbours" else None
            retriever = Retriever(self.gallery, _CPU, n=n, search=search)
            retriever.set_classifier(self.weights)
        sae, mean, figures = self.saes[method.sae]
        site = self.out if method.site == "output" else self.site
        context = Context(
            self.model, site.hookpoint, site.width, sae, mean, figures.fvu_quantiles, None, retriever
        )  # fmt: skip
        own = {option.name: options[option.name] for option in method.options}
        automatic = method.automatic(own)
        if automatic:
            steering = Automatic(method, lambda values: method.build(context, **values), own)
        else:
            steering = method.build(context, **own)
        steered = steering
        if options.get("gate") is not None:
            steered = Gate(steering, sae, mean, threshold(figures.fvu_quantiles, options["gate"]))
        if automatic:
            steering.settle(
                settle(
                    steering, partial(steer, steered), self.model, self.site, self.gallery, self.weights, retriever,
                    prior,
                )
            )
        return steered, steering

    def right(self, steering: Steering, output: bool = False) -> Tensor:
        """Which test images are classified correctly when steered, bool ``[count]``."""
        site, classes = self.out if output else self.site, []
        for x, plain in zip(self.test.split(_BATCH), self.plain.split(_BATCH), strict=True):
            batch = Batch(x, embed=lambda plain=plain: plain)
            steered = in_float32(lambda x, batch=batch: steer(steering, x, batch), plain if output else x)
            embedding = embedding_from(self.model, site, steered)
            classes.append((F.normalize(embedding, dim=-1) @ self.weights).argmax(1))
        return torch.cat(classes) == self.labels


def train_plain(stored: np.ndarray, seed: int, samples: int = 0) -> Trained:
    """An SAE by the package's defaults, on activations ``[count, d]``. It sees ``samples`` of them."""
    with torch.enable_grad():
        return train_saes([Job("plain", stored, TrainConfig(seed=seed, samples=samples))], quiet=True)[0]


def percent(right: Tensor) -> float:
    """Accuracy."""
    return round(100 * right.double().mean().item(), 4)


def curve(bench: Bench, spec: ModelString, automatic: Automatic, known: dict[Hashable, Tensor]) -> list[Tensor]:
    """Which test images each candidate gets right. What is in ``known`` need not be done again."""
    found = []
    for values in automatic.candidates:
        told = {**spec.options, **values}
        if told["alpha"] == 0:
            key: Hashable = "plain"
        elif spec.method.gallery == "neighbours":
            key = str(spec), told["alpha"]
        else:  # selective steering with p = 0 is vs2
            key = spec.method.sae, told.get("p", 0), told["alpha"]
        if key not in known:
            automatic.use(automatic.build(values))
            known[key] = bench.right(automatic)
        found.append(known[key])
    automatic.settle(automatic.choice)
    return found


def in_hindsight(rights: dict[float, Tensor]) -> tuple[float, list[float]]:
    """Accuracy at the best strength in hindsight, and the two strengths.

    The strength that is best on one half of the test images is scored on the other half, both ways.
    """
    strengths, table = list(rights), torch.stack(list(rights.values()))
    order = torch.from_numpy(np.random.default_rng(0).permutation(table.shape[1]))
    scored, chosen = 0, []
    halves = order.tensor_split(2)
    for half, other in (halves, halves[::-1]):
        best = int(table[:, half].sum(1).argmax())  # the weakest of equals
        chosen.append(strengths[best])
        scored += int(table[best, other].sum())
    return round(100 * scored / table.shape[1], 4), chosen


def linear_probe(gallery: Tensor, pseudo: np.ndarray, test: Tensor, labels: Tensor) -> Tensor:
    """Multinomial logistic regression of the gallery's zero-shot classes: which test images it gets right."""
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(pseudo)) == 1:
        return labels == int(pseudo[0])
    fitted = LogisticRegression(max_iter=1000).fit(F.normalize(gallery, dim=-1).numpy(), pseudo)
    return torch.from_numpy(fitted.predict(F.normalize(test, dim=-1).numpy())) == labels


@torch.no_grad()
def run(root: Path, setting: Setting, seed: int, sizes: Sizes) -> dict[str, Any]:
    """Train the SAEs of one setting and seed, and score all methods."""
    clock = Clock()
    with clock("load"):
        loaded = load_clip(root, setting.clip)
        weights = classifier(loaded, setting.source)
        found = images(root, setting.clip, setting.source, setting.corruption, sizes)
        count = weights.shape[1]
        mine = draw(found.pool_labels, count, setting.classes, setting.size, seed)
        shown = np.arange(len(found.test))
        if setting.classes != "balanced":
            shown = draw(found.test_labels, count, setting.classes, len(found.test), 0)
        stored, labels = np.ascontiguousarray(found.pool[mine]), found.pool_labels[mine]
    with clock("SAEs"), torch.enable_grad():
        width = stored.shape[1]
        config = {"expansion_factor": setting.latents // width, "k": setting.k, "seed": seed, "samples": sizes.samples}
        jobs = [
            Job("plain", stored, TrainConfig(**config)),
            Job("pass", stored, TrainConfig(**config, pass_weight=_PASS_WEIGHT), labels),
        ]
        saes = dict(zip(("plain", "pass"), train_saes(jobs, quiet=True), strict=True))
    model, site = loaded.model, Sites.of(loaded.model).default
    with clock("plain"):
        embedded = embedding_from(model, site, torch.from_numpy(stored).float())
        digests = np.arange(len(stored), dtype=np.uint64)
        gallery = Gallery(
            {site.hookpoint: stored}, {CLIP: embedded.numpy().astype(np.float16)}, digests, labels, {"study": 0}
        )
        test = torch.from_numpy(found.test[shown]), torch.from_numpy(found.test_labels[shown])
        bench = Bench(model, site, Sites.of(model).output, weights, gallery, saes, *test)
        known = torch.from_numpy(labels)
        graph = neighbour_graph(torch.from_numpy(gallery.embeddings[CLIP]))
        accuracy = {"zero-shot": percent(bench.right(lambda x: x))}

    choices, facts, curves, known_right = {}, {}, {}, {}
    for name, text in METHODS.items():
        if text is None or (name == "vs2 auto, prior" and setting.classes == "balanced"):
            continue
        if name == "vs2pp brake, auto" and setting.group != "centre":  # for its cost
            continue
        method, _, options = text.partition("@")
        spec = parse(f"{method}:study{'@' if options else ''}{options}")
        prior = torch.from_numpy(np.bincount(labels, minlength=count) / len(labels)) if "prior" in name else None
        with clock(f"build {name}"):
            steered, steering = bench.build(spec, prior)
        with clock(name):
            accuracy[name] = percent(bench.right(steered, spec.method.site == "output"))
        if isinstance(steering, Automatic):
            choices[name] = steering.choice.to_json()
            with clock(f"candidates of {name}"):
                rights = curve(bench, spec, steering, known_right)
            curves[name] = [percent(right) for right in rights]
            if name == "vs2 auto":
                strengths = [values["alpha"] for values in steering.candidates]
                accuracy["vs2 hindsight"], hindsight = in_hindsight(dict(zip(strengths, rights, strict=True)))
        facts[name] = {key: value for key, value in getattr(steered, "facts", {}).items() if not key.startswith("auto")}

    with clock("linear probe"):
        pseudo = (F.normalize(embedded, dim=-1) @ weights).argmax(1).numpy()
        accuracy["linear probe"] = percent(linear_probe(embedded, pseudo, bench.plain, bench.labels))
    with clock("centring"):
        mean = torch.from_numpy(stored).float().mean(0)
        accuracy["centring"] = percent(bench.right(lambda x: keep_norm(x + PAPER * (x - mean), x)))
    return {
        "accuracy": {name: accuracy[name] for name in METHODS if name in accuracy},
        "choices": choices,
        "curves": curves,
        "hindsight": hindsight,
        "facts": facts,
        "images": len(stored),
        "test_images": len(bench.labels),
        "fvu": {name: trained.figures.fvu for name, trained in saes.items()},
        "purity": round((known[graph] == known[:, None]).double().mean().item(), 4),
        "seconds": clock.seconds,
    }


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function on one thread, without the progress bars in it."""
    torch.set_num_threads(1)
    with contextlib.redirect_stderr(io.StringIO()):
        return function(*args)


def run_quietly(root: Path, setting: Setting, seed: int, sizes: Sizes) -> dict[str, Any]:
    """:func:`run`, in a process that does nothing else."""
    return alone(run, root, setting, seed, sizes)


def train(root: Path, clip: str, steps: int) -> None:
    """:func:`train_clip`, likewise."""
    alone(train_clip, root, clip, steps)


def prepare(root: Path, clip: str, source: str, corruption: str, sizes: Sizes) -> None:
    """:func:`images`, likewise; they are left on disk."""
    alone(images, root, clip, source, corruption, sizes)
