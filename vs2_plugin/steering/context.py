"""The context that the builder of a steering method is given."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vs2_plugin.documented import documented
from vs2_plugin.errors import PluginError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vs2_plugin.sae.topk import TopKSAE
    from vs2_plugin.steering.retriever import Retriever

__all__ = ["Context", "Task"]


@dataclass(frozen=True)
class Task:
    """The data set under evaluation, as far as it is known."""

    dataset: str
    """Its name, as typed."""
    root: str | None = None
    """Where it lies."""
    split: str | None = None
    """The split under evaluation."""
    classes: list[str] | None = None
    """Class names; None for a data set without classes."""
    templates: list[str] | dict[str, list[str]] | None = None
    """Prompts with ``{c}`` for the class name, or prompts per class."""
    folder: str = ""
    """The absolute path of the folder that holds the images and no other split, or what lists their shards; empty for a
    data set that is found by its name."""


@documented
@dataclass(frozen=True)
class Context:
    """The parts that a builder works with, once per site. All tensors are float32."""

    model: nn.Module
    """The open_clip model (not yet steered)."""
    site: str
    """The hookpoint: the path, under the model, of the module whose output is steered."""
    width: int
    """d, the width of the activations there."""
    sae: TopKSAE | None = None
    """The SAE of this site; None for a method that needs no checkpoint, or steers the output embedding."""
    mean: Tensor | None = None
    """μ ``[d]``: mean activation over the unlabeled training split."""
    fvu_quantiles: dict[str, float] | None = None
    """Quantile, as text, -> FVU of held-out training activations."""
    task: Task | None = None
    """The data set under evaluation, where it is known."""
    retriever: Retriever | None = None
    """Looks images up in the gallery, for methods with one: ``retriever.neighbours(batch)`` in each forward pass."""
    shared: dict[str, Any] = field(default_factory=dict)
    """What a builder leaves here under a key of its own, it finds again when it is called with other options for the
    same site of the same checkpoint: ``auto`` calls it once per candidate, a sweep once per point."""
    classifier: Tensor | None = None
    """For methods on logits: the class embeddings ``[embed_dim, classes]``, of unit norm."""
    unlabeled: Tensor | None = None
    """For methods on logits, as far as their protocol lets them see any: embeddings ``[images, embed_dim]``, of unit
    norm, of the gallery's images, or of all test images."""

    def require_sae(self) -> TopKSAE:
        """The SAE. Raises PluginError if the method steers along none."""
        if self.sae is None:
            raise PluginError("this method steers along an SAE, but is declared without (needs_checkpoint, site)")
        return self.sae

    def require_mean(self) -> Tensor:
        """The mean activation. Raises PluginError if the method steers along no SAE."""
        if self.mean is None:
            raise PluginError("this method asks for the mean, but is declared without (needs_checkpoint, site)")
        return self.mean

    def require_classifier(self) -> Tensor:
        """The class embeddings. Raises PluginError if the method is declared for another site than logits."""
        if self.classifier is None:
            raise PluginError("this method reads embeddings as classes, but is declared without (site='logits')")
        return self.classifier

    def require_unlabeled(self) -> Tensor:
        """The unlabeled embeddings. Raises PluginError if the method is declared with a protocol that shows none."""
        if self.unlabeled is None:
            raise PluginError("this method learns from unlabeled images, but is declared without (protocol)")
        return self.unlabeled

    def require_retriever(self) -> Retriever:
        """The retriever. Raises PluginError if the method is declared without a gallery."""
        if self.retriever is None:
            raise PluginError("this method looks into a gallery, but is declared without (gallery)")
        return self.retriever
