"""One site at which a model is steered, with the steering, gate and retriever there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from threading import RLock, get_ident
from typing import TypeVar

import torch
from torch import Tensor, nn

from vs2_plugin.checkpoint.records import SiteSAE
from vs2_plugin.clip.sites import ClipModel, Site, embedding_from
from vs2_plugin.errors import PluginError
from vs2_plugin.method import Scalar
from vs2_plugin.model.builder import read_by_all, whose
from vs2_plugin.steering.batch import Batch, Steering, blamed, call, steer, unchanged
from vs2_plugin.steering.gate import Gate
from vs2_plugin.steering.move import Move
from vs2_plugin.steering.retriever import Retriever
from vs2_plugin.steering.tally import Tally

__all__ = ["Current", "Place"]

T = TypeVar("T")


class Current:
    """The batch that a tower is running on, and the lock by which threads that call a model wait for each other. One
    object is shared by a model and its places; a copy of the model shares another one with its own places."""

    def __init__(self) -> None:
        self.turn = RLock()
        self._batch: Batch | None = None
        self._thread = 0

    @property
    def batch(self) -> Batch | None:
        """The batch; None in another thread, which runs the tower at the same time without :meth:`running`."""
        return self._batch if torch.compiler.is_compiling() or self._thread == get_ident() else None

    @batch.setter
    def batch(self, batch: Batch | None) -> None:
        self._batch = batch
        if not torch.compiler.is_compiling():
            self._thread = get_ident()

    @contextmanager
    def running(self, batch: Batch) -> Iterator[None]:
        """Make ``batch`` the current batch within a ``with`` block that runs the tower on its images."""
        self.batch = batch
        try:
            yield
        finally:
            self.batch = None

    def __reduce__(self) -> tuple[type[Current], tuple[()]]:
        return Current, ()


class Place(nn.Module):
    """One site at which a model is steered."""

    def __init__(
        self,
        name: str,
        site: Site,
        facts: SiteSAE | None,
        steering: Steering,
        gate: Gate | None,
        retriever: Retriever | None,
        current: Current,
        weights: Mapping[str, Tensor],
    ) -> None:
        """``weights``: those of the model, by the names for messages."""
        super().__init__()
        #: Name of the method.
        self.name = name
        self.site = site
        self.retriever = retriever
        #: The checkpoint's record of the SAE here, if the method steers along one.
        self.facts = facts
        #: The method's own steering, without the gate.
        self.steering = steering
        #: The gate around the steering, where there is an SAE. It holds the SAE and the mean activation.
        self.gate = gate
        self.current = current
        self._weights = weights
        #: At the first place, if it is at the tower's end: the model, whose plain embedding the rest of the tower then
        #: computes from the activation here. In a tuple, so that the model is no submodule of its own steering.
        self.shows: tuple[ClipModel, ...] = ()
        #: Sums that tell whether a GPU, which is not waited for, steered to activations that are not finite.
        self.sums = Tally()

    @property
    def of_sae(self) -> dict[str, Scalar]:
        """Figures that identify the SAE here in the results; empty where there is none."""
        if self.gate is None:
            return {}
        config, trained = self.gate.sae.config, {} if self.facts is None else self.facts.training
        facts: dict[str, Scalar] = {"k": config.k, "latents": config.num_latents}
        facts["expansion"] = round(config.num_latents / config.d_in, 3)
        training = {"seed": trained.get("seed"), "pass_weight": trained.get("pass_weight") or None}
        return facts | {name: value for name, value in training.items() if value is not None}

    def steer(self, x: Tensor, batch: Batch, wait: bool = True) -> Tensor:
        """Return the activations ``[batch, d]`` of a batch of images, float32, steered where the gate is open.

        Raises:
            PluginError: the method failed, returned something else, or activations that are not finite though x is, or
                edited a tensor that is not its own. Without ``wait``, a GPU is not waited for: :meth:`require_finite`
                then raises the error for activations that are not finite.
        """
        return self._checked(self.gate or partial(steer, self.steering), x, batch, wait)

    def steer_all(self, x: Tensor, batch: Batch) -> Tensor:
        """Return the activations ``[batch, d]`` steered without the gate, otherwise as :meth:`steer` does."""
        return self._checked(partial(steer, self.steering), x, batch, True)

    def move(self, x: Tensor, batch: Batch) -> Move | None:
        """Return the method's move of activations ``[batch, d]``, without the gate; None if it does not return one.

        Raises:
            PluginError: the method failed, or edited a tensor that is not its own.
        """

        def move(x: Tensor, batch: Batch) -> Move | None:
            moved = call(self.steering, x, batch)
            if not isinstance(moved, Move):
                return None
            with blamed():
                _ = moved.code.direction  # which may be computed only now
            return moved

        return self._called(move, x, batch)

    def _called(self, function: Callable[[Tensor, Batch], T], x: Tensor, batch: Batch) -> T:
        sae = None if self.gate is None else self.gate.sae
        try:
            with unchanged(lambda: {"its activations": x, **read_by_all(sae, self.retriever, batch)}, self._weights):
                return function(x, batch)
        except PluginError as error:
            raise PluginError(f"{self.whose} failed at {self.site}: {error}") from error

    def _checked(self, steer: Callable[[Tensor, Batch], Tensor], x: Tensor, batch: Batch, wait: bool) -> Tensor:
        steered = self._called(steer, x, batch)
        if not wait and x.device.type != "cpu":
            self.sums.add(steered=steered.detach(), given=x.detach())
        elif not _is_finite(steered) and _is_finite(x):
            raise self._not_finite()
        return steered

    def require_finite(self) -> None:
        """Raise PluginError if finite activations were steered to NaN or infinity since :meth:`reset`.

        This checks the batches for which :meth:`steer` did not wait for the GPU.
        """
        means = self.sums.means()
        if means and not math.isfinite(means["steered"]) and math.isfinite(means["given"]):
            raise self._not_finite()

    def _not_finite(self) -> PluginError:
        return PluginError(
            f"{self.whose} steered to NaN or infinity at {self.site}; expected finite activations (a division by "
            "0, or a strength beyond float32?)"
        )

    def reset(self) -> None:
        """Forget the images seen so far."""
        for part in (self.sums, self.gate, self.steering):
            getattr(part, "reset", lambda: None)()

    @property
    def whose(self) -> str:
        """Name of the method and of its plugin, in words."""
        return whose(self.name)

    @property
    def replayable(self) -> bool:
        """Whether a GPU may replay the work of this place for every batch: the gate records no images, and the steering
        has a true attribute ``replayable``, which says that its work is the same for all batches and needs no CPU."""
        records_images = self.gate is not None and self.gate.recording
        return bool(getattr(self.steering, "replayable", False)) and not records_images

    def forward(self, x: Tensor) -> Tensor:
        """Steer activations ``[batch, d]`` in the tower that is running."""
        batch = self.current.batch
        if batch is None:  # the tower runs outside of encode_image
            return self.steer(x, Batch(), wait=False)
        if self.shows and batch.embed is None:
            batch.embed = lambda: embedding_from(self.shows[0], self.site, x)
        return self.steer(x, batch, wait=False)


def _is_finite(x: Tensor) -> bool:
    """Return whether all numbers are finite. The sum is tried first: if finite, it takes a twentieth of the time."""
    return bool(x.sum().isfinite() or x.isfinite().all())
