"""Activations to try SAEs on: the demo's digits by its tiny CLIP, or a file of a real CLIP's embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vs2_plugin.clip.backbone import load_backbone
from vs2_plugin.clip.edits import reading
from vs2_plugin.clip.sites import embedding_from
from vs2_plugin.demo.digits import CLASSES, MODEL, TEMPLATES, read_digits
from vs2_plugin.model.classifier import Classifier


@dataclass(frozen=True)
class Data:
    """Activations of unlabeled images and of test images, and what classifies them."""

    name: str
    unlabeled: Tensor
    unlabeled_labels: np.ndarray
    """Read by the sparse probes only."""
    test: Tensor
    labels: np.ndarray
    embed: Callable[[Tensor], Tensor]
    classifier: Tensor

    @torch.no_grad()
    def classes(self, x: Tensor) -> np.ndarray:
        """Predicted classes of activations ``[m, d]``."""
        return (F.normalize(self.embed(x), dim=-1) @ self.classifier).argmax(-1).numpy()

    @torch.no_grad()
    def accuracy(self, x: Tensor) -> float:
        """Share of the test images that activations ``[m, d]`` in place of theirs classify right."""
        return float((self.classes(x) == self.labels).mean())


def digits() -> Data:
    """The last block's activations."""
    loaded = load_backbone(MODEL, "")
    site = loaded.sites.default

    def read(split: str) -> tuple[Tensor, np.ndarray]:
        images, labels = read_digits(split)
        with torch.no_grad(), reading(loaded.model, [site]) as found:
            loaded.model.encode_image(torch.stack([loaded.transform(image) for image in images]))
        return found[site].float(), np.asarray(labels)

    classifier = Classifier.of(loaded.model, loaded.tokenizer, CLASSES, TEMPLATES, False).weights
    return Data(
        "digits", *read("train"), *read("test"), partial(embedding_from, loaded.model, site), classifier.float()
    )


def embeddings(path: Path) -> Data:
    """A file with ``image`` [m, e], ``label`` [m] and ``text`` [classes, e]: the first half of the images of each class
    is unlabeled, the others are for testing. Steered at the output."""
    file = np.load(path)
    images, labels = torch.from_numpy(file["image"].astype(np.float32)), file["label"].astype(np.int64)
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    place = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = place < np.repeat(counts // 2, counts)
    own, other = order[first], order[~first]
    text = F.normalize(torch.from_numpy(file["text"].astype(np.float32)), dim=-1)
    return Data(path.stem, images[own], labels[own], images[other], labels[other], lambda x: x, text.T)
