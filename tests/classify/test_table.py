"""The table: its columns, rows that survive an interruption, and its formats."""

import csv
import json

import pytest
import torch

from vs2_plugin.classify import table
from vs2_plugin.classify.table import Part, columns, require_format, rows_of, write_table
from vs2_plugin.errors import SettingError
from vs2_plugin.model.predictions import Predictions


def predictions(count=2, classes=7):
    generator = torch.Generator().manual_seed(0)
    logits, plain = (10 * torch.randn(count, classes, generator=generator) for _ in range(2))
    names = tuple("abcdefghij"[:classes])
    return Predictions(names, logits, plain, torch.tensor([0.1, float("nan")])[:count], torch.tensor([True, False]))


@pytest.fixture
def rows():
    return list(rows_of(["x.png", "bad, or worse.png", "b\udcffy.png"], ["", "no image", ""], predictions()))


def test_a_row_has_the_best_classes_and_what_was_without_steering(rows):
    found = predictions()
    assert list(rows[0]) == list(columns(7))[:-1]
    assert rows[1] == {"path": "bad, or worse.png", "error": "no image"}
    assert [row["class"] for row in rows[::2]] == found.names and rows[0]["class_5"] == found.top(5)[0][4][0]
    chances = torch.tensor([rows[0]["probability"], rows[0]["probability_2"]])
    assert torch.equal(chances, found.probabilities[0].sort(descending=True).values[:2])  # bit for bit
    assert rows[0]["changed"] is bool(found.changed[0]) and rows[2]["fvu"] is None and not rows[2]["steered"]
    assert [name for name in columns(2) if name.startswith("class")] == ["class", "class_2"]
    assert "class_6" not in columns(7) and "probability_5" in columns(7)


@pytest.mark.parametrize("name", ["x.csv", "x.JSONL", "x.parquet"])
def test_every_format_holds_the_same(name, rows, tmp_path):
    path = tmp_path / name
    if path.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    rows[0]["class_2"] = "b\udcff"  # --classes of another encoding
    write_table(path, columns(7), rows)
    if path.suffix == ".parquet":
        found = parquet.read_table(path).to_pylist()
        assert found[0]["class_2"] == "b\ufffd"
        assert found[2]["path"] == "b\ufffdy.png" and found[0]["changed"] is rows[0]["changed"]
    elif path.suffix == ".csv":
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            found = [{name: value or None for name, value in row.items()} for row in csv.DictReader(file)]
        assert found[2]["path"] == "b\udcffy.png" and found[0]["changed"] in ("true", "false")
    else:
        found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [list(row) for row in found] == 3 * [list(columns(7))]
    assert [row["error"] for row in found] == [None, "no image", None] and found[1]["class"] is None
    assert float(found[0]["probability"]) == pytest.approx(rows[0]["probability"]) and found[2]["fvu"] is None


def test_parquet_needs_its_package(monkeypatch, tmp_path):
    monkeypatch.setattr(table.importlib.util, "find_spec", lambda name: None)
    require_format(tmp_path / "x.csv")
    with pytest.raises(SettingError, match="pip install pyarrow"):
        require_format(tmp_path / "x.PARQUET")


PATHS = [f"{number}.png" for number in range(10)]


@pytest.fixture
def part(tmp_path):
    part = Part(tmp_path / "x.csv")
    with part.opened():
        assert part.settle({"a": 1, "b": [2]}, PATHS, 4) == (0, [])
        yield part


def test_rows_of_whole_batches_are_kept(part, tmp_path):
    part.append({"path": path} for path in PATHS[:9])
    assert part.settle({"a": 1, "b": (2,)}, PATHS, 4) == (8, [])
    part.append({"path": path} for path in PATHS[8:])
    assert part.settle({"a": 1, "b": [2]}, PATHS, 4) == (10, [])
    assert [row["path"] for row in part.rows()] == PATHS
    part.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [b'{"path": "4.p', b"\0\0\0\0\n", b"7\n", b'{"path": "5.png"}\n', b"{}\n"])
def test_what_a_dying_process_left_is_cut_off(damage, part, tmp_path):
    part.append({"path": path} for path in PATHS[:4])
    with open(tmp_path / "x.csv.part/rows.jsonl", "ab") as file:
        file.write(damage)
    assert part.settle({"a": 1, "b": [2]}, PATHS, 4) == (4, [])
    assert [row["path"] for row in part.rows()] == PATHS[:4]


@pytest.mark.parametrize(("old", "new"), [(b": 0.5", b": 0.7"), (b": 0.5", b": NaN"), (b'"path"', b'"pith"')])
def test_from_a_changed_row_on_nothing_is_kept(old, new, part, tmp_path):
    part.append({"path": path, "probability": 0.5} for path in PATHS)
    file = tmp_path / "x.csv.part/rows.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    lines[5] = lines[5].replace(old, new)
    file.write_bytes(b"".join(lines))
    assert part.settle({"a": 1, "b": [2]}, PATHS, 4) == (4, [])
    assert [row["path"] for row in part.rows()] == PATHS[:4]


def test_files_nested_too_deeply_are_as_good_as_none(part, tmp_path):
    for name in ("rows.jsonl", "settings.json"):
        part.append({"path": path} for path in PATHS[:4])
        (tmp_path / "x.csv.part" / name).write_text(100_000 * "[" + "\n")
        assert part.settle({"a": 1, "b": [2]}, PATHS, 4) == (0, []) and list(part.rows()) == []


def test_a_full_disk_is_named_with_the_file(part, tmp_path, monkeypatch):
    monkeypatch.setattr(table, "open", lambda *given: open("/dev/full", "wb", buffering=0), raising=False)
    with pytest.raises(OSError, match="No space left on device: '.*/x.csv.part/rows.jsonl'"):
        part.append([{"path": "0.png"}])


def test_rows_of_other_settings_are_none(part, tmp_path):
    part.append({"path": path} for path in PATHS[:4])
    assert part.settle({"a": 1, "b": [3]}, PATHS, 4) == (0, ["b"]) and list(part.rows()) == []
    part.append({"path": path} for path in PATHS[:4])
    (tmp_path / "x.csv.part/settings.json").write_text("{")
    assert part.settle({"a": 1, "b": [3]}, PATHS, 4) == (0, []) and list(part.rows()) == []


def test_one_process_writes_a_table(part, tmp_path, elsewhere):
    code = "from pathlib import Path; from vs2_plugin.files import alone\n"
    code += f"try:\n with alone(Path({str(tmp_path / 'x.csv.part/rows.jsonl')!r}), seconds=0): print('mine')\n"
    assert "another process is writing" in elsewhere(code + "except Exception as error: print(error)")
