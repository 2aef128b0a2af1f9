"""What stands in for the paper's models and data."""

from dataclasses import replace

import pytest

from vs2_plugin.demo.digits import CLASSES
from vs2_plugin.errors import SettingError
from vs2_plugin.modelstring import parse
from vs2_plugin.reproduce.reading import read
from vs2_plugin.reproduce.stand_in import DATASET, MODEL, stand_in, workplace

TABLE = """\
title: T
backbone: "ViT-L-14,openai"
dataset: cifar100
seeds: [0, 1]
sae: {recipe: paper, expansion_factor: 10, k: 128, blocks: [22, 23], max_images: 5, retrieval_encoder: dino}
columns:
  accuracy: {}
  gain: {metric: gain, class: tractor}
  other gain: {metric: gain, class: apple}
rows:
  VS2: {model: "vs2:{backbone}@blocks=21+23@lam=3"}
  VS2++: {model: "vs2pp:{backbone}@encoder=dino@n=5"}
  others: {model: null}
published:
  VS2: [70, 1, 2]
"""


@pytest.fixture
def table(tmp_path):
    (tmp_path / "table.yaml").write_text(TABLE)
    return read(tmp_path / "table.yaml")


def test_every_model_is_the_tiny_one_and_nothing_is_published(table):
    found = stand_in(table)
    assert found.stand_in and not table.stand_in and len(found.cells) == len(table.cells)
    for cell, was in zip(found.cells, table.cells, strict=True):
        assert (cell.row, cell.column, cell.metric, cell.seeds) == (was.row, was.column, was.metric, was.seeds)
        assert (cell.backbone, cell.weights, cell.dataset, cell.published) == (MODEL, "", DATASET, None)
        assert (cell.model is None) == (was.model is None)
    models = {cell.row: cell.model for cell in found.cells}
    assert models["others"] is None
    assert parse(models["VS2"]).given == {"blocks": "1+3", "lam": 3.0}  # counted from the end
    assert parse(models["VS2++"]).given == {"n": 5}  # there is no such encoder offline


def test_classes_that_gain_are_digits_each_its_own(table):
    found = {cell.column: cell.of_class for cell in stand_in(table).cells}
    assert found == {"accuracy": None, "gain": CLASSES[0], "other gain": CLASSES[1]}


def test_saes_have_the_same_share_of_active_latents_at_blocks_counted_from_the_end(table):
    [flags] = {cell.sae.flags for cell in stand_in(table).cells if cell.sae}
    found = dict(flags)
    assert found == {"expansion_factor": 10, "k": 16, "blocks": (2, 3), "recipe": "default", "samples": 20_000}
    assert found["k"] / 128 == 128 / 1024  # of the width


def test_a_backbone_that_open_clip_does_not_know_is_refused(table):
    cells = tuple(replace(cell, backbone="ViT-X-99") for cell in table.cells)
    with pytest.raises(SettingError, match="no stand-in for 'ViT-X-99': expected a ViT that open_clip knows"):
        stand_in(replace(table, cells=cells))


def test_the_place_is_written_once_and_only_where_something_shall_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert workplace(tmp_path / "out", write=False) == tmp_path and not (tmp_path / "out").exists()
    assert workplace(tmp_path / "out", write=True) == tmp_path / "out"
    assert {path.name for path in (tmp_path / "out").glob("[!.]*")} == {"digits", "tiny-clip"}
    (tmp_path / "out/digits/test/nshards.txt").write_text("1\n")
    assert workplace(tmp_path / "out", write=True) == workplace(tmp_path / "out", write=False) == tmp_path / "out"
    assert (tmp_path / "out/digits/test/nshards.txt").read_text() == "1\n"
