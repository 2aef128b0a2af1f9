"""The notebook among the chapters: its code runs, and its outputs are those of such a run."""

import json
from pathlib import Path

import vs2_plugin

from . import notebook

FILE = Path(vs2_plugin.__file__).parent / "docs/notebook.ipynb"


def code(text):
    return [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]


def kinds(cells):
    return [[(output["output_type"], sorted(output.get("data", ()))) for output in cell["outputs"]] for cell in cells]


def test_the_notebook_runs_and_is_committed_with_its_outputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it goes to a folder of its own; afterwards this is left again
    text = FILE.read_text(encoding="utf-8")
    again = json.loads(text)
    names = notebook.run(again)
    assert kinds(code(json.dumps(again))) == kinds(code(text))
    assert names["steered"] > names["plain"] and names["moved"].shape == (5, 128)
    assert names["checkpoint"].gallery.count == len(names["images"])
    assert len(text) < 100_000 and "/tmp/" not in text and "/home/" not in text
    for cell in code(text):
        assert max(map(len, "".join(cell["source"]).splitlines())) <= 120


def test_what_a_cell_prints_and_ends_with_is_its_output(tmp_path):
    cells = [
        {"cell_type": "code", "source": ["print('a')\n", "x = 2"]},
        {"cell_type": "markdown", "source": ["x = 3"]},
        {"cell_type": "code", "source": ["print('b')\n", "x + 1"]},
    ]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells}))
    notebook.main(str(tmp_path / "a.ipynb"))
    first, second = code((tmp_path / "a.ipynb").read_text())
    assert first["outputs"] == [{"output_type": "stream", "name": "stdout", "text": ["a\n"]}]
    assert [output.get("text") or output["data"] for output in second["outputs"]] == [["b\n"], {"text/plain": ["3"]}]
    assert (first["execution_count"], second["execution_count"]) == (1, 2)
