"""What becomes of methods that see other test images where classes are absent or images few, on embeddings of a file.

    python benchmark_configs/rivals/stress.py FILE.npz

FILE.npz holds ``image`` [n, d], ``label`` [n] and ``text`` [classes, d]. Half of the images of each class are left out,
as in run.py. Printed is the change of accuracy over CLIP on the same images, in points: mean and standard deviation
over three draws.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
import torch.nn.functional as F

from vs2_plugin.plugins import registry
from vs2_plugin.steering.batch import Batch, call
from vs2_plugin.steering.context import Context
from vs2_plugin.stress.subsets import few, of_classes, shuffled

METHODS = {"dn": {}, "zlap": {}, "stata": {}, "tda": {}, "inmap": {"steps": 100, "sinkhorn": 20}}
SUBSETS = {
    "all": shuffled,
    "half of the classes": lambda labels, draw: of_classes(labels, 0.5, draw),
    "a tenth": lambda labels, draw: of_classes(labels, 0.1, draw),
    "a hundredth": lambda labels, draw: of_classes(labels, 0.01, draw),
    "200 images": lambda labels, draw: few(labels, 200, draw),
}
DRAWS = 3


@torch.no_grad()
def classes_by(name, x, classifier):
    """The classes that a method gives to images ``[n, d]``, all of which it sees, or one by one."""
    method = registry().method(name)
    options = {one.name: METHODS[name].get(one.name, one.default) for one in method.options}
    context = Context(torch.nn.Linear(1, 1), "logits", x.shape[1], classifier=classifier, unlabeled=x)
    read = method.build(context, **options)
    if method.protocol == "stream":
        logits = torch.cat([call(read, row[None], Batch()) for row in x])
    else:
        logits = call(read, x, Batch(rows=torch.arange(len(x))))
    return logits.argmax(1).numpy()


def main(path):
    """Print the changes, a line per subset and method."""
    data = np.load(path)
    labels = data["label"].astype(np.int64)
    test = np.concatenate([rows[len(rows) // 2 :] for label in np.unique(labels)
                           for rows in [np.flatnonzero(labels == label)]])  # fmt: skip
    images = F.normalize(torch.from_numpy(data["image"][test]).float(), dim=1)
    classifier = F.normalize(torch.from_numpy(data["text"]).float(), dim=1).T.contiguous()
    labels = labels[test]
    for subset, take in SUBSETS.items():
        for name in METHODS:
            changes = []
            for draw in range(DRAWS):
                rows = take(labels, draw)
                x, plain = images[torch.from_numpy(rows)], (images[torch.from_numpy(rows)] @ classifier).argmax(1)
                before = (plain.numpy() == labels[rows]).mean()
                changes.append(100 * ((classes_by(name, x, classifier) == labels[rows]).mean() - before))
            print(f"{subset}, {len(rows)} images: {name} {np.mean(changes):+.1f} ({np.std(changes, ddof=1):.1f})")


if __name__ == "__main__":
    main(*sys.argv[1:])
