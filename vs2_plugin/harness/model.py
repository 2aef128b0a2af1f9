"""The steered model, as clip_benchmark sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vs2_plugin import __version__
from vs2_plugin.checkpoint.manifest import Checkpoint, SiteFacts
from vs2_plugin.clip.backbone import Loaded, Tower
from vs2_plugin.clip.sites import Edit, Site, default_site, edit, find_site
from vs2_plugin.errors import CheckpointError, ModelStringError, PluginError, Vs2Error
from vs2_plugin.method import Scalar
from vs2_plugin.modelstring import ModelString
from vs2_plugin.plugins import registry
from vs2_plugin.steering.context import Context, Task
from vs2_plugin.steering.gate import Gate, threshold

__all__ = ["SteeredCLIP"]

_LABELS = ("none", "train", "oracle")


class SteeredCLIP(nn.Module):
    """An open_clip model whose image activations are steered in every forward pass.

    It has the methods and attributes of the model inside (``encode_image``, ``encode_text``, ``generate``,
    ``logit_scale``, …). Steering sits in a hook of the vision tower, so whatever runs the tower is steered.
    """

    def __init__(
        self, spec: ModelString, loaded: Loaded, find_checkpoint: Callable[[Task | None], Checkpoint | None]
    ) -> None:
        super().__init__()
        self.model = loaded.model
        self.spec = spec
        self.checkpoint: Checkpoint | None = None
        self._tower = Tower.of(loaded.model, loaded.transform) if spec.method.needs_checkpoint else None
        self._find_checkpoint = find_checkpoint
        self._edits: list[Edit] = []
        self._gates: list[Gate] = []
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
        while self._edits:
            self._edits.pop().remove()
        self._gates = []
        self.checkpoint = checkpoint = self._find_checkpoint(task)
        device = next(self.model.parameters()).device
        if checkpoint is None:
            site = default_site(self.model)
            steerings = [(site, self._build(Context(self.model, site.hookpoint, site.width, task=task)))]
        else:
            checkpoint.require_tower(self._tower)
            steerings = [
                self._at(facts, device, task)
                for facts in checkpoint.select(self.spec.options["blocks"], self.spec.method.sae)
            ]
        # Only now, when all of it could be built, is the tower touched.
        for site, steering in steerings:
            if isinstance(steering, nn.Module):
                steering.to(device).eval()
            self._edits.append(edit(self.model, site, steering))
        self._facts = self._describe(steerings)

    def _at(self, facts: SiteFacts, device: torch.device, task: Task | None) -> tuple[Site, Gate]:
        """The gated steering along one SAE of the checkpoint."""
        site = find_site(self.model, facts.hookpoint)
        if site.width != facts.width:
            raise CheckpointError(
                f"checkpoint {self.checkpoint.name!r} has width {facts.width} at {site}, the tower has {site.width}"
            )
        sae, mean = self.checkpoint.load(facts)
        sae, mean = sae.to(device), mean.to(device)
        steering = self._build(Context(self.model, site.hookpoint, site.width, sae, mean, facts.fvu_quantiles, task))
        q = self.spec.options["gate"]
        gate = Gate(steering, sae, mean, None if q is None else threshold(facts.fvu_quantiles, q))
        self._gates.append(gate)
        return site, gate

    def _build(self, context: Context) -> Callable[[Tensor], Tensor]:
        method = self.spec.method
        options = {option.name: self.spec.options[option.name] for option in method.options}
        try:
            steering = method.build(context, **options)
        except Vs2Error:
            raise
        except Exception as error:
            owner = registry().owners.get(method.name, "?")
            raise PluginError(
                f"method {method.name!r} of {owner} could not be built: {type(error).__name__}: {error}"
            ) from error
        if not callable(steering):
            raise PluginError(
                f"method {method.name!r} built {steering!r}; expected a function from activations to activations"
            )
        return steering

    def _describe(self, steerings: list[tuple[Site, Callable]]) -> dict[str, Scalar]:
        checkpoint, method = self.checkpoint, self.spec.method
        facts = {
            "method": method.name,
            "version": __version__,
            "site": "+".join(site.hookpoint for site, _ in steerings),
        }
        facts |= {name: value for name, value in self.spec.options.items() if value is not None}
        last = steerings[-1][1]
        facts |= getattr(last.steering if isinstance(last, Gate) else last, "facts", {})
        labels = [method.labels]
        if checkpoint is not None:
            labels += [site.labels for site in checkpoint.select(self.spec.options["blocks"], method.sae)]
            facts |= {
                "checkpoint": checkpoint.name,
                "checkpoint_digest": checkpoint.digest[:16],
                "transductive": checkpoint.transductive,
            }
        facts["labels"] = max(labels, key=_LABELS.index)
        return facts

    def reset_statistics(self) -> None:
        """Forget the images seen so far; the harness glue calls this before each evaluation."""
        for gate in self._gates:
            gate.reset()

    def vs2_facts(self) -> dict[str, Scalar]:
        """What the results' metrics say of the steering, as flat scalars.

        ``vs2_coverage`` and ``vs2_mean_fvu`` are of the images seen since :meth:`reset_statistics`, at the last
        of several sites.
        """
        seen = self._gates[-1].facts if self._gates else {}
        return {f"vs2_{name}": value for name, value in {**self._facts, **seen}.items()}

    def encode_image(self, image: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The steered image embedding ``[batch, embed_dim]``, in the dtype of the model inside."""
        if not self._edits:
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
