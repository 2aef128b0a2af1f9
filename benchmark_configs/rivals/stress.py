"""What becomes of methods that see other test images where classes are absent or images few, on embeddings of a file.

    python benchmark_configs/rivals/stress.py FILE.npz          # of classes of odd number: even ones chose a constant
    python benchmark_configs/rivals/stress.py FILE.npz all

FILE.npz holds ``image`` [n, d], ``label`` [n] and ``text`` [classes, d]. Printed is the change of accuracy over CLIP on
the same images, in points: mean and standard deviation over draws. First come subsets of the classes, then batches of
few classes as in arXiv 2501.03729: there a file of many classes becomes one of 50 groups of them, which are alike in
their texts, since it may have too few images of a class to fill a batch.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from vs2_plugin.plugins import registry
from vs2_plugin.steering.batch import Batch, call
from vs2_plugin.steering.context import Context
from vs2_plugin.stress.subsets import batch, few, of_classes, shuffled

METHODS = ("dn", "zlap", "stata", "stata@density=512", "tda", "inmap@steps=100@sinkhorn=20")
GROUPS = 50

#: In words, with the number of draws.
SUBSETS = {
    "all": (shuffled, 1),
    "half of the classes": (lambda labels, draw: of_classes(labels, 0.5, draw), 3),
    "a tenth": (lambda labels, draw: of_classes(labels, 0.1, draw), 10),
    "a hundredth": (lambda labels, draw: of_classes(labels, 0.01, draw), 10),
    "200 images": (lambda labels, draw: few(labels, 200, draw), 10),
    "64 images of 16 classes": (lambda labels, draw: batch(labels, 64, 16, 16, draw), 10),
}
BATCHES = {
    f"a batch of {images} images of {least} to {most} classes": (
        partial(lambda asked, labels, draw: batch(labels, *asked, draw), (images, least, most)), draws
    )
    for images, least, most, draws in (
        (64, 1, 4, 100), (64, 2, 10, 100), (64, 5, 25, 100), (64, GROUPS, GROUPS, 100), (1000, 5, 25, 10),
    )
}  # fmt: skip


@torch.no_grad()
def classes_by(text, x, classifier):
    """The classes that a method gives to images ``[n, d]``, all of which it sees, or one by one."""
    name, *words = text.split("@")
    method, given = registry().method(name), dict(word.split("=") for word in words)
    options = {one.name: one.parse(given[one.name]) if one.name in given else one.default for one in method.options}
    context = Context(torch.nn.Linear(1, 1), "logits", x.shape[1], classifier=classifier, unlabeled=x)
    read = method.build(context, **options)
    if method.protocol == "stream":
        logits = torch.cat([call(read, row[None], Batch()) for row in x])
    else:
        logits = call(read, x, Batch(rows=torch.arange(len(x))))
    return logits.argmax(1).numpy()


def table(images, labels, texts, subsets):
    """Print the changes, a line per subset and method."""
    classifier = texts.T.contiguous()
    plain = (images @ classifier).argmax(1).numpy()
    for subset, (take, draws) in subsets.items():
        taken = [take(labels, draw) for draw in range(draws)]
        before = np.array([100 * (plain[rows] == labels[rows]).mean() for rows in taken])
        count = np.mean([len(rows) for rows in taken])
        print(f"{subset}, {count:.0f} images, {draws} draws: CLIP {before.mean():.1f}", flush=True)
        for name in METHODS:
            after = [
                100 * (classes_by(name, images[torch.from_numpy(rows)], classifier) == labels[rows]).mean()
                for rows in taken
            ]
            spread = f" ({np.std(after - before, ddof=1):.1f})" if draws > 1 else ""
            print(f"    {name} {np.mean(after - before):+.1f}{spread}", flush=True)


def grouped(texts, count):
    """Groups ``[classes]`` of texts ``[classes, d]`` by their cosines (k-means), and the mean texts of the groups."""
    centres = texts[torch.from_numpy(np.random.default_rng(0).permutation(len(texts))[:count])]
    for _ in range(30):
        group = (texts @ centres.T).argmax(1)
        centres = F.normalize(torch.stack([texts[group == one].mean(0) for one in range(count)]), dim=1)
    return group.numpy(), centres


def main():
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, metavar="FILE.npz")
    parser.add_argument("which", nargs="?", choices=("odd", "all"), default="odd")
    args = parser.parse_args()
    with np.load(args.path) as data:
        images, labels, texts = (torch.from_numpy(data[name]).float() for name in ("image", "label", "text"))
    images, texts, labels = F.normalize(images, dim=1), F.normalize(texts, dim=1), labels.long().numpy()
    if args.which == "odd":
        rows = labels % 2 == 1
        images, labels, texts = images[torch.from_numpy(rows)], labels[rows] // 2, texts[1::2]
    table(images, labels, texts, SUBSETS)
    if len(texts) > 2 * GROUPS:
        group, texts = grouped(texts, GROUPS)
        labels = group[labels]
    table(images, labels, texts, BATCHES)


if __name__ == "__main__":
    main()
