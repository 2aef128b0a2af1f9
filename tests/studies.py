"""Runs the scripts of ``benchmark_configs`` in this process."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

__all__ = ["FOLDER", "run_script"]

FOLDER = Path(__file__).parents[1] / "benchmark_configs"


def run_script(study: str, script: str, *words: object, **changed: Any) -> str:
    """Run a script of a study, with names in it ``changed``, and return what it prints. It raises SystemExit as the
    command would exit."""
    before, threads, printed = set(sys.modules), torch.get_num_threads(), io.StringIO()
    try:
        with (
            mock.patch.object(sys, "path", [str(FOLDER / study), *sys.path]),
            mock.patch.object(sys, "argv", [script, *map(str, words)]),
            mock.patch.dict(os.environ),
            contextlib.redirect_stdout(printed),
        ):
            module = importlib.import_module(script.removesuffix(".py"))
            for name, value in changed.items():  # the module is forgotten afterwards
                setattr(module, name, value)
            module.main()
    finally:
        torch.set_num_threads(threads)
        for name in {path.stem for path in FOLDER.glob("*/*.py")} - before:
            sys.modules.pop(name, None)
    return printed.getvalue()
