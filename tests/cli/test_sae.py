"""``vs2 sae``: its flags and what it prints."""

import json

import pytest

from vs2_plugin.checkpoint.store import Store
from vs2_plugin.cli.main import main

NAME = "local-dir-tiny-clip_wds-digits"


def test_predictions_and_other_data_are_measured_where_they_are_named(folder, tmp_path, capsys):
    words = ["--dataset", "wds/digits", "--dataset_root", "digits", "--elsewhere", NAME, "--out", str(tmp_path)]
    assert main(["sae", NAME, *words, "--json"]) == 0
    [sae] = json.loads(capsys.readouterr().out)["saes"]
    figures = sae["figures"]
    assert 0 < figures["agreement"]["value"] <= 1 and figures["recovered"]["value"] > 0.5  # PASS has kept the labels
    assert figures["explained_variance_elsewhere"]["value"] > figures["explained_variance"]["value"]
    assert sae["site"].endswith("resblocks.3") and sae["held_out"] == 30
    assert (tmp_path / "index.html").exists() and (tmp_path / "quality.json").exists()
    of = Store.default().find(NAME).save(tmp_path / "saved").folder / "README.md"
    assert "images of wds/digits, from the gallery), with 10 classes of wds/digits." in of.read_text()


def test_blocks_variants_and_checkpoints_without_a_gallery(folder, capsys):
    assert main(["sae", NAME, "--block", "2"]) == 0
    text = capsys.readouterr().out
    assert "at visual.transformer.resblocks.2; 300 images of wds/digits, from the gallery" in text
    assert "not measured: Zero-shot predictions kept: it needs classes" in text
    assert main(["sae", NAME, "--variant", "pass"]) == 0
    assert "resblocks.3.pass" in capsys.readouterr().out
    assert main(["sae", "bare"]) == 0
    assert "no activations are available" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["nope"], ["no SAE checkpoint 'nope'"]),
        ([NAME, "--quiet"], ["--quiet prints nothing"]),
        ([NAME, NAME], ["is given twice"]),
        ([NAME, "--labels", "y.npy"], ["--labels belong to --activations"]),
        ([NAME, "--activations", "none.npy"], ["cannot be read"]),
        ([NAME, "--elsewhere", "bare"], ["has no gallery"]),
        ([NAME, "--elsewhere", "none.npy"], ["--elsewhere 'none.npy' cannot be read"]),
        ([NAME, "--elsewhere", "~no one/x.npy"], ["--elsewhere '~no one/x.npy' cannot be read"]),
        ([NAME, "--block", "7"], ["no SAE at block 7"]),
    ],
)
def test_mistakes_end_with_one_line(folder, capsys, words, fragments):
    assert main(["sae", *words]) == 2
    [error] = [line for line in capsys.readouterr().err.splitlines() if line]
    assert error.startswith("vs2: error: ") and all(fragment in error for fragment in fragments)


def test_where_nothing_can_be_written_nothing_is_measured(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vs2_plugin.quality.measure.measure", lambda *args: pytest.fail("measured too early"))
    (tmp_path / "file").touch()
    assert main(["sae", NAME, "--out", str(tmp_path / "file" / "new")]) == 2
    assert "file is no folder that can be written; name another folder with --out" in capsys.readouterr().err
