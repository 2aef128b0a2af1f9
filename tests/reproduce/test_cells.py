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


def test_a_cell_needs_the_evaluations_that_its_number_is_computed_from(tmp_path):
    (tmp_path / "needs.yaml").write_text(
        'title: T\nbackbone: "B,w"\ndataset: wds/a\nsae: {recipe: paper}\nmodel: "vs2:{backbone}"\n'
        "columns: {number: {}, gain: {metric: gain}}\n"
        "rows: {steered: {}, again: {}, FVU: {metric: fvu}, shown: {model: null}, best: {best_of: [steered, again]}}\n"
        "published: {steered: [64.5, [3, 4]], shown: [1, 2]}\n"
    )
    cells = {cell.title: cell for cell in read(tmp_path / "needs.yaml").cells}
    number, gain, fvu = (cells[title] for title in ("steered / number", "steered / gain", "FVU / number"))
    assert number.evaluations(0) == [number.evaluation(0)] != [number.plain] and fvu.evaluations(0) == []
    assert gain.evaluations(0) == [gain.plain, gain.evaluation(0)] and gain.plain.model == "B"
    assert [cell.ends for cell in (number, gain, fvu)] == [(64.5,), (3, 4), ()]
    assert number.is_wanted and cells["best / number"].is_wanted and not cells["shown / number"].is_wanted
    assert cells["shown / number"].evaluations(0) == cells["best / number"].evaluations(0) == []
    one, both = (number.sae.request(seeds, "root") for seeds in ([1], [1, 2]))
    assert one.name == f"{both.name}-seed1" == number.sae.name(1) and both.seed == (1, 2)
    assert one.recipe == "paper" and not one.transductive
