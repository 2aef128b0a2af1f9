"""The subject of an inspection: a steered model bound to a data set, its training images, classes and words."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vs2_plugin.checkpoint.checkpoint import Checkpoint
from vs2_plugin.data.labels import PROMPT
from vs2_plugin.data.naming import DataSet
from vs2_plugin.data.splits import split_at_hand
from vs2_plugin.errors import DataError
from vs2_plugin.gallery.gallery import CLIP
from vs2_plugin.harness.loader import load
from vs2_plugin.host import build, zero_shot_classification
from vs2_plugin.inspection.latents import LatentStatistics, scan
from vs2_plugin.inspection.notes import NO_GALLERY, NO_WORDS, TOP_IMAGES
from vs2_plugin.inspection.pictures import Thumbnail, TrainingPictures
from vs2_plugin.model.classifier import warn_of_equals
from vs2_plugin.model.explanation import sae_at, words_of
from vs2_plugin.model.place import Place
from vs2_plugin.model.steered import SteeredCLIP
from vs2_plugin.seeds import seeded
from vs2_plugin.steering.context import Task

__all__ = ["Card", "Subject", "open_subject"]

#: Prompt of class names and words that are given by the user.


@dataclass(frozen=True)
class Card:
    """The description of one latent: words, figures and pictures."""

    latent: int
    words: list[tuple[str, float]]
    """The nearest words, with their cosines; empty before the tower's end."""
    about: str
    pictures: list[Thumbnail]
    """The latent's top-activating training images."""
    kind: str = ""
    """``dead``, ``rare``, ``dense`` or empty; see :func:`vs2_plugin.inspection.latents.kinds`."""


@dataclass
class Subject:
    """A steered model that is bound to a data set, with classes and words that describe its latents."""

    model: SteeredCLIP
    transform: Callable[[Any], Tensor]
    """The tower's preprocessing of an image."""
    device: str
    classes: list[str]
    prompts: str
    """The prompts of the classes, in words."""
    class_texts: Tensor
    """Class embeddings ``[classes, e]``: float32, unit norm."""
    words: list[str]
    word_texts: Tensor
    """Embeddings of the words ``[words, e]``: float32, unit norm."""
    pictures: TrainingPictures | None
    """The checkpoint's training images, if it keeps any."""
    problems: dict[str, None]
    """Sentences that say what could not be shown so far, and why; the values are unused."""
    progress: bool = False
    """Whether a progress bar on stderr shows the scan of the gallery."""
    _statistics: dict[str, LatentStatistics] = field(default_factory=dict)

    @property
    def title(self) -> list[tuple[str, str]]:
        """Names and values that describe the model, its checkpoint, the classes and the concepts."""
        spec, checkpoint = self.model.spec, self.model.checkpoint
        title = [("model", str(spec))]
        if checkpoint is not None:
            data = " ".join(checkpoint.data.datasets)
            title += [("weights", checkpoint.pretrained)] if checkpoint.pretrained else []
            title.append(("checkpoint", f"{checkpoint.name}, {checkpoint.sites[0].trained} {data}"))
        labels = self.model.vs2_facts()["vs2_labels"]
        title.append(("labels used", "none" if labels == "none" else f"{labels} labels"))
        title.append(("classes", f"{len(self.classes)}, by {self.prompts}"))
        if self.words is not self.classes:
            title.append(("concepts", f"{len(self.words)}, by the prompt {PROMPT!r}"))
        return title

    def statistics(self, place: Place) -> LatentStatistics | None:
        """Return the statistics of a place's latents on the gallery, computed once; None without a gallery."""
        hookpoint = place.site.hookpoint
        if hookpoint not in self._statistics and self.pictures is not None:
            gallery = self.pictures.gallery
            activations, embeddings = gallery.activations[hookpoint], gallery.embeddings[CLIP]
            hidden = None if self.progress else True  # None hides the bar if stderr is no terminal
            with tqdm(total=len(gallery), desc="latents", unit="img", disable=hidden, leave=False) as bar:
                self._statistics[hookpoint] = scan(
                    sae_at(place)[0], activations, embeddings, self.class_texts.T, TOP_IMAGES, bar.update
                )
        return self._statistics.get(hookpoint)

    def words_of(self, place: Place, latents: np.ndarray, amounts: np.ndarray) -> list[list[tuple[str, float]]]:
        """Return for each latent the nearest words with their cosines; no words before the tower's end.

        ``amounts`` are usual activations of the ``latents``; a latent with 0 gets no words.
        """
        if not self.model.sites.at_end(place.site):
            self.problems[NO_WORDS] = None
        numbers, usual = torch.from_numpy(latents), torch.from_numpy(amounts)
        return words_of(self.model, place, numbers, usual, self.words, self.word_texts)

    def card(
        self, latent: int, words: list[tuple[str, float]], statistics: LatentStatistics | None, kind: str = ""
    ) -> Card:
        """Return the card of a latent; without a gallery, only its ``words``."""
        if statistics is None or self.pictures is None:
            return Card(latent, words, "", [], kind)
        pictures = self.pictures.of(statistics.rows[latent])
        return Card(latent, words, statistics.about(latent, self.classes), pictures, kind)


def open_subject(
    model: str,
    pretrained: str,
    dataset: str,
    dataset_root: str = "root",
    *,
    checkpoint: Checkpoint | None = None,
    classes: list[str] | None = None,
    concepts: list[str] | None = None,
    model_cache_dir: str | None = None,
    wds_cache_dir: str | None = None,
    progress: bool = False,
) -> Subject:
    """Load a steered model for inspection, on a GPU if there is one.

    Args:
        model: a model string, ``method:backbone[@checkpoint][@key=value]…``.
        pretrained: open_clip's weights tag or file; empty for random weights.
        dataset: the data set whose classes and checkpoint are used; a folder of images, ``photos/``, or ``wds/NAME``
            for shards.
        dataset_root: the folder that holds a data set given by name. Training images are read from there again.
        checkpoint: the checkpoint; None: the one that ``model`` names, else the data set's.
        classes: class names to use instead of the data set's.
        concepts: words to compare latents with in place of the classes.
        model_cache_dir: where downloaded models are kept.
        wds_cache_dir: where downloaded shards are kept.
        progress: show progress bars on stderr.

    Raises:
        Vs2Error: the model or the data set cannot be loaded, or there are fewer than two classes or concepts.
    """
    prompts: list[str] | dict[str, list[str]] = [PROMPT]
    named = DataSet.of(dataset, dataset_root)
    if classes is None:
        classes, prompts = _classes_of(named, wds_cache_dir)
    _require_two("classes", classes)
    concepts = None if concepts is None else _require_two("concepts", concepts)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with seeded(0):  # random weights equal clip_benchmark's
        steered, transform, tokenizer = load(model, pretrained, model_cache_dir, device, checkpoint=checkpoint)
    steered.bind(Task(named.name, named.root, "test", classes, prompts))
    with zero_shot_classification() as harness:
        embed = partial(harness.zero_shot_classifier, steered.model, tokenizer, device=device, amp=False)
        class_texts = embed(classes, prompts).T.contiguous()
        word_texts = class_texts if concepts is None else embed(concepts, [PROMPT]).T.contiguous()
    warn_of_equals(classes, class_texts.T)
    steered.set_classifier(class_texts.T)
    problems: dict[str, None] = {}
    pictures, used = None, steered.checkpoint
    if used is not None and used.gallery is not None:
        pictures = TrainingPictures(used, named, transform, wds_cache_dir, problems)
    elif used is not None:
        problems[NO_GALLERY] = None
    return Subject(
        steered, transform, device, classes, _wording(prompts), class_texts, concepts or classes, word_texts, pictures,
        problems, progress,
    )  # fmt: skip


def _wording(prompts: Sequence[str] | Mapping[str, Sequence[str]]) -> str:
    if isinstance(prompts, Mapping):
        return "prompts of their own"
    return f"the prompt {prompts[0]!r}" if len(prompts) == 1 else f"{len(prompts)} prompts"


def _require_two(name: str, words: Sequence[str]) -> list[str]:
    """Return the words, each once. Raises DataError for fewer than two."""
    different = list(dict.fromkeys(words))
    if len(different) < 2:
        raise DataError(f"{name}: {', '.join(map(repr, words[:3])) or 'none'}; expected two words or more")
    return different


def _classes_of(dataset: DataSet, wds_cache_dir: str | None) -> tuple[list[str], Any]:
    """Return class names and prompts as clip_benchmark has them, which are those of any split."""
    hint = "or name the classes with --classes FILE"
    remedy = f"its class names are needed: put the data there, {hint}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of the order of shards, which are not read here
        built = build(dataset, split_at_hand(dataset), remedy=remedy, wds_cache_dir=wds_cache_dir)
    classes, prompts = getattr(built, "classes", None), getattr(built, "templates", None)
    if not classes or len(classes) < 2 or not prompts:
        raise DataError(f"{dataset.name} has no class names and prompts; expected a classification data set, {hint}")
    return list(classes), prompts
