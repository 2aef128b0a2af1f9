"""The table of what was published and what was measured."""

from vs2_plugin.reproduce.reading import read
from vs2_plugin.reproduce.run import Reproduction
from vs2_plugin.reproduce.table import Measured, markdown


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
