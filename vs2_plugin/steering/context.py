"""The context that is passed to the builder of a steering method."""

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
    """The data set under evaluation."""

    dataset: str
    """Name of the data set, as typed."""
    root: str | None = None
    """Root folder or address of the data set; None if unknown."""
    split: str | None = None
    """The split under evaluation; None if unknown."""
    classes: list[str] | None = None
    """Class names; None for a data set without classes."""
    templates: list[str] | dict[str, list[str]] | None = None
    """Prompts with ``{c}`` for the class name, or prompts per class."""
    folder: str = ""
    """Absolute path of the folder that holds the images of this split alone, or of the list of their shards; empty for
    a data set that is found by its name."""


@documented
@dataclass(frozen=True)
class Context:
    """The parts that a builder works with, one context per site. All tensors are float32."""

    model: nn.Module
    """The open_clip model (not yet steered)."""
    site: str
    """The hookpoint: the path, under the model, of the module whose output is steered."""
    width: int
    """d, the width of the activations at this site."""
    sae: TopKSAE | None = None
    """The SAE of this site; None for a method that needs no checkpoint, or steers the output embedding."""
    mean: Tensor | None = None
    """μ ``[d]``: mean activation over the unlabeled training split."""
    fvu_quantiles: dict[str, float] | None = None
    """Quantile, as text, -> FVU of held-out training activations."""
    task: Task | None = None
    """The data set under evaluation; None if unknown."""
    retriever: Retriever | None = None
    """Looks images up in the gallery, for methods with one: ``retriever.neighbours(batch)`` in each forward pass."""
    shared: dict[str, Any] = field(default_factory=dict)
    """A cache for builders, each under its own key. All calls for one site of one checkpoint share it: ``auto`` calls
    the builder once per candidate, a sweep once per point."""
    classifier: Tensor | None = None
    """For methods on logits: the class embeddings ``[embed_dim, classes]``, of unit norm."""
    unlabeled: Tensor | None = None
    """For methods on logits whose protocol shows images: embeddings ``[images, embed_dim]``, of unit norm, of the
    gallery's images or of all test images."""

    def require_sae(self) -> TopKSAE:
        """Return the SAE. Raises PluginError if the method steers along none."""
        if self.sae is None:
            raise PluginError("this method steers along an SAE, but is declared without (needs_checkpoint, site)")
        return self.sae

    def require_mean(self) -> Tensor:
        """Return the mean activation. Raises PluginError if the method steers along no SAE."""
        if self.mean is None:
            raise PluginError("this method asks for the mean, but is declared without (needs_checkpoint, site)")
        return self.mean

    def require_classifier(self) -> Tensor:
        """Return the class embeddings. Raises PluginError if the method is declared for another site than logits."""
        if self.classifier is None:
            raise PluginError(
                "class embeddings are given to methods that read embeddings as classes, but this one is declared "
                "without (site='logits')"
            )
        return self.classifier

    def require_unlabeled(self) -> Tensor:
        """Return the unlabeled embeddings. Raises PluginError if the method's declared protocol shows none."""
        if self.unlabeled is None:
            raise PluginError("this method learns from unlabeled images, but is declared without (protocol)")
        return self.unlabeled

    def require_retriever(self) -> Retriever:
        """Return the retriever. Raises PluginError if the method is declared without a gallery."""
        if self.retriever is None:
            raise PluginError("this method looks into a gallery, but is declared without (gallery)")
        return self.retriever
