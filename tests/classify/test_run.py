"""From photos to a table, as the model itself classifies them, also in two goes."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import vs2_plugin
from vs2_plugin.classify import run
from vs2_plugin.classify.plan import make_plan
from vs2_plugin.classify.request import ClassifyRequest
from vs2_plugin.classify.table import Part
from vs2_plugin.data.pictures import open_picture

from .conftest import CLASSES, COUNT, TINY, write_photos

NAME = "local-dir-tiny-clip_folder-photos"
RAG = f"rag:{TINY}@{NAME}"
CHAPTER = Path(vs2_plugin.__file__).parent / "docs" / "classifying.md"


@pytest.fixture
def classify(here, tmp_path):
    """A function that classifies, and gives the rows, what was said and the summary."""

    def classify(*photos, out="x.csv", **settings):
        given = {"model": f"vs2:{TINY}@gate=0.9", "amp": False, "num_workers": 0, "batch_size": 16, **settings}
        said = []
        request = ClassifyRequest(photos=photos or ("photos",), out=str(tmp_path / out), **given)
        found = run.classify(make_plan(request), said.append, quiet=True)
        with open(tmp_path / out, newline="") as file:
            return list(csv.DictReader(file)), said, found

    return classify


def test_rows_are_what_the_model_makes_of_the_photos(classify, tmp_path):
    rows, said, summary = classify(page=str(tmp_path / "x.html"))
    paths = sorted(map(str, Path("photos").rglob("*.png")))
    assert [row["path"] for row in rows] == paths
    assert said == [
        f"SAE: {NAME} of {TINY}, 16 of 512 latents active, trained on {COUNT} images of folder/photos, "
        "including photos that are classified"
    ]
    model, transform, _ = vs2_plugin.load(f"vs2:{TINY}@gate=0.9", dataset="photos/", classes=CLASSES, amp=False)
    images = torch.stack([transform(open_picture(path)) for path in paths])
    found = model.classify(images, batch_size=16)
    assert [row["class"] for row in rows] == found.names
    told = torch.tensor([float(row["probability"]) for row in rows])
    assert torch.equal(told, found.probabilities.amax(1))
    assert torch.equal(torch.tensor([float(row["fvu"]) for row in rows]), found.fvu)
    assert [row["steered"] == "true" for row in rows] == found.steered.tolist()
    assert [row["changed"] == "true" for row in rows] == found.changed.tolist()
    assert summary.images == COUNT and summary.changed == int(found.changed.sum()) and summary.unreadable == 0
    assert found.steered.sum() < COUNT and sum(summary.classes.values()) == COUNT
    assert "including photos that are classified" in (tmp_path / "x.html").read_text()
    assert summary.written == [str(tmp_path / name) for name in ("x.html", "x.csv")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.csv", "x.html"]


def test_an_interrupted_run_goes_on_and_comes_to_the_same(classify, tmp_path, monkeypatch):
    whole, _, _ = classify(out="whole.csv")
    append, rows = Part.append, []

    def stop(self, batch):
        append(self, batch)
        rows.append(16)
        if len(rows) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Part, "append", stop)
        with pytest.raises(KeyboardInterrupt):
            classify(out="parts.csv")
    assert not (tmp_path / "parts.csv").exists() and (tmp_path / "parts.csv.part").is_dir()
    with open(tmp_path / "parts.csv.part/rows.jsonl", "a") as file:
        file.write('{"path": "half a')
    rest, said, _ = classify(out="parts.csv")
    assert said[1:] == [f"32 of {COUNT} images are already classified; continuing from there"] and rest == whole
    assert (tmp_path / "parts.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert not (tmp_path / "parts.csv.part").exists()


@pytest.mark.parametrize(
    ("changed", "told"),
    [({"batch_size": 8}, "--batch_size"), ({"classes": "a,b,c"}, "--classes"), ({"model": f"vs2:{TINY}"}, "--model")],
)
def test_other_settings_start_anew(changed, told, classify, tmp_path, monkeypatch):
    def stop(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Part, "rows", stop)
        with pytest.raises(KeyboardInterrupt):
            classify()
    rows, said, _ = classify(**changed)
    assert said[1:] == [f"an interrupted run had other settings ({told}); starting again"]
    assert len(rows) == COUNT


def test_an_image_that_cannot_be_read_has_a_row_that_says_so(classify, tmp_path):
    folder = tmp_path / "own"
    write_photos(folder, 6)
    (folder / "nine/a.jpg").write_bytes(b"no image")
    (folder / "nine/b.png").write_bytes(b"")
    (tmp_path / "a.jpg").write_bytes(b"no image")
    rows, _, summary = classify(str(folder), str(tmp_path / "a.jpg"), batch_size=1, model=RAG, classes="a,b")
    errors = {Path(row["path"]).name: row["error"] for row in rows if row["error"]}
    assert set(errors) == {"a.jpg", "b.png"} and "not a readable image" in errors["a.jpg"] and len(rows) == 9
    assert (summary.images, summary.unreadable) == (6, 3)
    assert all(row["class"] == "" for row in rows if row["error"])


def test_without_an_sae_one_is_trained_on_the_photos(classify, tmp_path, monkeypatch):
    train = run.train
    monkeypatch.setattr(run, "train", lambda request, report: train(replace(request, samples=500), report=report))
    monkeypatch.setenv("VS2_STORE", str(tmp_path / "store"))
    write_photos(tmp_path / "few", 24)
    warned = []
    monkeypatch.setattr(run._LOG, "warning", lambda text, *values: warned.append(text % values))
    rows, said, _ = classify(str(tmp_path / "few"), model=f"vs2:{TINY}")
    assert said[0].endswith("training one on the photos themselves, without labels (transductive)")
    assert len(rows) == 24 and not any(line.startswith("evaluate") for line in said)
    assert len(warned) == 1 and warned[0].startswith("the SAE learned from 24 images, too few for")
    _, said, _ = classify(str(tmp_path / "few"), model=f"vs2:{TINY}", out="again.csv")
    assert len(said) == 1 and said[0].startswith("SAE: ")


def test_it_is_said_what_an_sae_is_trained_on(here, tmp_path, monkeypatch):
    write_photos(tmp_path / "few", 6)
    said, where = [], {"train_images": (str(tmp_path / "few"), "photos"), "out": str(tmp_path / "x.csv")}
    request = ClassifyRequest(photos=("photos",), model=f"vs2:{TINY}", **where)

    def stop(request, report):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        run.classify(make_plan(request), said.append, quiet=True)
    assert said == [f"there is no SAE for this yet: training one on {tmp_path}/few photos"]


def test_it_is_said_when_the_model_is_left_alone(classify):
    """Over nonsense classes, no strength tells more than none."""
    _, said, summary = classify("photos/nine", model=f"vs2s:{TINY}@{NAME}", classes="a,b")
    assert said[1].endswith("the model is left as it is: nothing is steered") and summary.changed == 0


def test_json_lines_and_a_table_that_is_replaced(here, tmp_path):
    out = tmp_path / "x.jsonl"
    for photos in ("photos/nine", "photos/seven"):
        request = ClassifyRequest(
            photos=(photos,), model=RAG, classes="nine,seven", out=str(out), overwrite=True, amp=False, num_workers=0
        )
        said = []
        run.classify(make_plan(request), said.append, quiet=True)
        assert said[0].endswith("including photos that are classified")
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert {Path(row["path"]).parent.as_posix() for row in rows} == {photos}
        assert all(row["fvu"] is None and row["steered"] is True for row in rows)


def test_the_python_of_the_chapter_runs(here):
    """As it stands there, but for the model, the pictures and autocast."""
    (code,) = re.findall(r"^```python\n(.*?)^```", CHAPTER.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    one, two = map(str, sorted(Path("photos/nine").iterdir())[:2])
    for old, new in (
        ("ViT-B-32", TINY), ("laion2b_s34b_b79k", ""), ("one.jpg", one), ("two.jpg", two),
        ("])\nprint", "], amp=False)\nprint"),
    ):  # fmt: skip
        assert old in code
        code = code.replace(old, new, 1)
    names = {}
    exec(compile(code, CHAPTER.name, "exec"), names)
    assert names["predictions"].images == (one, two)
