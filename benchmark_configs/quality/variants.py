"""Other ways to train an SAE, each judged by its figures and by steering, on three seeds.

    python benchmark_configs/quality/variants.py --out DIR [--embeddings FILE.npz] [--only NAME ...]

Dense training in plain torch, with the settings of vs2-train-sae: what is compared differs in one thing. Each SAE is a
line of DIR/variants.jsonl as soon as it is trained; those that are there are passed over.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from judge import Dictionary, judge, together
from sources import Data, digits, embeddings
from table import write
from torch import Tensor

from vs2_plugin.sae.config import TrainConfig
from vs2_plugin.sae.fit import parted

SEEDS = (0, 1, 2)
#: Name -> what is done otherwise.
VARIANTS: dict[str, dict[str, float]] = {
    "plain": {},
    "off_l1_0.01": {"off": 0.01},
    "off_l1_0.1": {"off": 0.1},
    "off_l1_1": {"off": 1.0},
    "matryoshka": {"matryoshka": 1},
    "batch_topk": {"batch": 1},
    "archetypal": {"archetypal": 1},
}


class Trainer:
    """One training, by autograd over all latents."""

    def __init__(self, x: Tensor, config: TrainConfig, how: dict[str, float]) -> None:
        self.config, self.how = config.for_size(len(x)), how
        held, train = parted(len(x), config.seed)
        self.scale = ((x - x.mean(0)).square().mean()).sqrt()
        self.held, self.train = x[held] / self.scale, x[train] / self.scale
        width, torch_seed = x.shape[1], torch.Generator().manual_seed(config.seed)
        n = config.expansion_factor * width
        first = torch.randint(len(self.train), (n,), generator=torch_seed)
        other = (first + torch.randint(1, len(self.train), (n,), generator=torch_seed)) % len(self.train)
        start = F.normalize(self.train[first] - self.train[other], dim=1)
        self.mean = (x.mean(0) / self.scale).clone()
        self.bias = self.mean.clone().requires_grad_()
        self.encoder = (start / 2).requires_grad_()
        self.offset = torch.zeros(n, requires_grad=True)
        self.decoder = start.clone().requires_grad_()
        self.generator, self.threshold = torch_seed, 0.0
        if how.get("archetypal"):
            self._archetypes(n)
        self.silent = torch.zeros(n, dtype=torch.long)

    def _archetypes(self, n: int) -> None:
        """Directions are convex combinations of images' directions from the mean (arXiv 2502.12892), of half as many as
        there are images, at most 1,000."""
        count = min(1000, len(self.train) // 2)
        chosen = torch.randperm(len(self.train), generator=self.generator)[:count]
        self.points = F.normalize(self.train[chosen] - self.mean, dim=1)
        logits = 6 * F.one_hot(torch.randint(count, (n,), generator=self.generator), count).float()
        self.decoder = logits.requires_grad_()
        with torch.no_grad():
            self.encoder.copy_(self.directions() / 2)

    def directions(self) -> Tensor:
        """``[n, d]``, unit norm."""
        if self.how.get("archetypal"):
            return F.normalize(self.decoder.softmax(1) @ self.points, dim=1)
        return F.normalize(self.decoder, dim=1)

    def pre(self, x: Tensor) -> Tensor:
        return (x - self.bias) @ self.encoder.T + self.offset

    def code(self, pre: Tensor, training: bool = False) -> Tensor:
        """Dense codes ``[batch, n]``."""
        k = self.config.k
        if not self.how.get("batch"):
            values, places = pre.topk(k, dim=1)
            return torch.zeros_like(pre).scatter(1, places, values.relu())
        if training:
            positive = pre.relu()
            least = positive.flatten().topk(k * len(pre)).values[-1]
            return positive * (positive >= least)
        return pre * (pre > self.threshold)

    def loss(self, x: Tensor) -> Tensor:
        """FVU of the batch, AuxK, and what a variant adds."""
        pre, directions = self.pre(x), self.directions()
        code = self.code(pre, training=True)
        variance = (x - x.mean(0)).square().sum()
        n = len(directions)
        if self.how.get("matryoshka"):
            sizes = (n // 16, n // 4, n)
            parts = [x - code[:, :size] @ directions[:size] - self.bias for size in sizes]
            residual = parts[-1]
            loss = torch.stack([part.square().sum() for part in parts]).mean() / variance
        else:
            residual = x - code @ directions - self.bias
            loss = residual.square().sum() / variance
        if self.how.get("off"):  # arXiv 2606.27321: of the latents that are active in the batch, where not selected
            idle = (code == 0) & (code != 0).any(0)
            loss = loss + self.how["off"] * (pre.abs() * idle).sum() / idle.sum().clamp_min(1)
        dead = self.silent >= self.config.dead_after
        if dead.any():
            wanted = x.shape[1] // 2
            values, places = pre[:, dead].topk(min(wanted, int(dead.sum())), dim=1)
            guess = torch.zeros_like(pre[:, dead]).scatter(1, places, values.relu()) @ directions[dead]
            weight = self.config.auxk * min(1.0, dead.sum().item() / wanted)
            loss = loss + weight * (guess - residual.detach()).square().sum() / variance
        self.silent += 1
        self.silent[(code != 0).any(0)] = 0
        return loss

    def run(self) -> Dictionary:
        """Train; keep the weights of lowest FVU on what is held out."""
        config = self.config
        parameters = [self.bias, self.encoder, self.offset, self.decoder]
        optimizer = torch.optim.Adam(parameters, fused=True)
        steps = max(1, config.samples // config.sae_batch_size)
        warmup, best = max(1, round(config.warmup * steps)), (float("inf"), [], 0.0)
        waiting = torch.empty(0, dtype=torch.long)
        for step in range(1, steps + 1):
            while len(waiting) < config.sae_batch_size:
                waiting = torch.cat([waiting, torch.randperm(len(self.train), generator=self.generator)])
            chosen, waiting = waiting.split([config.sae_batch_size, len(waiting) - config.sae_batch_size])
            rate = config.lr * min(step / warmup, (steps - step + 1) / max(1, steps - warmup))
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            self.loss(self.train[chosen]).backward()
            optimizer.step()
            if not self.how.get("archetypal"):
                with torch.no_grad():
                    self.decoder.copy_(F.normalize(self.decoder, dim=1))
            if step % max(1, steps // 20) == 0 or step == steps:
                fvu = self._held_out()
                if fvu < best[0]:
                    best = fvu, [parameter.detach().clone() for parameter in parameters], self.threshold
        with torch.no_grad():
            for parameter, kept in zip(parameters, best[1], strict=True):
                parameter.copy_(kept)
        self.threshold = best[2]
        directions, scale = self.directions().detach(), self.scale

        @torch.no_grad()
        def code(x: Tensor) -> Tensor:
            return self.code(self.pre(x / scale)) * scale

        return Dictionary(code, directions, self.bias.detach() * scale)

    @torch.no_grad()
    def _held_out(self) -> float:
        if self.how.get("batch"):  # the threshold for inference: k are active in the mean
            pre = self.pre(self.train[:1024])
            self.threshold = max(0.0, pre.flatten().topk(self.config.k * len(pre)).values[-1].item())
        x = self.held
        rest = x - self.code(self.pre(x)) @ self.directions() - self.bias
        return (rest.square().sum() / (x - x.mean(0)).square().sum()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--embeddings", type=Path, nargs="*", default=[])
    parser.add_argument("--only", nargs="*", default=list(VARIANTS))
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--expansion_factor", type=int, default=4)
    parser.add_argument("--no_digits", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "variants.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(line["data"], line["variant"]) for line in lines}
    makers = [] if args.no_digits else [digits]
    for make in [*makers, *(partial(embeddings, file) for file in args.embeddings)]:
        data = make()
        for variant in args.only:
            if (data.name, variant) not in done:
                lines += rows(data, variant, args.samples, args.expansion_factor)
                path.write_text("".join(json.dumps(line) + "\n" for line in lines))
                print(json.dumps(lines[-1]), flush=True)
    write(lines, args.out / "variants.md", "variant")


def rows(data: Data, variant: str, samples: int, expansion: int) -> list[dict[str, Any]]:
    """Train one variant by all seeds, and judge it."""
    k = min(64, data.unlabeled.shape[1] // 8)
    configs = [TrainConfig(k=k, expansion_factor=expansion, seed=seed, samples=samples) for seed in SEEDS]
    found = [Trainer(data.unlabeled, config, VARIANTS[variant]).run() for config in configs]
    stable = dict(zip(("stability", "stable", "stability_random"), together(found, data), strict=True))
    return [
        {"data": data.name, "variant": variant, "seed": config.seed, **judge(one, data), **stable}
        for config, one in zip(configs, found, strict=True)
    ]


if __name__ == "__main__":
    main()
