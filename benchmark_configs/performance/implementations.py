"""Trainings of a top-k SAE: by this package, by plain PyTorch, and by other libraries' own trainers.

Each is a function of a shape, of batches and of ``keep``. It runs its own training loop over the batches, so that
whoever makes the batches can take the time of a step between two of them, and tells ``keep`` how to run the SAE.
It trains on the device that the batches are on. Logging is off everywhere. Settings are each library's defaults; where
a default warm-up (1,000 steps) is longer than a tenth of the run, it is a tenth of the run.
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
    """The batches ``[batch, d]`` of a training, all on one device; its length is the number of steps planned."""

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
    return torch.zeros(n, dtype=torch.bool, device=indices.device).index_fill_(0, indices[values != 0], True)


@torch.no_grad()
def floor(
    shape: Shape, batches: Batches, keep: Keep, dtype: torch.dtype = torch.float32, tf32: bool = False
) -> None:
    """No training: one product with the encoder and torch's top-k, which every step needs."""
    on_cpu = batches.first.device.type == "cpu"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    weight = nn.Linear(shape.d, shape.n, device=batches.first.device).weight
    for x in batches:
        # Elsewhere than on a CPU, sorting is work of its own, and no step needs it.
        F.linear(x.to(dtype), weight.to(dtype)).topk(shape.k, dim=-1, sorted=on_cpu)


def dense(shape: Shape, batches: Batches, keep: Keep, bfloat16: bool = False, compiled: bool = False) -> None:
    """Plain PyTorch: dense codes, autograd, Adam (the fused one, but on a CPU)."""
    device = batches.first.device
    encoder = nn.Linear(shape.d, shape.n, device=device)
    nn.init.zeros_(encoder.bias)
    decoder = nn.Parameter(F.normalize(encoder.weight.detach()))
    bias = nn.Parameter(batches.first.mean(0))
    optimizer = torch.optim.Adam([*encoder.parameters(), decoder, bias], lr=1e-3, fused=device.type != "cpu")

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            pre = encoder(x - bias).relu()
            values, indices = pre.topk(shape.k, dim=-1, sorted=False)
            codes = torch.zeros_like(pre).scatter(-1, indices, values)
            return codes @ decoder + bias, codes

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        guess, codes = run(x)
        return guess, (codes != 0).any(0)

    def fvu(x: Tensor) -> Tensor:
        return (x - run(x)[0]).pow(2).sum() / (x - x.mean(0)).pow(2).sum()

    if compiled:
        torch.compiler.reset()  # what was compiled for another shape would be generalised to both
        fvu = torch.compile(fvu, dynamic=False)
    keep(reconstruct)
    for x in batches:
        loss = fvu(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            decoder /= decoder.norm(dim=1, keepdim=True)


def vs2(shape: Shape, batches: Batches, keep: Keep, float32: bool = False) -> None:
    """This package: the steps of :func:`vs2_plugin.sae.train.train_saes`; ``float32``: with the product in float32."""
    from vs2_plugin.sae import train
    from vs2_plugin.sae.config import TrainConfig
    from vs2_plugin.sae.source import Source

    samples = len(batches) * shape.batch
    config = TrainConfig(expansion_factor=shape.n // shape.d, k=shape.k, sae_batch_size=shape.batch, samples=samples)
    # What the trainer looks at before it starts, with enough beside those that it holds out.
    known = batches.first.cpu().repeat(2, 1).numpy()
    run = train._Run(train.Job("SAE", known, config), Source(known, batches.first.device))
    if float32:
        run._precision = run._precision._replace(product=None)

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
        self.device = self.rows.device
        self.dummy_inputs = {"input_ids": torch.zeros(1, len(self.rows), dtype=torch.long, device=self.device)}

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
    from sparsify import utils
    from sparsify.config import SparseCoderConfig, TrainConfig

    source = _Source(batches)
    if source.device.type == "cuda" and utils.decoder_impl is utils.eager_decode:
        raise RuntimeError("sparsify would decode without its Triton kernels; expected triton")
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


def saelens(shape: Shape, batches: Batches, keep: Keep, autocast: bool = False) -> None:
    """SAELens: its ``SAETrainer`` and ``TopKTrainingSAE``; ``autocast`` is an option of its."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    device = str(batches.first.device)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=shape.d, d_sae=shape.n, k=shape.k, device=device))
    config = SAETrainerConfig(
        device=device,
        autocast=autocast,
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


def overcomplete(shape: Shape, batches: Batches, keep: Keep, amp: bool = False) -> None:
    """overcomplete: its ``TopKSAE`` and ``train_sae`` (or ``train_sae_amp``), with its README's optimizer and loss."""
    from overcomplete.sae import TopKSAE
    from overcomplete.sae.train import train_sae, train_sae_amp

    device = batches.first.device.type
    sae = TopKSAE(shape.d, nb_concepts=shape.n, top_k=shape.k, device=device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=5e-4)

    def criterion(x: Tensor, x_hat: Tensor, pre_codes: Tensor, codes: Tensor, dictionary: Tensor) -> Tensor:
        return (x - x_hat).square().mean()

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        sae.eval()
        _, codes, guess = sae(x)
        sae.train()
        return guess, (codes != 0).any(0)

    keep(reconstruct)
    train = train_sae_amp if amp else train_sae
    train(sae, batches, criterion, optimizer, nb_epochs=1, monitoring=0, device=device)


def dictionary_learning(shape: Shape, batches: Batches, keep: Keep, dtype: torch.dtype = torch.float32) -> None:
    """dictionary-learning: its ``trainSAE`` and ``TopKTrainer``; ``dtype`` is that of its autocast, on a GPU."""
    from dictionary_learning.trainers.top_k import TopKTrainer
    from dictionary_learning.training import trainSAE

    def make(**settings) -> TopKTrainer:
        trainer = TopKTrainer(**settings)

        def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
            guess, codes = trainer.ae(x, output_features=True)
            return guess, (codes != 0).any(0)

        keep(reconstruct)
        return trainer

    device = str(batches.first.device)
    settings = {
        "trainer": make,
        "steps": len(batches),
        "activation_dim": shape.d,
        "dict_size": shape.n,
        "k": shape.k,
        "warmup_steps": warmup(batches),
        "layer": 0,
        "lm_name": "synthetic",
        "device": device,
    }
    trainSAE(batches, [settings], steps=len(batches), device=device, autocast_dtype=dtype)


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
        trainer = library.SaeTrainer(config, range(len(batches) * shape.batch), batches.first.device)

        def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
            out = trainer.sae(x)
            return out.sae_out, used(out.latent_indices, out.latent_acts, shape.n)

        keep(reconstruct)
        library.DataLoader = lambda *args, **kwargs: batches
        trainer.fit()


class _Loader:
    """What saev's trainer takes for the loader of its own files."""

    drop_last = True

    def __init__(self, shape: Shape, batches: Batches) -> None:
        self.batch_size, self._batches = shape.batch, batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return ({"act": x} for x in self._batches)


def saev(shape: Shape, batches: Batches, keep: Keep) -> None:
    """saev 0.1, the release on PyPI: its ``train``. Its SAE has no top-k, but ReLU and an L1 loss; nothing is kept."""
    import saev.training as library
    from saev import config

    settings = config.Train(
        data=config.DataLoad(),
        n_patches=len(batches) * shape.batch,
        sae=config.SparseAutoencoder(d_vit=shape.d, exp_factor=shape.n // shape.d),
        n_lr_warmup=warmup(batches, 500),
        sae_batch_size=shape.batch,
        track=False,
        log_every=10**9,
        device=str(batches.first.device),
    )
    library.ParallelWandbRun = lambda *args: None
    library.activations.Dataset = lambda *args: batches
    torch.utils.data.DataLoader = lambda *args, **kwargs: _Loader(shape, batches)
    library.train([settings])


#: Name -> implementation.
IMPLEMENTATIONS = {
    "floor": Implementation("torch", floor),
    "floor_tf32": Implementation("torch", partial(floor, tf32=True)),
    "floor_bfloat16": Implementation("torch", partial(floor, dtype=torch.bfloat16)),
    "vs2": Implementation("vs2_plugin.sae.train", vs2),
    "vs2_float32": Implementation("vs2_plugin.sae.train", partial(vs2, float32=True)),
    "dense": Implementation("torch", dense),
    "dense_bfloat16": Implementation("torch", partial(dense, bfloat16=True)),
    "dense_compiled": Implementation("torch", partial(dense, bfloat16=True, compiled=True)),
    "sparsify": Implementation("sparsify.trainer", sparsify, "eai-sparsify"),
    "sparsify_adam": Implementation("sparsify.trainer", partial(sparsify, optimizer="adam"), "eai-sparsify"),
    "saelens": Implementation("sae_lens", saelens, "sae-lens"),
    "saelens_autocast": Implementation("sae_lens", partial(saelens, autocast=True), "sae-lens"),
    "overcomplete": Implementation("overcomplete.sae", overcomplete, "overcomplete"),
    "overcomplete_amp": Implementation("overcomplete.sae", partial(overcomplete, amp=True), "overcomplete"),
    "dictionary_learning": Implementation("dictionary_learning.training", dictionary_learning, "dictionary-learning"),
    "dictionary_learning_autocast": Implementation(
        "dictionary_learning.training", partial(dictionary_learning, dtype=torch.bfloat16), "dictionary-learning"
    ),
    "latentsae": Implementation("latentsae.trainer", latentsae, "latentsae"),
    "saev": Implementation("saev.training", saev, "saev"),
}
