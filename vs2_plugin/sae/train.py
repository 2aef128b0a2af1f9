"""Trains SAEs on stored activations."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from vs2_plugin.distributed import ALONE, Processes, total
from vs2_plugin.errors import DataError, SettingError
from vs2_plugin.sae.config import TrainConfig
from vs2_plugin.sae.fit import Fit, fit_of, held_out_fvu, parted
from vs2_plugin.sae.product import Precision, Room
from vs2_plugin.sae.source import Device, Rows, Source, ahead, batches_of, chunks
from vs2_plugin.sae.state import SavedState
from vs2_plugin.sae.step import ClassMeans, set_gradients
from vs2_plugin.sae.topk import SaeConfig, TopKSAE
from vs2_plugin.seeds import seeded
from vs2_plugin.text import sentence_of

if TYPE_CHECKING:
    from vs2_plugin.sae.gpu import GpuStep

__all__ = ["Figures", "Job", "Trained", "require_enough", "train_sae", "train_saes"]

_LOG = logging.getLogger(__name__)
_FEWEST = 20  # activations that an SAE is trained on
_EVALUATIONS = 20  # held-out evaluations per training
_WATCHED_MAX = 2_000  # held-out activations looked at to choose the weights to keep
_ASKED = 16  # steps between checks whether any latent is dead: on a GPU, a check waits for all queued work


@dataclass(frozen=True)
class Figures(Fit):
    """Figures of a training, and of how well its SAE fits."""

    train_count: int
    """Activations trained on."""
    held_out_count: int
    """Activations held out."""
    steps: int
    """Optimizer steps."""
    seconds: float
    """Wall-clock time of the training, which includes the SAEs trained in the same pass."""


@dataclass(frozen=True)
class Job:
    """One SAE to train."""

    name: str
    """Name in the progress bar."""
    activations: Rows
    """``[count, d]``; a memory-mapped array, or a stack of such, stays on disk."""
    config: TrainConfig
    labels: np.ndarray | None = None
    """int64 ``[count]``, for PASS."""


class Trained(NamedTuple):
    """A trained SAE."""

    sae: TopKSAE
    """float32, on the CPU."""
    mean: Tensor
    """μ ``[d]``, the mean activation."""
    figures: Figures


def train_sae(
    activations: Rows,
    config: TrainConfig,
    *,
    labels: np.ndarray | None = None,
    device: Device = "cpu",
    quiet: bool = False,
) -> Trained:
    """Train an SAE on activations ``[count, d]``; see :func:`train_saes`."""
    return train_saes([Job("SAE", activations, config, labels)], device=device, quiet=quiet)[0]


def train_saes(
    jobs: Sequence[Job],
    *,
    calibration: np.ndarray | None = None,
    device: Device = "cpu",
    quiet: bool = False,
    processes: Processes = ALONE,
    states: Path | None = None,
    save_every: float = 60.0,
) -> list[Trained]:
    """Train SAEs on activations of the same images: at several sites, of several sizes, by several seeds.

    SAEs of the same seed, batch size and number of samples share one pass: each batch is read once for all SAEs of its
    site. The result for each SAE is the same as if it were trained alone.

    The loss is the batch's FVU, ``Σ‖x - x̃‖² / Σ‖x - batch mean‖²``, plus ``auxk`` times what dead latents fail to
    explain of the residual, over the same variance (:mod:`vs2_plugin.sae.step`). A tenth of the activations, at most
    10,000, is held out; the weights kept are those of lowest FVU on held-out activations (2,000 at most, evaluated 20
    times).

    With ``pass_weight``, the loss has the term of PASS (:class:`vs2_plugin.sae.step.ClassMeans`), which trades FVU for
    codes that agree within a class: labels are needed, and the weights kept are the last ones.

    ``calibration`` (bool ``[count]``) says which activations the FVU quantiles are taken over; by default all.

    Joined ``processes`` call this with the same arguments and share each batch; all get the same result.

    ``states`` is a folder for this training alone, shared by all processes, to which its state is saved every
    ``save_every`` seconds. An interrupted training continues from the saved state and ends with the same bits.

    Raises:
        DataError: too few activations, all of them equal, or values that are not finite; or the training diverged.
        SettingError: k above the number of latents.
    """
    jobs = _filled(jobs, processes)
    arrays = {id(job.activations): job.activations for job in jobs}
    sources = {key: Source(rows, device) for key, rows in arrays.items()}
    passes: dict[tuple[int, int, int], list[int]] = {}
    for index, job in enumerate(jobs):
        passes.setdefault((job.config.seed, job.config.sae_batch_size, job.config.samples), []).append(index)
    trained: dict[int, Trained] = {}
    for number, together in enumerate(passes.values()):
        runs = [_Run(jobs[index], sources[id(jobs[index].activations)]) for index in together]
        saved = None if states is None else SavedState(states / f"{number}.safetensors", save_every, processes.first)
        _train_together(runs, quiet, processes, saved)
        trained.update({index: run.finish(calibration) for index, run in zip(together, runs, strict=True)})
    return [trained[index] for index in range(len(jobs))]


def require_enough(count: int, what: str) -> None:
    """Raise DataError, which names what is counted, if an SAE cannot be trained on so few."""
    if count < _FEWEST:
        raise DataError(f"{count} {what} are too few to train an SAE; expected at least {_FEWEST}")


def _filled(jobs: Sequence[Job], processes: Processes) -> list[Job]:
    """Return the jobs with all settings filled in. Raises DataError or SettingError if one cannot be trained."""
    count = len(jobs[0].activations)
    require_enough(count, "activations")
    jobs = [replace(job, config=job.config.for_size(count)) for job in jobs]
    for job in jobs:
        if job.config.pass_weight and job.labels is None:
            raise DataError("pass_weight is set, but there are no labels; PASS needs one per activation")
        if job.config.sae_batch_size < processes.world:
            size = job.config.sae_batch_size
            raise SettingError(f"sae_batch_size is {size}; expected at least one activation per process")
    return jobs


def _train_together(runs: Sequence[_Run], quiet: bool, processes: Processes, saved: SavedState | None) -> None:
    """Train SAEs that see the same batches, in one pass."""
    first = runs[0]
    name = first.job.name if len(runs) == 1 else f"{len(runs)} SAEs"
    done = 0 if saved is None else _restore(runs, saved)
    shown = tqdm(
        total=first.steps * first.batch_size,
        initial=done * first.batch_size,
        desc=name,
        unit="act",
        unit_scale=True,
        disable=True if quiet else None,
    )
    sources = {id(run.source): run.source for run in runs}
    whole = islice(batches_of(first.train, first.batch_size, first.job.config.seed), done, first.steps)
    batches = ahead((batch[processes.rank :: processes.world] for batch in whole), sources.values())
    with _threads_for(max(run.work for run in runs)), shown as bar:
        for step, chosen in enumerate(batches, done + 1):
            read = {key: source.read(chosen) for key, source in sources.items()}
            for run in runs:
                run.step(read[id(run.source)], chosen, step)
            bar.update(first.batch_size)
            if step % max(1, first.steps // _EVALUATIONS) == 0 or step == first.steps:
                fvus, dead = zip(*(run.look() for run in runs), strict=True)
                bar.set_postfix(FVU=f"{np.mean(fvus):.4f}", dead=f"{max(dead):.3f}")
            if saved is not None and saved.is_due(last=step == first.steps):
                _save(runs, step, saved)


def _save(runs: Sequence[_Run], step: int, saved: SavedState) -> None:
    saved.write({f"{number}.{key}": value for number, run in enumerate(runs) for key, value in run.state(step)})


def _restore(runs: Sequence[_Run], saved: SavedState) -> int:
    """Restore the saved state of runs, if there is one, and return the number of steps done."""
    tensors = saved.read()
    if not tensors:
        return 0
    for number, run in enumerate(runs):
        prefix = f"{number}."
        run.restore({key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)})
    done = int(tensors["0.step"])
    _LOG.info("the training continues after %s of %s steps", f"{done:,}", f"{runs[0].steps:,}")
    return done


class _Run:
    """The training of one SAE."""

    def __init__(self, job: Job, source: Source) -> None:
        config, mean, variance, device = job.config, source.mean, source.variance, source.device
        self.job, self.source, self.device, self._started = job, source, device, time.monotonic()
        count, width = source.shape
        held, self.train = parted(count, config.seed)
        self.held, self.watched = np.sort(held), np.sort(held[:_WATCHED_MAX])
        self.batch_size = min(config.sae_batch_size, len(self.train))
        self.steps = max(1, config.samples // self.batch_size)
        source.check()
        self.scale = (variance / width) ** 0.5 if config.rescale else 1.0

        with seeded(config.seed):
            self.sae = TopKSAE(SaeConfig(width, config.expansion_factor * width, config.k, config.activation))
        self.work = self.batch_size * width * self.sae.config.num_latents
        with torch.no_grad():
            self.sae.b_dec.copy_(mean / self.scale)
        if config.init == "data":
            _start_from_data(self.sae, source, self.train, config.seed)
        self.sae.to(device)
        self._classes: ClassMeans | None = None
        self._labels: Tensor | None = None
        if config.pass_weight:
            classes, labels = np.unique(np.asarray(job.labels), return_inverse=True)
            self._classes = ClassMeans(config.pass_weight, len(classes), config.pass_means == "running")
            self._labels = torch.from_numpy(labels).to(device)
        self._optimizer = torch.optim.Adam([p for p in self.sae.parameters() if p.requires_grad], fused=True)
        self._precision = Precision.fastest(
            self.sae.b_dec.device, self.batch_size, width, self.sae.config.num_latents
        )  # fmt: skip
        self._silent = torch.zeros(self.sae.config.num_latents, dtype=torch.long, device=device)
        self._best: tuple[float, dict[str, Tensor]] = (math.inf, {})
        self._last = math.inf
        self._gpu = _gpu_step(self.sae, self._optimizer, self._silent, self.scale)
        self._any_dead = False
        self._room = Room()

    def step(self, x: Tensor, chosen: np.ndarray, step: int) -> None:
        """Take one training step, number ``step``, on activations ``[batch, d]`` of row numbers ``chosen``."""
        config, sae = self.job.config, self.sae
        own = None if self._labels is None else self._labels[chosen]
        warmup = max(1, round(config.warmup * self.steps))
        rate = config.lr * min(step / warmup, (self.steps - step + 1) / max(1, self.steps - warmup))
        if self._gpu is not None:
            if step % _ASKED == 0:
                self._any_dead = bool(self._dead().any())
            self._gpu.step(x, rate, step, self._dead() if self._any_dead else None, config.auxk, self._classes, own)
            return
        dead = self._dead()
        x = torch.div(x, self.scale, out=self._room.like(x, "batch"))
        _, latents = set_gradients(sae, x, dead, config.auxk, self._precision, self._classes, own, self._room)
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()
        sae.normalize_decoder()
        active = torch.zeros_like(self._silent)
        active.index_add_(0, latents.indices.flatten(), (latents.values != 0).long().flatten())
        self._silent += 1
        self._silent.masked_fill_(total(active) > 0, 0)

    def _dead(self) -> Tensor:
        return self._silent >= self.job.config.dead_after

    def look(self) -> tuple[float, float]:
        """Return the FVU on the watched activations and the share of dead latents. Keep the weights if their FVU is the
        lowest so far; with PASS, which does not aim at the FVU alone, always."""
        self._last = held_out_fvu(self.sae, self.source, self.watched, self.scale)
        if self._last < self._best[0] or (self._classes is not None and math.isfinite(self._last)):
            self._best = (self._last, {key: value.clone() for key, value in self.sae.state_dict().items()})
        return self._last, self._dead().float().mean().item()

    def state(self, step: int) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors that later steps depend on, by name."""
        yield "step", torch.tensor(step)
        yield "seconds", torch.tensor(time.monotonic() - self._started, dtype=torch.double)
        yield "silent", self._silent
        yield "any_dead", torch.tensor(self._any_dead)
        yield "last", torch.tensor(self._last, dtype=torch.double)
        yield "best", torch.tensor(self._best[0], dtype=torch.double)
        yield from ((f"sae.{name}", value) for name, value in self.sae.state_dict().items())
        yield from ((f"best.{name}", value) for name, value in self._best[1].items())
        for number, entries in self._optimizer.state_dict()["state"].items():
            moments = {**entries, "step": torch.tensor(float(step))}  # GpuStep does not count steps in the optimizer
            yield from ((f"adam.{number}.{name}", value) for name, value in moments.items())
        if self._classes is not None and self._classes.kept is not None:
            yield from zip(("means", "seen"), self._classes.kept, strict=True)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore the tensors that :meth:`state` yielded."""

        def under(prefix: str) -> dict[str, Tensor]:
            return {key.removeprefix(prefix): state[key].to(self.device) for key in state if key.startswith(prefix)}

        self._started -= float(state["seconds"])
        self._silent.copy_(state["silent"])
        self._any_dead = bool(state.get("any_dead", False))
        self._last = float(state["last"])
        self._best = float(state["best"]), under("best.")
        self.sae.load_state_dict(under("sae."))
        if self._gpu is not None:
            self._gpu.read_weights()
        adam: dict[int, dict[str, Tensor]] = {}
        for key, value in under("adam.").items():
            number, _, name = key.partition(".")
            adam.setdefault(int(number), {})[name] = value
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": adam})
        if self._classes is not None and "means" in state:
            self._classes.kept = state["means"].to(self.device), state["seen"].to(self.device)

    def finish(self, calibration: np.ndarray | None) -> Trained:
        """Return the SAE with the weights that were kept, for activations as they are stored, without the rescaling."""
        sae, source = self.sae, self.source
        if not self._best[1]:
            rate = self.job.config.lr
            raise DataError(f"the training diverged (held-out FVU {self._last}); lower --lr, now {rate:g}")
        sae.load_state_dict(self._best[1])
        # x / s = W_decᵀ c + b  ⇒  x = W_decᵀ (s c) + s b, and s c = TopK(W_enc (x - s b_dec) + s b_enc).
        with torch.no_grad():
            sae.b_dec.mul_(self.scale)
            sae.encoder.bias.mul_(self.scale)
        sae.eval().requires_grad_(False)
        calibrated = self.held if calibration is None else self.held[calibration[self.held]]
        fit = fit_of(sae, source, self.held, calibrated, self.train)
        figures = Figures(
            **vars(fit),
            train_count=len(self.train),
            held_out_count=len(self.held),
            steps=self.steps,
            seconds=round(time.monotonic() - self._started, 2),
        )
        return Trained(sae.cpu(), source.mean, figures)


@torch.no_grad()
def _gpu_step(sae: TopKSAE, optimizer: torch.optim.Adam, silent: Tensor, scale: float) -> GpuStep | None:
    """Return the fast training step for ``sae`` on its GPU; None on a CPU, or where the kernels do not run."""
    device = sae.W_dec.device
    if device.type != "cuda":
        return None
    try:
        from vs2_plugin.sae.gpu import GpuStep

        return GpuStep(sae, optimizer, silent, scale)
    except Exception as error:  # a missing compiler, an older torch or an older GPU raise various errors
        _LOG.warning(
            "on %s the SAE trains by torch's own operators, several times slower than by this package's kernels: %s",
            torch.cuda.get_device_name(device), sentence_of(error),
        )  # fmt: skip
        return None


@contextmanager
def _threads_for(work: int) -> Iterator[None]:
    """Limit torch to one thread where ``work`` (multiplications per step) is small: more threads gain nothing then, and
    on a busy machine waiting for them costs much time."""
    usual = torch.get_num_threads()
    if work < 10**8:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


@torch.no_grad()
def _start_from_data(sae: TopKSAE, source: Source, train: np.ndarray, seed: int) -> None:
    rng = np.random.default_rng([seed, 2])
    for latents in chunks(np.arange(sae.config.num_latents)):
        first = rng.integers(len(train), size=len(latents))
        second = (first + rng.integers(1, len(train), size=len(latents))) % len(train)  # never equal to first
        source.ask(train[np.concatenate([first, second])])
        differences = F.normalize(source.read(train[first]).cpu() - source.read(train[second]).cpu())
        # Two equal activations have no direction between them: such latents keep their random direction.
        sae.W_dec[latents] = torch.where(differences.any(1, keepdim=True), differences, sae.W_dec[latents])
    sae.encoder.weight.copy_(sae.W_dec / 2)
