"""The page of the tables."""

from pathlib import Path

import pytest

from vs2_plugin.errors import DataError
from vs2_plugin.reproduce.cells import Cell, Table
from vs2_plugin.reproduce.page import write_page
from vs2_plugin.reproduce.stand_in import stand_in
from vs2_plugin.reproduce.table import Measured

from ..report.test_page import Page


def cell(row, column, published, metric="accuracy"):
    return Cell(row, column, metric, published, "B", "B", "w", "cifar100", (), None, (0, 1))


MEASURED = [
    Measured(cell("zero-shot", "CIFAR-100", 61.07), {0: 61.0}),
    Measured(cell("VS2 <b>", "CIFAR-100", (64.0, 65.0)), {0: 66.0, 1: 67.0}),
    Measured(cell("VS2 <b>", "CUB-200", 52.7), {}, ("no images",)),
]
TABLE = Table(Path("a.yaml"), "Accuracy on CIFAR-100, OpenAI weights", "the paper", (), tuple(m.cell for m in MEASURED))


def page_of(tables, folder):
    return Page(write_page(tables, folder).read_text(encoding="utf-8"))


def test_cells_stand_in_rows_and_columns_beside_what_was_published(tmp_path):
    page = page_of([(TABLE, MEASURED)], tmp_path)
    told = "Measured minus published, top-1 %: +0.71 on average over 2, at most +1.50 (VS2 <b> / CIFAR-100)."
    assert "2 of 3 cells were measured." in page.text and told in page.text
    assert "zero-shot 61.00 published 61.07, -0.07" in page.text
    assert "VS2 <b> 66.50 \N{PLUS-MINUS SIGN} 0.71 published 64.0 to 65.0, +1.50" in page.text
    assert "Not measured, 1 cell (VS2 <b> / CUB-200): no images" in page.text
    assert [tag for tag, _ in page.elements].count("th") == 4 and "b" not in {tag for tag, _ in page.elements}
    write_page([(TABLE, MEASURED)], tmp_path)  # over its own page
    (tmp_path / "index.html").write_text("mine")
    with pytest.raises(DataError, match="vs2 reproduce did not write it"):
        write_page([(TABLE, MEASURED)], tmp_path)


def test_a_stand_in_says_so_above_the_table_and_claims_no_data_or_weights_in_its_title(tmp_path):
    table = stand_in(Table(TABLE.path, TABLE.title, TABLE.source, (), ()))
    page = page_of([(table, [Measured(cell("VS2", "CIFAR-100", None), {0: 50.0})])], tmp_path)
    assert page.text.index("Stand-in: the tiny CLIP") < page.text.index("in place of CIFAR-100")
    assert "The tiny CLIP on handwritten digits, by a.yaml" in page.text
    assert "OpenAI" not in page.text and "the paper " not in page.text and "published 6" not in page.text
