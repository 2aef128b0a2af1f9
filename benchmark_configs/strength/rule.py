"""How the rule of ``vs2_plugin/strength/choice.py`` fares with other constants, from the study's runs.

    python benchmark_configs/strength/rule.py DIR/development/runs.jsonl [--embeddings DIR/embeddings.json]

For each method that promises not to lose: the settings where its mean is below -0.3 points of zero-shot, the mean gain,
the worst mean of a setting and the worst run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from table import LOSS, NO_RUNS, read

from vs2_plugin.strength import RULE, Rule, Scores

METHODS = ("auto", "vs2s", "pass auto")
ERRORS = (1.5, 2.0, 2.5, 3.0)
GAINS = (0.0, 0.05, 0.075, 0.1)
KNOWN = (0.0, 0.15, 0.2, 0.25, 0.3)


def evidence(rows: Sequence[dict[str, Any]]) -> dict[str, list[tuple]]:
    """Of each method, for each run: setting, candidates, scores and the accuracy of each candidate."""
    found: dict[str, list[tuple]] = {method: [] for method in METHODS}
    for row in rows:
        if "evidence" in row:  # of embeddings
            told = [(row["method"], row["evidence"], row["accuracies"])]
        else:
            told = [(name.removeprefix("vs2 "), row["choices"][name], curve) for name, curve in row["curves"].items()]
        for method, choice, accuracies in told:
            if method in found:
                scores = Scores(**{name: choice[name] for name in Scores._fields})
                found[method].append((row["setting"], choice["candidates"], scores, accuracies))
    return {method: runs for method, runs in found.items() if runs}


def fares(runs: Sequence[tuple], rule: Rule) -> tuple[int, float, float, float]:
    """Settings whose mean is a loss, mean gain, the worst mean of a setting and the worst run."""
    changes: dict[str, list[float]] = {}
    for setting, candidates, scores, accuracies in runs:
        change = accuracies[rule.pick(candidates, scores)] - accuracies[0]
        changes.setdefault(setting, []).append(change)
    means = [float(np.mean(values)) for values in changes.values()]
    worst = min(value for values in changes.values() for value in values)
    return sum(mean < LOSS for mean in means), float(np.mean(means)), min(means), worst


def main() -> None:
    """Read the command line, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", type=Path, help="the study's runs.jsonl")
    parser.add_argument("--embeddings", type=Path, metavar="FILE", help="the study's embeddings.json, beside it")
    args = parser.parse_args()
    rows = read(args.runs)
    if not rows:
        parser.error(NO_RUNS.format(args.runs))
    parts = {"": evidence(rows)}
    if args.embeddings:
        half = args.runs.resolve().parent.name
        parts["real "] = evidence(
            [row for row in json.loads(args.embeddings.read_text()) if row["half"] == half and "evidence" in row]
        )
    columns = {f"{part}{method}": runs for part, found in parts.items() for method, runs in found.items()}
    print(f"{len(rows)} runs; losses, mean gain, worst setting, worst run of {', '.join(columns)}")
    for values in product(ERRORS, GAINS, KNOWN):
        rule = Rule(*values)
        told = " | ".join("{:2d} {:+.2f} {:+6.2f} {:+6.2f}".format(*fares(runs, rule)) for runs in columns.values())
        named = ", ".join(f"{name} {value:g}" for name, value in rule._asdict().items())
        print(f"{named}: {told}{'  <-' * (rule == RULE)}")


if __name__ == "__main__":
    main()
