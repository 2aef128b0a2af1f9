"""Builds the steering that a method declares; an error names the method and its plugin."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from vs2_plugin.errors import PluginError, Vs2Error
from vs2_plugin.method import Method, Scalar
from vs2_plugin.plugin_faults import fault_of
from vs2_plugin.plugins import registry
from vs2_plugin.sae.topk import TopKSAE
from vs2_plugin.steering.batch import Batch, Steering, unchanged
from vs2_plugin.steering.context import Context
from vs2_plugin.steering.retriever import Retriever

__all__ = ["build", "read_by_all", "weights_of", "whose"]


def build(method: Method, context: Context, options: Mapping[str, Scalar | None]) -> Steering:
    """Return the steering that a method builds with these options.

    Raises:
        PluginError: the builder failed, edited a shared tensor, or built no function.
    """
    model, retriever, sae = context.model, context.retriever, context.sae

    def held() -> dict[str, Tensor | None]:
        own = {"context.classifier": context.classifier, "context.unlabeled": context.unlabeled}
        return weights_of(model) | own | read_by_all(sae, retriever, Batch())

    try:
        with unchanged(held):
            steering = method.build(context, **options)
    except PluginError as error:
        raise PluginError(f"{whose(method.name)} could not be built: {error}") from error
    except Vs2Error:
        raise
    except (Exception, SystemExit) as error:
        raise PluginError(f"{whose(method.name)} could not be built: {fault_of(error)}") from error
    if not callable(steering):
        kind = "embeddings to logits" if method.site == "logits" else "activations to activations"
        raise PluginError(f"method {method.name!r} built {steering!r}; expected a function from {kind}")
    return steering.to(next(model.parameters()).device).eval() if isinstance(steering, nn.Module) else steering


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of the model, by the names that a plugin finds them by, but for tensors of the inference mode,
    for which torch counts no edits."""
    weights = model.named_parameters()
    return {f"context.model.{name}": weight for name, weight in weights if not weight.is_inference()}


def whose(method: str) -> str:
    """Return the name of a method and of its plugin, in words."""
    return f"method {method!r} of {registry().owners.get(method, '?')}"


def read_by_all(sae: TopKSAE | None, retriever: Retriever | None, batch: Batch) -> dict[str, Tensor | None]:
    """Return the tensors, by name, that a method is given but must not edit, since the framework reads them too."""
    weights = {} if sae is None else {f"context.sae.{name}": weight for name, weight in sae.named_parameters()}
    return {**weights, **batch.shared(), **({} if retriever is None else retriever.shared(batch))}
