"""``vs2 latents``: its flags and what it prints."""

import re

import pytest
from PIL import Image

from vs2_plugin.cli.main import main

from ..conftest import IMAGES

DATA = ["--pretrained", "", "--dataset", "wds/digits", "--dataset_root", "digits"]


def run(*words, model="vs2", options=""):
    return main(["latents", "--model", f"{model}:local-dir:tiny-clip{options}", *DATA, *map(str, words)])


def test_what_is_printed(folder, tmp_path, capsys):
    assert run("--out", tmp_path, "--limit", 4, options="@blocks=2") == 0
    text, problems = capsys.readouterr()
    names = [line.partition(": ")[0] for line in text.splitlines()]
    assert names[:9] == [
        "model", "checkpoint", "labels used", "classes", "site", "training images", "latents", "dead", "rare"
    ]  # fmt: skip
    files = [f"wrote {tmp_path / 'index.html'}", f"wrote {tmp_path / 'latents.csv'}"]
    assert names[9:] == ["dense", "purity", "to leave some out", *files]
    assert re.search(r"^to leave some out: latents:local-dir:tiny-clip@blocks=2@suppress=\d+\+\d+$", text, re.MULTILINE)
    assert f"site: block 2\ntraining images: {IMAGES}\nlatents: 512, of which 16 are active in an image" in text
    assert problems.startswith("vs2: Nearest words are shown at the tower's end only")


def test_quiet_prints_nothing(folder, tmp_path, capsys):
    assert run("--out", tmp_path, "--limit", 4, "--quiet") == 0
    assert capsys.readouterr() == ("", "") and (tmp_path / "latents.csv").exists()


@pytest.mark.parametrize(
    ("model", "options", "fragments"),
    [
        ("rag", "", ["does not steer along an SAE"]),
        ("vs2", "@blocks=all", ["steers at 2 sites", "@blocks=3"]),
        ("vs2", "@bare", ["has no gallery of training images; train the checkpoint again"]),
    ],
)
def test_mistakes_end_with_one_line(folder, tmp_path, capsys, model, options, fragments):
    assert run("--out", tmp_path / "out", model=model, options=options) == 2
    [error] = [line for line in capsys.readouterr().err.splitlines() if line]
    assert error.startswith("vs2: error: ") and all(fragment in error for fragment in fragments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["latents", "inspect"])
def test_where_nothing_can_be_written_nothing_is_loaded(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vs2_plugin.inspection.subject.open_subject", lambda *a, **k: pytest.fail("loaded too early"))
    (tmp_path / "file").touch()
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    images = [str(tmp_path / "x.png")] if command == "inspect" else []
    words = ["--model", "vs2:local-dir:tiny-clip", *DATA, "--out", str(tmp_path / "file" / "new")]
    assert main([command, *images, *words]) == 2
    assert "file is no folder that can be written; name another folder with --out" in capsys.readouterr().err


def test_help_shows_examples_and_the_formulas(capsys):
    with pytest.raises(SystemExit):
        main(["latents", "--help"])
    text = capsys.readouterr().out
    assert "examples:" in text and "Purity:" in text and "cos(e(mu + t w) - e(mu), text - mean text)" in text
