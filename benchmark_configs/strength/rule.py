"""How the rule of ``vs2_plugin/strength/choice.py`` fares with other constants, from the study's runs.

    python benchmark_configs/strength/rule.py DIR/development/runs.jsonl

For each method that promises not to lose: the settings where it surely loses to zero-shot, and its mean gain in points.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from table import LOSS, NO_RUNS, decide, interval, read

from vs2_plugin.strength import RULE, Rule

METHODS = ("vs2 auto", "vs2s", "pass auto")
ERRORS = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
GAINS = (0.0, 0.025, 0.05, 0.075, 0.1, 0.15, float("inf"))
PRICES = (0.0, 0.02, 0.05)


def fares(rows: Sequence[dict[str, Any]], rule: Rule) -> dict[str, tuple[int, float, float, float]]:
    """Of each method: settings with a sure loss, mean gain, the worst mean of a setting and the worst run."""
    changes: dict[str, dict[str, list[float]]] = {method: {} for method in METHODS}
    for row in rows:
        accuracy = decide(row, rule)["accuracy"]
        for method in METHODS:
            changes[method].setdefault(row["setting"], []).append(accuracy[method] - accuracy["zero-shot"])
    found = {}
    for method, told in changes.items():
        highs = [high for _, _, high in map(interval, told.values()) if high is not None]
        means = [float(np.mean(values)) for values in told.values()]
        worst = min(value for values in told.values() for value in values)
        found[method] = sum(high < LOSS for high in highs), float(np.mean(means)), min(means), worst
    return found


def main() -> None:
    """Read the command line, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", type=Path, help="the study's runs.jsonl")
    args = parser.parse_args()
    rows = read(args.runs)
    if not rows:
        parser.error(NO_RUNS.format(args.runs))
    print(f"{len(rows)} runs; sure losses, mean gain, worst setting, worst run of {', '.join(METHODS)}")
    for values in product(ERRORS, GAINS, PRICES):
        rule = Rule(*values)
        told = " | ".join("{:2d} {:+.2f} {:+6.2f} {:+6.2f}".format(*row) for row in fares(rows, rule).values())
        print(f"errors {rule.errors:g}, gain {rule.gain:g}, price {rule.price:g}: {told}{'  <-' * (rule == RULE)}")


if __name__ == "__main__":
    main()
