"""Cells: which of them share an evaluation, and how checkpoints are named."""

from vs2_plugin.modelstring import parse
from vs2_plugin.reproduce.reading import read

TWICE = """\
title: The same, written twice
dataset: wds/digits
backbone: "local-dir:tiny-clip,"
columns: {A: {}}
rows:
  one: {model: "rag:{backbone}@mix=0.25@n=5@labels=oracle"}
  other order: {model: "rag:{backbone}@n=5@labels=oracle@mix=0.25"}
  default given: {model: "rag:{backbone}@n=5@labels=oracle@mix=0.25@encoder=clip"}
  other prompts: {model: "rag:{backbone}@n=5@labels=oracle@mix=0.25", prompts: "a {c}"}
  other data: {model: "rag:{backbone}@n=5@labels=oracle@mix=0.25", dataset: wds/others, train_on: [wds/digits]}
  other value: {model: "rag:{backbone}@n=6@labels=oracle@mix=0.25"}
  plain: {model: "{backbone}"}
"""


def test_models_of_one_meaning_share_an_evaluation(tmp_path):
    (tmp_path / "twice.yaml").write_text(TWICE)
    cells = {cell.row: cell.evaluation(0) for cell in read(tmp_path / "twice.yaml").cells}
    assert cells["one"] == cells["other order"] == cells["default given"]
    assert len(set(cells.values())) == 5
    assert cells["plain"].model == "local-dir:tiny-clip"
    # A default says something where it unsets another option.
    strength = TWICE.replace("rag:{backbone}@mix=0.25@n=5@labels=oracle", "vs2:{backbone}@lam=3@gamma=1.5")
    (tmp_path / "twice.yaml").write_text(strength.replace("rag:{backbone}@n=6@labels=oracle@mix=0.25",
                                                          "vs2:{backbone}@alpha=1.5"))  # fmt: skip
    cells = {cell.row: cell for cell in read(tmp_path / "twice.yaml").cells}
    for row in ("one", "other value"):
        assert parse(cells[row].evaluation(0).model).options == cells[row].spec.options
