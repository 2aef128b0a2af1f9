"""``vs2 classify`` as a person types it."""

import re
import shutil

import pytest

from vs2_plugin.cli import main

from ..classify.conftest import COUNT, TINY, here, photographed  # noqa: F401

WORDS = ("--model", f"vs2:{TINY}", "--no_amp", "--num_workers", "0")


@pytest.fixture
def classify(here, capsys):  # noqa: F811
    def run(*words):
        code = main.main(["classify", *words])
        return code, *capsys.readouterr()

    return run


def test_photos_become_a_table(classify, tmp_path):
    out = tmp_path / "new" / "x.csv"
    code, said, warned = classify("photos", *WORDS, "--out", str(out))
    lines = said.splitlines()
    assert code == 0 and "error" not in warned
    assert lines[0] == f"{COUNT} images, 3 classes" and lines[-1] == f"wrote {out}"
    assert lines[1].startswith("SAE: ") and re.match(r"steering changed the class of [0-9]+ of 60 images \(", lines[2])
    assert len(out.read_text().splitlines()) == COUNT + 1
    code, said, warned = classify("photos", *WORDS, "--out", str(out))
    assert (code, said) == (2, "") and warned.endswith(
        f"vs2: error: --out '{out}' already exists; name another file, or replace it with --overwrite\n"
    )
    assert classify("photos", *WORDS, "--out", str(out), "--overwrite", "--quiet")[:2] == (0, "")


def test_unreadable_images_are_counted_and_the_rest_goes_on(classify, tmp_path):
    shutil.copytree("photos/nine", tmp_path / "nine")
    (tmp_path / "nine/broken.png").write_bytes(b"\x89PNG")
    (tmp_path / "nine/phone.HEIC").write_bytes(b"heic")
    model = f"vs2:{TINY}@local-dir-tiny-clip_folder-photos"
    words = ("--model", model, "--classes", "nine,ten", *WORDS[2:], "--out", str(tmp_path / "x.csv"))
    code, said, warned = classify(str(tmp_path / "nine"), *words)
    assert code == 0 and "vs2: 1 image could not be read; the column error says why" in warned
    assert said.splitlines()[0].endswith(" images, 2 classes; 1 other file skipped (1 .heic)")


def test_a_mistake_is_one_line(classify, tmp_path):
    code, said, warned = classify("photos/nine", *WORDS, "--out", str(tmp_path / "x.csv"))
    assert (code, said) == (2, "")
    assert warned.splitlines()[-1].startswith("vs2: error: photos/nine holds no folders of classes, so ")
    code, said, warned = classify("photos", *WORDS, "--out", str(tmp_path / "x.xls"))
    assert (code, said) == (2, "") and warned.startswith("vs2: error: --out ")
