"""Trainings of a top-k SAE: by this package, by plain PyTorch, and by other libraries' own trainers.

Each is a function of a shape, of batches and of ``keep``. It runs its own training loop over the batches, so that
whoever makes the batches can take the time of a step between two of them, and tells ``keep`` how to run the SAE.
Logging is off everywhere. Settings are each library's defaults; where a default warm-up (1,000 steps) is longer than
a tenth of the run, it is a tenth of the run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["IMPLEMENTATIONS", "Batches", "Implementation", "Shape"]


@dataclass(frozen=True)
class Shape:
    """What is trained."""

    d: int
    n: int
    k: int
    batch: int


class Batches(Protocol):
    """The batches ``[batch, d]`` of a training; its length is the number of steps planned."""

    first: Tensor

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Tensor]: ...


#: Activations ``[batch, d]`` to their reconstruction, and which latents were active for any of them, bool ``[n]``.
Reconstruct = Callable[[Tensor], tuple[Tensor, Tensor]]
Keep = Callable[[Reconstruct], None]


@dataclass(frozen=True)
class Implementation:
    """One of them."""

    module: str
    """What it needs to import; the memory that this takes is told apart."""
    train: Callable[[Shape, Batches, Keep], None]
    """Train."""
    package: str = ""
    """What to install."""


def warmup(batches: Batches, usual: int = 1000) -> int:
    """Warm-up steps: the library's, at most a tenth of the run."""
    return min(usual, len(batches) // 10)


def used(indices: Tensor, values: Tensor, n: int) -> Tensor:
    """Which latents are active, of a sparse code: bool ``[n]``."""
    return torch.zeros(n, dtype=torch.bool).index_fill_(0, indices[values != 0], True)


@torch.no_grad()
def floor(shape: Shape, batches: Batches, keep: Keep, dtype: torch.dtype = torch.float32) -> None:
    """No training: one product with the encoder and torch's top-k, which every step needs."""
    weight = nn.Linear(shape.d, shape.n).weight
    for x in batches:
        F.linear(x.to(dtype), weight.to(dtype)).topk(shape.k, dim=-1)


def dense(shape: Shape, batches: Batches, keep: Keep, bfloat16: bool = False) -> None:
    """Plain PyTorch: dense codes, autograd, Adam."""
    encoder = nn.Linear(shape.d, shape.n)
    nn.init.zeros_(encoder.bias)
    decoder = nn.Parameter(F.normalize(encoder.weight.detach()))
    bias = nn.Parameter(batches.first.mean(0))
    optimizer = torch.optim.Adam([*encoder.parameters(), decoder, bias], lr=1e-3)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            pre = encoder(x - bias).relu()
            values, indices = pre.topk(shape.k, dim=-1, sorted=False)
            codes = torch.zeros_like(pre).scatter(-1, indices, values)
            return codes @ decoder + bias, codes

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        guess, codes = run(x)
        return guess, (codes != 0).any(0)

    keep(reconstruct)
    for x in batches:
        loss = (x - run(x)[0]).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            decoder /= decoder.norm(dim=1, keepdim=True)


def vs2(shape: Shape, batches: Batches, keep: Keep, float32: bool = False) -> None:
    """This package: the steps of :func:`vs2_plugin.sae.train.train_saes`."""
    from vs2_plugin.sae import train
    from vs2_plugin.sae.config import TrainConfig

    samples = len(batches) * shape.batch
    config = TrainConfig(expansion_factor=shape.n // shape.d, k=shape.k, sae_batch_size=shape.batch, samples=samples)
    known = batches.first.numpy()  # what the trainer looks at before it starts
    run = train._Run(train.Job("SAE", known, config), *train._moments(known), "cpu")
    run._bfloat16 = run._bfloat16 and not float32

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        latents = run.sae.encode(x / run.scale)
        return run.sae.decode(latents) * run.scale, used(latents.indices, latents.values, shape.n)

    keep(reconstruct)
    for step, x in enumerate(batches, 1):
        run.step(x, None, step)


class _Source(nn.Module):
    """What sparsify's trainer takes for a language model: its activations are the batches."""

    def __init__(self, batches: Batches) -> None:
        super().__init__()
        self.tap = nn.Identity()
        self.rows = batches.first
        self.device = torch.device("cpu")
        self.dummy_inputs = {"input_ids": torch.zeros(1, len(self.rows), dtype=torch.long)}

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.tap(self.rows[None])

    def tokens(self, batches: Batches) -> Iterator[dict[str, Tensor]]:
        for rows in batches:
            self.rows = rows
            yield self.dummy_inputs


def sparsify(shape: Shape, batches: Batches, keep: Keep, optimizer: str = "signum") -> None:
    """EleutherAI sparsify: its ``Trainer`` and ``SparseCoder``."""
    import sparsify.trainer as library
    from sparsify.config import SparseCoderConfig, TrainConfig

    source = _Source(batches)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            SparseCoderConfig(num_latents=shape.n, k=shape.k),
            batch_size=1,
            optimizer=optimizer,
            lr_warmup_steps=warmup(batches),
            hookpoints=["tap"],
            save_every=10**9,
            log_to_wandb=False,
            save_dir=folder,
        )
        trainer = library.Trainer(config, range(len(batches)), source)
        (sae,) = trainer.saes.values()

        def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
            free = [one for one in trainer.optimizers if hasattr(one, "eval")]  # schedule-free: averaged weights
            for one in free:
                one.eval()
            out = sae(x)
            for one in free:
                one.train()
            return out.sae_out, used(out.latent_indices, out.latent_acts, shape.n)

        keep(reconstruct)
        library.DataLoader = lambda *args, **kwargs: source.tokens(batches)
        trainer.fit()


def saelens(shape: Shape, batches: Batches, keep: Keep) -> None:
    """SAELens: its ``SAETrainer`` and ``TopKTrainingSAE``."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=shape.d, d_sae=shape.n, k=shape.k))
    config = SAETrainerConfig(
        total_training_samples=len(batches) * shape.batch,
        train_batch_size_samples=shape.batch,
        lr_end=3e-4,  # it asks for one, though its default rate is constant
    )

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        codes = sae.encode(x)
        return sae.decode(codes), (codes != 0).any(0)

    keep(reconstruct)
    try:
        SAETrainer(config, sae, iter(batches)).fit()
    except StopIteration:  # batches ended before the number planned
        pass


def overcomplete(shape: Shape, batches: Batches, keep: Keep) -> None:
    """overcomplete: its ``TopKSAE`` and ``train_sae``, with the optimizer and the loss of its README."""
    from overcomplete.sae import TopKSAE, train_sae

    sae = TopKSAE(shape.d, nb_concepts=shape.n, top_k=shape.k)
    optimizer = torch.optim.Adam(sae.parameters(), lr=5e-4)

    def criterion(x: Tensor, x_hat: Tensor, pre_codes: Tensor, codes: Tensor, dictionary: Tensor) -> Tensor:
        return (x - x_hat).square().mean()

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        sae.eval()
        _, codes, guess = sae(x)
        sae.train()
        return guess, (codes != 0).any(0)

    keep(reconstruct)
    train_sae(sae, batches, criterion, optimizer, nb_epochs=1, monitoring=0)


def dictionary_learning(shape: Shape, batches: Batches, keep: Keep) -> None:
    """dictionary-learning: its ``trainSAE`` and ``TopKTrainer``."""
    from dictionary_learning.trainers.top_k import TopKTrainer
    from dictionary_learning.training import trainSAE

    def make(**settings) -> TopKTrainer:
        trainer = TopKTrainer(**settings)

        def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
            guess, codes = trainer.ae(x, output_features=True)
            return guess, (codes != 0).any(0)

        keep(reconstruct)
        return trainer

    settings = {
        "trainer": make,
        "steps": len(batches),
        "activation_dim": shape.d,
        "dict_size": shape.n,
        "k": shape.k,
        "warmup_steps": warmup(batches),
        "layer": 0,
        "lm_name": "synthetic",
        "device": "cpu",
    }
    trainSAE(batches, [settings], steps=len(batches), device="cpu")


def latentsae(shape: Shape, batches: Batches, keep: Keep) -> None:
    """latentsae: its ``SaeTrainer`` and ``Sae``."""
    import latentsae.trainer as library
    from latentsae import SaeConfig, TrainConfig

    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            SaeConfig(num_latents=shape.n, k=shape.k),
            d_in=shape.d,
            batch_size=shape.batch,
            lr_warmup_steps=warmup(batches),
            log_to_wandb=False,
            checkpoints_directory=folder,
            save_every=10**9,
        )
        trainer = library.SaeTrainer(config, range(len(batches) * shape.batch), torch.device("cpu"))

        def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
            out = trainer.sae(x)
            return out.sae_out, used(out.latent_indices, out.latent_acts, shape.n)

        keep(reconstruct)
        library.DataLoader = lambda *args, **kwargs: batches
        trainer.fit()


#: Name -> implementation.
IMPLEMENTATIONS = {
    "floor": Implementation("torch", floor),
    "floor_bfloat16": Implementation("torch", partial(floor, dtype=torch.bfloat16)),
    "vs2": Implementation("vs2_plugin.sae.train", vs2),
    "vs2_float32": Implementation("vs2_plugin.sae.train", partial(vs2, float32=True)),
    "dense": Implementation("torch", dense),
    "dense_bfloat16": Implementation("torch", partial(dense, bfloat16=True)),
    "sparsify": Implementation("sparsify.trainer", sparsify, "eai-sparsify"),
    "sparsify_adam": Implementation("sparsify.trainer", partial(sparsify, optimizer="adam"), "eai-sparsify"),
    "saelens": Implementation("sae_lens", saelens, "sae-lens"),
    "overcomplete": Implementation("overcomplete.sae", overcomplete, "overcomplete"),
    "dictionary_learning": Implementation("dictionary_learning.training", dictionary_learning, "dictionary-learning"),
    "latentsae": Implementation("latentsae.trainer", latentsae, "latentsae"),
}
