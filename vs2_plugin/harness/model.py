"""The steered model, as clip_benchmark sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vs2_plugin import __version__
from vs2_plugin.checkpoint.manifest import Checkpoint
from vs2_plugin.clip.backbone import Loaded, Tower
from vs2_plugin.clip.sites import Edit, default_site, edit, find_site
from vs2_plugin.errors import CheckpointError, ModelStringError, PluginError, Vs2Error
from vs2_plugin.method import Scalar
from vs2_plugin.modelstring import ModelString
from vs2_plugin.plugins import registry
from vs2_plugin.steering.context import Context, Task

__all__ = ["SteeredCLIP"]

_LABELS = ("none", "train", "oracle")


class SteeredCLIP(nn.Module):
    """An open_clip model whose image activations are steered in every forward pass.

    It has the methods and attributes of the model inside (``encode_image``, ``encode_text``, ``generate``,
    ``logit_scale``, …). Steering sits in a hook of the vision tower, so whatever runs the tower is steered.
    """

    def __init__(self, spec: ModelString, loaded: Loaded, find_checkpoint: Callable[[Task | None], Checkpoint | None]) -> None:
        super().__init__()
        self.model = loaded.model
        self.spec = spec
        self.checkpoint: Checkpoint | None = None
        self._tower = Tower.of(loaded.model, loaded.transform) if spec.method.needs_checkpoint else None
        self._find_checkpoint = find_checkpoint
        self._edit: Edit | None = None
        self._facts: dict[str, Scalar] = {}
        self.eval()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def bind(self, task: Task | None) -> None:
        """Find the checkpoint for ``task`` (None: the one that the model string names) and start steering.

        Raises:
            CheckpointError: there is none, or it is of another tower.
            PluginError: the method could not be built.
        """
        if self._edit is not None:
            self._edit.remove()
            self._edit = None
        method, options = self.spec.method, self.spec.options
        device = next(self.model.parameters()).device
        self.checkpoint = checkpoint = self._find_checkpoint(task)
        if checkpoint is None:
            site, sae, mean, quantiles = default_site(self.model), None, None, None
        else:
            checkpoint.require_tower(self._tower)
            facts = checkpoint.site()
            site, quantiles = find_site(self.model, facts.hookpoint), facts.fvu_quantiles
            if site.width != facts.width:
                raise CheckpointError(f"checkpoint {checkpoint.name!r} has width {facts.width} at {site}, the tower has {site.width}")
            sae, mean = checkpoint.load(facts)
            sae, mean = sae.to(device), mean.to(device)
        context = Context(self.model, site.hookpoint, site.width, sae, mean, quantiles, task)
        try:
            steering = method.build(context, **options)
        except Vs2Error:
            raise
        except Exception as error:
            owner = registry().owners.get(method.name, "?")
            raise PluginError(f"method {method.name!r} of {owner} could not be built: {type(error).__name__}: {error}") from error
        if not callable(steering):
            raise PluginError(f"method {method.name!r} built {steering!r}; expected a function from activations to activations")
        if isinstance(steering, nn.Module):
            steering.to(device).eval()
        self._edit = edit(self.model, site, steering)
        self._facts = self._describe(site.hookpoint, options, getattr(steering, "facts", {}))

    def _describe(self, hookpoint: str, options: dict, steering_facts: dict) -> dict[str, Scalar]:
        checkpoint, method = self.checkpoint, self.spec.method
        facts = {"method": method.name, "version": __version__, "site": hookpoint}
        facts |= {name: value for name, value in options.items() if value is not None}
        facts |= steering_facts
        labels = [method.labels]
        if checkpoint is not None:
            labels.append(checkpoint.data.get("labels", "none"))
            facts |= {
                "checkpoint": checkpoint.name,
                "checkpoint_digest": checkpoint.digest[:16],
                "transductive": checkpoint.transductive,
            }
        facts["labels"] = max(labels, key=_LABELS.index)
        return {f"vs2_{name}": value for name, value in facts.items()}

    def vs2_facts(self) -> dict[str, Scalar]:
        """What the results' metrics say of the steering, as flat scalars."""
        return dict(self._facts)

    def encode_image(self, image: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The steered image embedding ``[batch, embed_dim]``, in the dtype of the model inside."""
        if self._edit is None:
            raise ModelStringError(
                f"model {str(self.spec)!r} does not know its data set yet; name a checkpoint ({self.spec.method.name}:"
                f"{self.spec.backbone}@NAME) or pass dataset= to vs2_plugin.load"
            )
        return self.model.encode_image(image, *args, **kwargs)

    def encode_text(self, text: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The text embedding; steering leaves it alone."""
        return self.model.encode_text(text, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass of the model inside."""
        return self.model(*args, **kwargs)
