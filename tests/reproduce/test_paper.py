"""The shipped tables: what they say is what was published, and all of them run."""

import json
import shutil
from pathlib import Path

import pytest

from vs2_plugin.demo.digits import write_digits
from vs2_plugin.modelstring import parse
from vs2_plugin.reproduce.reading import read, read_all
from vs2_plugin.reproduce.run import Reproduction
from vs2_plugin.reproduce.stand_in import stand_in

from ..harness.conftest import few_digits
from .conftest import run_here

FOLDER = Path(__file__).parents[2] / "benchmark_configs" / "paper"
TABLES = {table.path.stem: table for table in read_all([FOLDER])}

# Typed a second time, from the paper's tables.
MAIN = """
    zero-shot        61.07  63.96  51.76  55.06  56.64  61.08
    REC_A            58.01  64.05  47.45  51.81  30.56  52.96
    REC_F            58.22  63.42  48.08  51.43  36.33  54.84
    REC_F+gamma      62.69  66.81  49.41  53.28  39.49  58.81
    VS2              64.52  68.08  52.69  56.14  58.14  62.92
    PASS             70.64  68.23  52.97  56.63  57.94  62.98
    RAG oracle       76.43  69.78  58.32  60.65  72.53  67.84
    steering oracle  81.85  84.12  56.42  61.51  80.38  84.07
    VS2++ oracle     81.95  85.40  58.84  61.91  73.27  81.55
    steering pseudo  77.22  78.97  47.89  53.95  74.06  76.79
    VS2++ pseudo     77.11  79.14  52.81  57.02  72.12  76.92
"""
GATE = """
    zero-shot    61.07  51.76  56.64  24.87  80.72  63.70  78.53  51.79  31.61
    target       64.52  52.69  58.14  27.69  81.20  64.81  80.95  54.80  34.65
    ungated      64.63  48.81  59.73  18.57  81.06  64.11  79.72  45.78  30.76
    gated        64.63  51.79  58.65  24.87  80.70  64.34  78.76  51.92  31.57
    coverage     100    0.62   98.63  0.09   0.89   22.72  23.82  6.97   85.52
"""
TEST_TIME = """
    zero-shot    61.07  51.76  56.64
    ensemble     63.66  51.54  61.39
    TPT          64.09  51.83  62.77
    C-TPT        64.86  52.54  63.20
    Diff-TPT     63.04  52.80  61.60
    VS2          64.52  52.69  58.14
    VS2+Ens      65.48  52.47  62.79
    VS2+Ens+Aug  65.80  51.54  62.59
"""
OTHERS = {
    "depth": [68.08, 65.72, 59.36],
    "vit_l_14": [72.48, 62.50, 72.58, 74.12, 64.26, 73.52],
    "pass": [0.3437, 68.80, 0.4887, 70.40, 0.5393, 70.61, 0.5702, 70.76],
    "fvu": [0.2812, 0.2487, 0.5060, 0.1166, 0.1653, 0.3018],
    "per_class": [25, 23, 21, 25, None, None, None, 38],
    "sae_ablation": [(64.10, 64.61)] * 6,
    "rag": [None] * 8 + [76.43],
    "controls": [1.71, None, None, 0.06, None, None, 97.5, 91.04, 90.1],
    "sensitivity": [None] * 7 + [64.52] + [None] * 4,
    "neighbours": [None, None, 77.11, None, None, None, 81.95, None],
}


def numbers(text: str) -> list[float]:
    return [
        float(word) for line in text.strip().splitlines() for word in line.split("  ") if word.strip()[:1].isdigit()
    ]


@pytest.mark.parametrize("name", TABLES)
def test_published_numbers_are_those_of_the_paper(name):
    typed = {"main_accuracy": numbers(MAIN), "gate": numbers(GATE), "test_time": numbers(TEST_TIME), **OTHERS}[name]
    assert [cell.published for cell in TABLES[name].cells] == typed


def test_the_typed_tables_are_whole():
    assert (len(numbers(MAIN)), len(numbers(GATE)), len(numbers(TEST_TIME))) == (66, 45, 24)


def test_rows_are_the_methods_that_their_titles_name():
    main = {cell.row: cell for cell in TABLES["main_accuracy"].cells}
    methods = {row: cell.spec.method.name if cell.spec else "" for row, cell in main.items()}
    assert list(methods.values()) == [
        "", "rec", "rec", "amp", "vs2", "pass", "rag", "clipsteer", "vs2pp", "clipsteer", "vs2pp"
    ]  # fmt: skip
    oracles = {
        row for row, cell in main.items() if cell.spec and cell.spec.method.labels_used(cell.spec.options) == "oracle"
    }
    assert oracles == {row for row in main if "oracle" in row}
    assert {cell.dataset for cell in TABLES["gate"].cells} == {
        "cifar100", "wds/cub200", "wds/tiny_imagenet", "fgvc_aircraft", "food101", "flowers", "caltech101", "sun397",
        "eurosat",
    }  # fmt: skip
    marked = {cell.dataset for cell in TABLES["gate"].cells if cell.sae and cell.sae.transductive}
    assert marked == {"caltech101", "sun397", "eurosat"}
    prompts = {cell.row: cell.prompts for cell in TABLES["test_time"].cells}
    assert prompts["VS2"] == ("a photo of a {c}",) and prompts["VS2+Ens"] == ()


def test_every_name_is_one_that_open_clip_and_the_commands_know(tmp_path):
    import open_clip

    data = {"cifar100", "fgvc_aircraft", "food101", "flowers", "caltech101", "sun397", "eurosat"}
    for table in [*TABLES.values(), *map(stand_in, TABLES.values())]:
        work = Reproduction([table], tmp_path, "root")
        for cell in table.cells:
            if cell.model is None:
                continue
            if not table.stand_in:
                assert cell.weights in open_clip.list_pretrained_tags_by_model(cell.backbone)
                assert cell.dataset in data or cell.dataset.startswith("wds/")
            for run in cell.evaluations(0):
                assert len(work.results(run).name) < 200
                if cell.spec and run != cell.plain:
                    assert parse(run.model).checkpoint == run.checkpoint == cell.sae.name(0)
            if cell.sae:
                assert cell.sae.request([0], "root").words()[0] == "vs2-train-sae"


def test_no_model_is_evaluated_twice(tmp_path):
    """Not by the order of its options either."""
    runs = {run for table in TABLES.values() for cell in table.cells for run in cell.evaluations(0)}
    meanings = {
        (spec.method.name, spec.checkpoint, *spec.options.items(), run.weights, run.dataset, run.prompts)
        for run in runs
        if ":" in run.model
        for spec in [parse(run.model)]
    }
    assert len(meanings) == sum(":" in run.model for run in runs)


def test_all_of_them_run_on_the_stand_in(tmp_path, monkeypatch):
    """All of them, and again: then nothing is left to do. On few of the images, since what is there already is taken,
    with two seeds at most and SAEs that are little trained."""
    monkeypatch.setattr("vs2_plugin.reproduce.stand_in._SAMPLES", 4000)
    write_digits(tmp_path / "digits")
    few_digits(tmp_path, "out/digits", 0, count=110)  # no fewer to train on than neighbours that a table asks for
    few_digits(tmp_path, "fewer", 0, count=30)
    shutil.copytree(tmp_path / "fewer/test", tmp_path / "out/digits/test", dirs_exist_ok=True)
    (tmp_path / "paper").mkdir()
    for file in FOLDER.glob("*.yaml"):
        text = file.read_text(encoding="utf-8").replace("\nseeds: [0, 1, 2]\n", "\nseeds: [0]\n")
        text = text.replace("seeds: [0]", "seeds: [0, 1]") if file.stem == "depth" else text
        (tmp_path / "paper" / file.name).write_text(text, encoding="utf-8")
    tables = {table.path.stem: table for table in read_all([tmp_path / "paper"])}
    assert {len(cell.seeds) for table in tables.values() for cell in table.cells} == {1, 2}
    done = run_here("paper", "--stand_in", "digits", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for name, table in tables.items():
        facts = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert facts["stand_in"] and len(facts["cells"]) == len(table.cells)
        for cell, was in zip(facts["cells"], table.cells, strict=True):
            assert (cell["row"], cell["column"]) == (was.row, was.column)
            assert cell["published"] is None and cell["difference"] is None
            runs = was.model is not None or was.best_of
            assert (cell["measured"] is None) == (not runs)
            if runs:
                low, high = {"fvu": (0, 1), "gain": (-100, 100)}.get(was.metric, (0, 100))
                assert low <= cell["measured"] <= high
                assert (cell["spread"] is None) == (len(was.seeds) == 1)
        text = (tmp_path / "out" / f"{name}.md").read_text()
        heading, mark, _ = text.split("\n\n", 2)
        assert text in done.stdout and heading == f"# The tiny CLIP on handwritten digits, by {name}.yaml"
        assert mark.startswith("**Stand-in: the tiny CLIP") and "| published |" not in text and table.title not in text
    again = run_here("paper", "--stand_in", "digits", "--out", "out", "--dry_run", cwd=tmp_path)
    assert again.returncode == 0 and "clip_benchmark" not in again.stdout and "vs2-train-sae" not in again.stdout


def test_a_shipped_file_is_read_the_same_from_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert read(FOLDER / "depth.yaml").cells == TABLES["depth"].cells
