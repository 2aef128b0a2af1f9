"""The commands ``vs2`` and ``vs2-train-sae``, from their start: a Ctrl-C may come during the first imports."""

from __future__ import annotations

import sys
from importlib import import_module

__all__ = ["vs2", "vs2_train_sae"]


def vs2() -> int:
    """Run ``vs2``, and return its exit code."""
    return _run("vs2", "main")


def vs2_train_sae() -> int:
    """Run ``vs2-train-sae``, and return its exit code."""
    return _run("vs2-train-sae", "train_sae")


def _run(program: str, module: str) -> int:
    try:
        command = import_module(f"{__name__}.{module}")
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted", file=sys.stderr)
        return 130
    code: int = command.main()
    return code
