"""``vs2 report``: its flags and what it prints."""

import json

import pytest

from vs2_plugin.cli.main import main

from ..results.conftest import all_results, make_images, results, steered, write_run  # noqa: F401


def test_the_command(write_run, make_images, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    write_run("B")
    folder = write_run("vs2:B", images=make_images(0.5)).parent
    (folder / "other.json").write_text("{}")
    assert main(["report", str(folder)]) == 0
    captured = capsys.readouterr()
    assert "2 result(s), 1 with per-image results" in captured.out and "wrote report/index.html" in captured.out
    assert captured.err.startswith("vs2: skipped ") and len(captured.err.splitlines()) == 1
    assert main(["report", str(folder), "--out", "quiet", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "") and (tmp_path / "quiet" / "index.html").is_file()


def test_errors_of_the_command_are_one_line(results, tmp_path, capsys):  # noqa: F811
    torn = next(results.glob("*.images.npz"))
    torn.write_bytes(b"torn")
    (tmp_path / "x.json").write_text(json.dumps({"a": "b"}))
    beside = torn.with_name(torn.name.replace("images.npz", "json"))
    for words in ([beside], [tmp_path / "x.json"], [tmp_path / "missing.json"]):
        assert main(["report", *map(str, words), "--out", str(tmp_path / "out")]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.startswith("vs2: error: ") and len(captured.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["report", "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "VS2_PER_IMAGE=1 clip_benchmark eval" in text and "vs2 report results" in text
