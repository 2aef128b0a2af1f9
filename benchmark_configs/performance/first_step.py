"""Seconds from the start of ``vs2-train-sae`` to its first training step.

    python benchmark_configs/performance/first_step.py FOLDER [--started SECONDS]

Prints a line of JSON. FOLDER is one that ``extraction.py throughput`` has filled. The first time, the activations are
extracted; from then on, they are cached. Imports are those of the command, in its order: they are what is measured.
"""

import json
import os
import sys
import time


class _FirstStepError(BaseException):
    pass


def _first_step(*args: object) -> None:
    raise _FirstStepError


def main() -> None:
    """Run the command up to there."""
    folder, began = sys.argv[1], float(sys.argv[3]) if len(sys.argv) > 3 else time.time()
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from vs2_plugin.cli import train_sae
    from vs2_plugin.sae import train

    train._Run.step = _first_step
    words = ["--model", "ViT-B-32", "--pretrained", f"{folder}/weights.safetensors", "--dataset", "wds/synthetic"]
    try:
        train_sae.main([*words, "--dataset_root", folder, "--store", f"{folder}/store", "--quiet"])
    except _FirstStepError:
        print(json.dumps({"from_process_start": time.time() - began}), file=lines)
        return
    raise SystemExit("vs2-train-sae ended without a training step")


if __name__ == "__main__":
    main()
