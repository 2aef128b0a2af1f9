"""The table of what was published and what was measured."""

import json

import pytest

from vs2_plugin.reproduce.cells import Cell, Table
from vs2_plugin.reproduce.reading import read
from vs2_plugin.reproduce.run import Reproduction
from vs2_plugin.reproduce.table import Measured, markdown, write


def test_the_best_of_several_rows_is_theirs_and_says_how_it_was_chosen(tmp_path):
    (tmp_path / "best.yaml").write_text(
        'title: T\nbackbone: "B,w"\ndataset: wds/a\ncolumns: {A: {}}\nmodel: "vs2:{backbone}"\n'
        "rows:\n  weak: {options: {lam: 1}}\n  strong: {options: {lam: 2}}\n  best: {best_of: [weak, strong]}\n"
        "published: {best: [70]}\n"
    )
    work = Reproduction([read(tmp_path / "best.yaml")], tmp_path / "out", "root")
    work._value = lambda cell, seed: {1.0: 60.0, 2.0: 71.0}[cell.spec.options["lam"]]
    measured = work.measured(work.tables[0])
    assert (measured[2].mean, measured[2].difference) == (71, 1)
    text = markdown(work.tables[0], measured)
    assert "best / A: that of 'strong'" in text and "chosen on the images that are evaluated" in text
    work.problems[work.cells[0].sae.name(0)] = ("no luck",)
    measured = work.measured(work.tables[0])
    assert measured[2].mean is None  # the best of some is not the best of all
    assert "Not measured, 1 cell (best / A): not all of the rows" in markdown(work.tables[0], measured)


def test_the_difference_to_an_interval_is_that_to_its_nearer_end(tmp_path):
    (tmp_path / "a.yaml").write_text(
        'title: T\nbackbone: "B,w"\ndataset: wds/a\ncolumns: {A: {}}\nmodel: "{backbone}"\n'
        "rows: {above: {}, within: {}, below: {}}\n"
        "published: {above: [[64, 65]], within: [[64, 65]], below: [[64, 65]]}\n"
    )
    table = read(tmp_path / "a.yaml")
    cells = [Measured(cell, {0: number}) for cell, number in zip(table.cells, (66.5, 64.25, 63), strict=True)]
    assert markdown(table, cells).splitlines()[2:] == [
        "|        |     | of      |      published | measured | difference |",
        "| ------ | --- | ------- | -------------: | -------: | ---------: |",
        "| above  | A   | top-1 % | 64.00 to 65.00 |    66.50 |      +1.50 |",
        "| within | A   | top-1 % | 64.00 to 65.00 |    64.25 |      +0.00 |",
        "| below  | A   | top-1 % | 64.00 to 65.00 |    63.00 |      -1.00 |",
    ]


def test_a_table_holds_means_and_spreads_over_seeds_and_says_what_is_missing(tmp_path):
    def measured(row, column, published, metric="accuracy", model="vs2:B", **given):
        return Measured(Cell(row, column, metric, published, model, "B", "w", "wds/a", (), None, (0, 1)), **given)

    cells = [
        measured("one|two", "A", 60.5, values={0: 60.0, 1: 62.0}, facts={"transductive": True}),
        measured("one|two", "FVU", 0.3, "fvu", values={0: 0.25, 1: 0.25}),
        measured("other", "A", (50, 51), problems=("no luck",)),
        measured("other", "FVU", None, "fvu", problems=("no luck", "no SAE")),
        measured("plain", "A", None, model="B", values={0: 49.0}),
        measured("plain", "FVU", 0.5, "fvu", model=None),
    ]
    table = Table(tmp_path / "a.yaml", "T", "From a paper.", ("A note.",), tuple(one.cell for one in cells))
    write(table, cells, tmp_path)
    as_markdown, as_json = (tmp_path / f"{table.path.stem}.{suffix}" for suffix in ("md", "json"))
    assert as_markdown.read_text() == """\
# T

From a paper.

|          |     | of      |      published |         measured | difference |
| -------- | --- | ------- | -------------: | ---------------: | ---------: |
| one\\|two | A   | top-1 % |          60.50 |    61.00 +- 1.41 |      +0.50 |
| one\\|two | FVU | FVU     |         0.3000 | 0.2500 +- 0.0000 |    -0.0500 |
| other    | A   | top-1 % | 50.00 to 51.00 |                  |            |
| other    | FVU | FVU     |                |                  |            |
| plain    | A   | top-1 % |                |            49.00 |            |
| plain    | FVU | FVU     |         0.5000 |                  |            |

A note.

Transductive, trained on the images that are evaluated: one|two / A.

Mean and standard deviation over the seeds of the SAE (2).

Not measured, 2 cells (row 'other'): no luck

Not measured, 1 cell (other / FVU): no SAE
"""
    held = json.loads(as_json.read_text())["cells"]
    assert [(one["measured"], one["difference"], one["problem"]) for one in held] == [
        (61, 0.5, None), (0.25, pytest.approx(-0.05), None), (None, None, "no luck"), (None, None, "no luck; no SAE"),
        (49, None, None), (None, None, None),
    ]  # fmt: skip
    assert held[0]["spread"] == pytest.approx(2**0.5) and held[0]["values"] == {"0": 60, "1": 62}
    assert held[0]["prompts"] == "harness" and "best_of" not in held[0]
    assert held[0]["transductive"] and held[2]["published"] == [50, 51] and held[4]["spread"] is None
