"""Runs a notebook's code in this process, and puts what it shows beside it: no Jupyter is needed.

    python tests/demo/notebook.py vs2_plugin/docs/notebook.ipynb

Jupyter opens the file; this writes the outputs that are committed, and the tests run the code by it.
"""

from __future__ import annotations

import ast
import base64
import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

__all__ = ["main", "run"]


def run(notebook: dict[str, Any]) -> dict[str, Any]:
    """Run the code cells of a notebook, one after the other, and set their outputs.

    Args:
        notebook: what its file holds.

    Returns:
        The names that the code has made.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(code, 1):
        printed, shown = _run("".join(cell["source"]), f"cell {number}", names)
        cell["execution_count"], cell["outputs"] = number, []
        if printed:
            cell["outputs"].append({"output_type": "stream", "name": "stdout", "text": _lines(printed)})
        if shown is not None:
            data: dict[str, Any] = {"text/plain": _lines(repr(shown))}
            if hasattr(shown, "_repr_png_"):
                data["image/png"] = base64.b64encode(shown._repr_png_()).decode()
                data["text/plain"] = [f"<{type(shown).__name__}>"]  # without its address
            output = {"output_type": "execute_result", "execution_count": number, "metadata": {}, "data": data}
            cell["outputs"].append(output)
    return names


def _run(source: str, name: str, names: dict[str, Any]) -> tuple[str, Any]:
    """Run one cell; return what it printed, and the value of the expression that it ends with."""
    tree, printed, shown = ast.parse(source, name), io.StringIO(), None
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with redirect_stdout(printed):
        exec(compile(tree, name, "exec"), names)
        if isinstance(last, ast.Expr):
            shown = eval(compile(ast.Expression(last.value), name, "eval"), names)
    return printed.getvalue(), shown


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def main(path: str) -> None:
    """Run a notebook and write its outputs into it."""
    file = Path(path).absolute()
    notebook = json.loads(file.read_text(encoding="utf-8"))
    run(notebook)
    file.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
