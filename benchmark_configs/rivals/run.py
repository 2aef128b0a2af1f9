"""All methods beside each other, by what they see: on the demo's digits, or on a file of embeddings of real images.

    python benchmark_configs/rivals/run.py digits vs2-demo          # the folder that "vs2 demo --out vs2-demo" left
    python benchmark_configs/rivals/run.py embeddings FILE.npz      # with image [n, d], label [n] and text [classes, d]

prints a table; ``--device cuda`` has embeddings on the GPU. Time is that of reading all test images. On embeddings it
holds what is learned for that; on the digits it holds the tower instead, twice, since each image is encoded without
steering too. Memory is what the process, or the GPU, took at most beyond what it held before. Nothing else should run
meanwhile.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vs2_plugin.clip.edits import in_float32
from vs2_plugin.clip.sites import OUTPUT, Site
from vs2_plugin.demo.digits import CLASSES, TEMPLATES, read_digits
from vs2_plugin.gallery.gallery import CLIP, Gallery
from vs2_plugin.method import PROTOCOLS
from vs2_plugin.model.readout import Readout
from vs2_plugin.modelstring import ModelString, parse
from vs2_plugin.results.statistics import calibration
from vs2_plugin.steering.batch import Batch, steer
from vs2_plugin.steering.context import Context

#: What stands before and after the backbone of a model string.
METHODS = (
    ("", ""), ("zero", ""),
    ("centre", ""), ("vs2", ""), ("vs2", "@alpha=auto"), ("vs2s", ""), ("dn", ""), ("inmap", ""),
    ("inmap", "@sinkhorn=20"),
    ("zlap", ""), ("dn:vs2s", ""), ("zlap:vs2s", ""),
    ("tda", ""), ("tda:vs2s", ""),
    ("inmap", "@unlabeled=test@sinkhorn=20"), ("zlap", "@unlabeled=test"), ("zlap:vs2s", "@unlabeled=test"),
    ("stata", ""), ("stata:vs2s", ""), ("stata", "@density=64"),
)  # fmt: skip


class Digits:
    """The tiny CLIP, and the SAEs of a demo; methods get images."""

    def __init__(self, folder: Path) -> None:
        pictures, labels = read_digits("test")
        self.pictures, self.labels, self.folder = pictures, torch.tensor(labels), folder

    def prepare(self, before: str, after: str) -> Callable[[], Tensor]:
        """Load a model; what is returned reads all test images."""
        import vs2_plugin

        if not before:
            before, after = "vs2", "@alpha=0"
        model, *_ = vs2_plugin.load(
            f"{before}:local-dir:{self.folder / 'tiny-clip'}{after}", dataset="wds/digits", classes=CLASSES,
            prompts=TEMPLATES, amp=False, store=self.folder / "store",
        )  # fmt: skip
        return lambda: model.classify(self.pictures).logits


class Embeddings:
    """Embeddings of a file, and an SAE of those that are taken as unlabeled; methods get no images."""

    def __init__(self, path: Path, unlabeled: int, device: str) -> None:
        with np.load(path) as file:
            arrays = {name: torch.from_numpy(file[name]).to(device) for name in ("image", "label", "text")}
        images, labels = F.normalize(arrays["image"].float(), dim=1), arrays["label"].long()
        self.classifier = F.normalize(arrays["text"].float(), dim=1).T.contiguous()
        order = labels.argsort(stable=True)
        counts = labels.bincount()
        place = torch.arange(len(labels), device=device) - (counts.cumsum(0) - counts)[labels[order]]
        learned, test = order[place < unlabeled], order[place >= unlabeled]
        self.images, self.labels, self.unlabeled = images[test], labels[test], images[learned]
        sys.path.insert(0, str(Path(__file__).parents[1] / "strength"))
        from methods import Bench, train_plain

        stored = self.unlabeled.cpu().numpy().astype(np.float16)
        gallery = Gallery({OUTPUT: stored}, {CLIP: stored}, np.arange(len(stored), dtype=np.uint64), None, {})
        site, sae = Site(OUTPUT, stored.shape[1]), train_plain(stored, 0, 40_000)
        trained = sae._replace(sae=sae.sae.to(device), mean=sae.mean.to(device))
        own = (gallery, {"plain": trained}, self.images, self.labels)
        self.bench = Bench(nn.Identity(), site, site, self.classifier, *own)

    def prepare(self, before: str, after: str) -> Callable[[], Tensor]:
        """See :class:`Digits`."""
        spec = parse(f"{before or 'vs2'}:x{after or '@alpha=0' * (not before)}")
        return partial(self._logits, spec)

    def _logits(self, spec: ModelString) -> Tensor:
        x, unlabeled = self.images, self.unlabeled
        if spec.method.site != "logits":
            steering = self.bench.build(spec)[0]
            x, unlabeled = (
                F.normalize(in_float32(lambda x: steer(steering, x, Batch(embed=lambda: x)), images), dim=1)
                for images in (x, unlabeled)
            )
        if spec.reading is None:
            return 100 * x @ self.classifier
        context = partial(Context, nn.Linear(1, 1).to(x.device), "logits", len(self.classifier))
        learns = spec.reading.protocol == "unlabeled"
        readout = Readout(spec.reading, context, (lambda: unlabeled) if learns else None)
        readout.set_classifier(self.classifier)
        for some in x.split(64):
            readout.encode(_Encoded(), some)
        return readout.logits()


class _Encoded(nn.Module):
    def encode_image(self, images: Tensor) -> Tensor:
        """Themselves: these are embeddings."""
        return images


@contextmanager
def measured(row: dict[str, float], cuda: bool) -> Iterator[None]:
    """Write seconds, and MB beyond those before, where that can be known."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 1e6
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _held("VmRSS")
    started = time.perf_counter()
    yield
    if cuda:
        torch.cuda.synchronize()
    row["seconds"] = time.perf_counter() - started
    row["MB"] = (torch.cuda.max_memory_allocated() / 1e6 if cuda else _held("VmHWM")) - before


def _held(name: str) -> float:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1e3 if found else float("nan")


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Expected calibration error, in points."""
    confidence, classes = logits.double().softmax(1).max(1)
    return 100 * calibration(confidence.numpy(), (classes == labels).numpy()).ece


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["digits", "embeddings"])
    parser.add_argument("path", type=Path)
    parser.add_argument("--unlabeled", type=int, default=2, help="of embeddings: images of a class, the first ones")
    parser.add_argument("--only", nargs="+", default=None, metavar="METHOD", help="such as inmap and tda:vs2s")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="of embeddings")
    args = parser.parse_args()
    with torch.no_grad():
        source = Digits(args.path) if args.kind == "digits" else Embeddings(args.path, args.unlabeled, args.device)
        print("| sees | method | accuracy, % | ECE, points | ms per image | MB |\n|---|---|---:|---:|---:|---:|")
        for before, after in METHODS:
            if (args.only and before not in args.only) or (before.startswith("zero") and args.kind == "embeddings"):
                continue
            sees = parse(f"{before}:x{after}").protocol if before else PROTOCOLS[0]
            row: dict[str, float] = {}
            read = source.prepare(before, after)
            with measured(row, args.device == "cuda"):
                logits = read()
            right = 100 * (logits.cpu().argmax(1) == source.labels.cpu()).double().mean().item()
            numbers = f"{right:.2f} | {calibration_error(logits.cpu(), source.labels.cpu()):.1f}"
            cost = f"{1000 * row['seconds'] / len(logits):.2f} | {row['MB']:.0f}"
            print(f"| {sees} | `{before}{after}` | {numbers} | {cost} |", flush=True)


if __name__ == "__main__":
    main()
