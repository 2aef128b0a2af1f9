"""Reading tables: what a file means, and what is said of one that is wrong."""

import json
import zipfile
from pathlib import Path

import pytest

from vs2_plugin.errors import SettingError
from vs2_plugin.reproduce.reading import PAPER, SAE_FLAGS, read, read_all
from vs2_plugin.reproduce.stand_in import stand_in
from vs2_plugin.settings import flags_of
from vs2_plugin.training.request import TrainRequest

GOOD = """\
title: T
backbone: "ViT-B-32-quickgelu,openai"
dataset: cifar100
sae: {k: 64}
columns:
  A: {}
  B: {dataset: wds/mine, sae: {lr: 0.001}}
rows:
  plain: {model: "{backbone}"}
  VS2: {model: "vs2:{backbone}", options: {lam: 3}, sae: {k: 32}, seeds: [3, 1]}
published:
  VS2: [1, [2, 3]]
"""


def write(folder: Path, text: str, name: str = "table.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_row_goes_before_a_column_and_a_column_before_the_top(tmp_path):
    text = GOOD.replace("dataset: wds/mine", "dataset: wds/mine, prompts: '{c}?'")
    table = read(write(tmp_path, text))
    cells = {(cell.row, cell.column): cell for cell in table.cells}
    assert list(cells) == [("plain", "A"), ("plain", "B"), ("VS2", "A"), ("VS2", "B")]
    steered = cells["VS2", "B"]
    assert steered.model == "vs2:ViT-B-32-quickgelu@lam=3"
    assert dict(steered.sae.flags) == {"k": 32, "lr": 0.001}
    assert steered.sae.datasets == ("wds/mine",) and steered.seeds == (3, 1)
    assert steered.prompts == ("{c}?",) and cells["VS2", "A"].prompts == ()
    assert (cells["VS2", "A"].published, steered.published, cells["plain", "A"].published) == (1, (2, 3), None)
    plain = cells["plain", "A"]
    assert plain.sae is None and plain.seeds == (0,)
    assert plain.evaluation(0).model == "ViT-B-32-quickgelu"
    name = steered.sae.name(3)
    assert steered.evaluation(3).model == f"vs2:ViT-B-32-quickgelu@{name}@lam=3.0"


def test_a_training_is_one_request_for_all_its_seeds(tmp_path):
    sae = read(write(tmp_path, GOOD)).cells[2].sae
    request = sae.request([3, 1], "root/{dataset}")
    assert (request.seed, request.name, request.k) == ((3, 1), sae.base, (32,))
    request = sae.request([1], "root")
    assert (request.seed, request.name) == ((1,), sae.name(1)) and sae.name(1) == f"{sae.base}-seed1"
    assert request.words()[-4:] == ["--k", "32", "--name", sae.name(1)]


def test_names_of_checkpoints_stay(tmp_path):
    """Checkpoints that were trained with an older version are found again."""
    text = GOOD.replace("{k: 32}", "{k: 32, blocks: [9, 10], lr: 1, no_amp: true, retrieval_encoder: dino}")
    assert read(write(tmp_path, text)).cells[2].sae.base == "ViT-B-32-quickgelu_openai_cifar100-eafb257a"


def test_checkpoints_are_shared_by_their_settings(tmp_path):
    first = read(write(tmp_path, GOOD))
    second = read(write(tmp_path, GOOD.replace("title: T", "title: U").replace("lam: 3", "lam: 4")))
    other = read(write(tmp_path, GOOD.replace("k: 32", "k: 33")))
    base = first.cells[2].sae.base
    assert second.cells[2].sae.base == base != other.cells[2].sae.base


def test_every_flag_of_an_sae_is_one_of_vs2_train_sae():
    assert set(SAE_FLAGS) < set(flags_of(TrainRequest))
    assert {"k", "recipe", "auxk", "gallery_labels", "no_amp"} < set(SAE_FLAGS) and "seed" not in SAE_FLAGS


WRONG = {
    "not YAML": ("a: [", "not valid YAML"),
    "a tab": ("a:\n\tb: 1", "not valid YAML"),
    "no mapping": ("- 1", "the file: [1]; expected keys with values"),
    "empty": ("", "the file: None"),
    "a Python object": ("title: !!python/object:os.system {}", "not valid YAML"),
    "not UTF-8": (b"title: \xff\xfe", "not valid YAML"),
    "a control character": (b"title: \x00", "not valid YAML"),
    "a list as a key": ("? [a]\n: 1", "not valid YAML"),
    "unknown key": (GOOD + "colums: {}", "at the top: unknown key 'colums'"),
    "unknown key in a row": (GOOD.replace("VS2: {model", "VS2: {modle"), "rows: VS2: unknown key 'modle'"),
    "unknown key in a column": (GOOD.replace("B: {dataset", "B: {data"), "columns: B: unknown key 'data'"),
    "unknown flag": (GOOD.replace("{k: 32}", "{kk: 32}"), "row 'VS2', column 'A': sae: unknown key 'kk'"),
    "a flag of the wrong kind": (GOOD.replace("{k: 32}", "{k: many}"), "k is 'many'; expected a whole number"),
    "more digits than a float has": (GOOD.replace("[1, [2, 3]]", f"[1{'0' * 400}, 2]"), "line 12: not valid YAML: a n"),
    "as many as a flag": (GOOD.replace("lr: 0.001", f"lr: 1{'0' * 400}"), "line 7: not valid YAML: a number with too"),
    "hexadecimal": (
        GOOD.replace("[3, 1]", f"[0x{'f' * 4000}]"), "line 10: not valid YAML: a number with too many digits"
    ),
    "infinity": (GOOD.replace("[1, [2, 3]]", "[1.0e+999, 2]"), "published: VS2: A: inf; expected a number"),
    "true is no number": (GOOD.replace("{k: 32}", "{k: true}"), "k is True; expected a whole number"),
    "several values": (GOOD.replace("{k: 32}", "{k: [32, 64]}"), "k is [32, 64]; expected one value"),
    "a number outside its range": (GOOD.replace("{k: 32}", "{k: 0}"), "k is 0; expected a whole number from 1"),
    "a word that is none": (GOOD.replace("{k: 32}", "{recipe: mine}"), "recipe is 'mine'; expected default or paper"),
    "a key twice": (GOOD.replace("  plain:", "  VS2: {}\n  plain:"), "'VS2' is given twice"),
    "unknown method": (GOOD.replace("vs2:{backbone}", "vs3:{backbone}"), "row 'VS2', column 'A': model 'vs3:"),
    "unknown option": (GOOD.replace("lam: 3", "lamda: 3"), "unknown option 'lamda'"),
    "option outside its range": (GOOD.replace("lam: 3", "lam: -3"), "option lam='-3'"),
    "checkpoint": (GOOD.replace("vs2:{backbone}", "vs2:{backbone}@mine"), "names a checkpoint"),
    "another backbone": (
        GOOD.replace("vs2:{backbone}", "vs2:ViT-B-16"), "does not have the backbone 'ViT-B-32-quickgelu'"
    ),
    "no weights": (GOOD.replace(",openai", ""), "expected MODEL,WEIGHTS"),
    "steered backbone": (GOOD.replace('"ViT', '"vs2:ViT'), "expected MODEL,WEIGHTS"),
    "no data set": (GOOD.replace("dataset: cifar100\n", ""), "no 'dataset'"),
    "best of no row": (
        GOOD.replace("sae: {k: 32}, seeds: [3, 1]}", "seeds: [0]}\n  best: {best_of: [VS3]}"),
        "'VS3'; expected",
    ),
    "best of itself": (
        GOOD.replace("seeds: [3, 1]}", "seeds: [0]}\n  best: {best_of: [best]}"),
        "'best'; expected other",
    ),
    "best of a column": (GOOD.replace("A: {}", "A: {best_of: [VS2]}"), "columns: A: unknown key 'best_of'"),
    "best of and a model": (
        GOOD.replace("seeds: [3, 1]}", 'seeds: [0]}\n  best: {model: "{backbone}", best_of: [VS2]}'),
        "leave out model",
    ),
    "no rows": (GOOD.partition("rows:")[0], "no 'rows'"),
    "empty rows": (GOOD.partition("rows:")[0] + "rows: {}", "rows: is empty"),
    "rows that are a list": (GOOD.partition("rows:")[0] + "rows: [a]", "rows: ['a']; expected keys"),
    "a row that is a number": (GOOD.replace("  VS2: {model", "  1: {model"), "key 1 is not text"),
    "published of no row": (GOOD.replace("  VS2: [1", "  VS3: [1"), "published: VS3: there is no such row"),
    "published of no column": (GOOD.replace("[2, 3]]", "[2, 3], 4]"), "published: VS2: 3 numbers for 2 columns (A, B)"),
    "published text": (GOOD.replace("[1, ", "['1', "), "published: VS2: A: '1'; expected a number"),
    "published nan": (GOOD.replace("[1, ", "[.nan, "), "published: VS2: A: nan; expected a number"),
    "published backwards": (GOOD.replace("[2, 3]", "[3, 2]"), "published: VS2: B: [3, 2]; expected a number"),
    "prompt without class": (GOOD + "prompts: a photo", "prompts: 'a photo'; expected prompts with {c}"),
    "no prompts": (GOOD + "prompts: []", "prompts: []; expected prompts"),
    "unknown metric": (GOOD + "metric: speed", "metric 'speed'; expected accuracy, coverage, fvu, gain"),
    "coverage of a plain model": (GOOD + "metric: coverage", "coverage is not for the plain model"),
    "class without gain": (GOOD + "class: tractor", "a class is only for the metric gain"),
    "seeds": (GOOD.replace("[3, 1]", "[1, 1]"), "expected a list of different whole numbers"),
    "negative seed": (GOOD.replace("[3, 1]", "[-1]"), "expected a list of different whole numbers"),
    "seed": (GOOD.replace("[3, 1]", "3"), "expected a list of different whole numbers"),
    "train_on": (GOOD + "train_on: cifar100", "train_on: 'cifar100'; expected a list"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_one_line_with_its_name_and_the_place(name, tmp_path):
    text, expected = WRONG[name]
    text = text.encode() if isinstance(text, str) else text
    path = tmp_path / "table.yaml"
    path.write_bytes(text)
    with pytest.raises(SettingError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and expected in message and "\n" not in message.strip()


def test_files_that_are_not_there_or_clash_are_named(tmp_path):
    with pytest.raises(SettingError, match=r"nothing\.yaml: cannot be read: No such file"):
        read(tmp_path / "nothing.yaml")
    with pytest.raises(SettingError, match=rf"no \*\.yaml in the folder {tmp_path};"):
        read_all([tmp_path])
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    paths = [write(tmp_path / name, GOOD) for name in ("one", "two")]
    with pytest.raises(SettingError, match="two files are called 'table'"):
        read_all(paths)


def test_the_command_prints_the_line_and_ends_with_2(tmp_path, capsys):
    from vs2_plugin.cli.main import main

    path = write(tmp_path, GOOD.replace("lam: 3", "lamda: 3"))
    assert main(["reproduce", str(path), "--list"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(f"vs2: error: {path}: row 'VS2'")


def test_the_stand_in_keeps_the_shape_of_a_table(tmp_path):
    text = GOOD.replace("lam: 3", "lam: 3, blocks: 9+11").replace("{k: 32}", "{k: 96, blocks: [9, 11], recipe: paper}")
    cell = stand_in(read(write(tmp_path, text))).cells[-1]
    assert cell.published is None
    assert cell.model == "vs2:local-dir:tiny-clip@lam=3.0@blocks=1+3"
    assert (cell.backbone, cell.weights, cell.dataset) == ("local-dir:tiny-clip", "", "wds/digits")
    flags = dict(cell.sae.flags)
    assert flags["k"] == 16 and flags["blocks"] == (1, 3) and cell.sae.datasets == ("wds/digits",)
    assert json.loads(json.dumps(flags)) == {**flags, "blocks": [1, 3]}


def test_a_backbone_of_unknown_size_has_no_stand_in(tmp_path):
    text = GOOD.replace("ViT-B-32-quickgelu", "RN50")
    with pytest.raises(SettingError, match="no stand-in for 'RN50'"):
        stand_in(read(write(tmp_path, text)))


def test_tables_of_the_paper_go_by_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (depth,) = read_all([Path("depth")])
    assert depth.path == PAPER / "depth.yaml"
    assert [table.path for table in read_all([Path("paper"), Path("depth")])] == sorted(PAPER.glob("*.yaml"))
    with pytest.raises(SettingError, match="no file 'deep', and no table of the paper .* one of controls, depth, fvu"):
        read_all([Path("deep")])
    with pytest.raises(SettingError, match=r"depth\.yaml: cannot be read"):
        read_all([Path("depth.yaml")])
    (tmp_path / "paper").mkdir()  # what lies here goes first
    with pytest.raises(SettingError, match=r"no \*\.yaml in the folder paper"):
        read_all([Path("paper")])


def test_a_wheel_holds_the_tables(tmp_path):
    wheel = pytest.importorskip("hatchling.builders.wheel")
    (path,) = wheel.WheelBuilder(str(PAPER.parents[1])).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(path) as packed:
        names = [name for name in packed.namelist() if name.startswith("vs2_plugin_paper/")]
        held = {name.rpartition("/")[2]: packed.read(name) for name in names}
    assert held == {file.name: file.read_bytes() for file in PAPER.iterdir()}
