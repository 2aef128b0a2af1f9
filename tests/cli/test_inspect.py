"""``vs2 inspect``: its flags and what it prints."""

import io
import re

import pytest

from vs2_plugin.cli.main import main

DATA = ["--pretrained", "", "--dataset", "wds/digits", "--dataset_root", "digits"]


def run(*words, model="vs2", options=""):
    return main(["inspect", "--model", f"{model}:local-dir:tiny-clip{options}", *DATA, *map(str, words)])


def test_what_is_printed(folder, digit, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(digit(904), digit(905), "--top", 2, "--latents", 3, "--out", out, model="vs2pp") == 0
    text, problems = capsys.readouterr()
    title, first, second = text.split("\n\n")
    assert title.startswith("model: vs2pp:local-dir:tiny-clip\n") and "\nlabels used: none\n" in title
    assert first.startswith("904.png\n") and second.startswith("905.png\n") and problems == ""
    for block in (first, second):
        assert re.search(r"^  class +before +after +change of the logit$", block, flags=re.MULTILINE)
        classes = re.findall(r"^  \w+ +[\d.]+ % +[\d.]+ % +[+-][\d.]+$", block, flags=re.MULTILINE)
        assert 2 <= len(classes) <= 4
        assert re.search(r"^  block 3: FVU [\d.]+ \(held-out .*\); no gate, ", block, flags=re.MULTILINE)
        assert re.search(r"^    contributions to the lead of \w+ over \w+$", block, flags=re.MULTILINE)
        assert re.search(r"^    \(3 of \d+ active latents: those that contributed most", block, flags=re.MULTILINE)
        lines = re.findall(r"^    latent \d+ +-?[\d.]+ +[+-][\d.]+  \w+ [\d.]+, \w+ ", block, flags=re.MULTILINE)
        assert len(lines) == 3
        assert "without these latents" not in block  # they are the neighbours', which this image may not have
        for sum_ in (r"\d+ other latents", "back to the norm of x", "remainder", "change"):
            assert re.search(rf"^    {sum_} +[+-]\d+\.\d+$", block, flags=re.MULTILINE)
        assert "  The 50 nearest training images, nearest first, each with its zero-shot class." in block
        assert len(re.findall(r"S[+-] \w+ [\d.]+", block)) == 10
    assert text.endswith(f"\nwrote {out / 'index.html'}\n") and (out / "index.html").exists()


def test_a_model_without_the_latents_that_are_shown_is_named(folder, digit, capsys):
    assert run(digit(904), "--latents", 3) == 0
    named = r"^    without these latents: latents:local-dir:tiny-clip@suppress=\d+\+\d+\+\d+$"
    assert re.search(named, capsys.readouterr().out, flags=re.MULTILINE)


def test_quiet_prints_nothing(folder, digit, tmp_path, capsys):
    assert run(digit(904), "--quiet", "--out", tmp_path, options="@bare") == 0
    assert capsys.readouterr() == ("", "") and (tmp_path / "index.html").exists()
    assert run("904.png", "--quiet") == 2
    assert "give --out FOLDER, or omit --quiet" in capsys.readouterr().err


def test_what_could_not_be_shown_is_told_on_stderr(folder, digit, capsys):
    assert run(digit(904), options="@bare") == 0
    captured = capsys.readouterr()
    assert "vs2: The checkpoint has no gallery" in captured.err and "contributions" in captured.out


def test_a_note_in_place_of_contributions(folder, digit, capsys):
    assert run(digit(904), model="rag") == 0
    text = capsys.readouterr().out
    assert "    rag does not steer by a sparse code of its own" in text and "contributions" not in text


def test_words_that_the_terminal_cannot_write(folder, digit, tmp_path, monkeypatch):
    (tmp_path / "classes.txt").write_text("cat\t\u732b\n\n dog\t\u72ac \n", encoding="utf-8")  # as in classnames.txt
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    assert run(digit(904), "--classes", tmp_path / "classes.txt") == 0
    assert b"? over ?" in written.getvalue() and b"classes: 2, by" in written.getvalue()


@pytest.mark.parametrize(
    ("words", "model", "fragments"),
    [
        (["nope.png"], "vs2", ["no file 'nope.png'"]),
        (["904.png", "--classes", "nope.txt"], "vs2", ["--classes 'nope.txt' cannot be read (No such file or"]),
        (["904.png", "--concepts", "904.png"], "vs2", ["is not UTF-8 text"]),
        (["904.png", "--concepts", "one.txt"], "vs2", ["concepts: 'word', 'word'; expected two words or more"]),
        (["904.png", "--dataset_root", "nowhere"], "vs2", ["class names", "--classes FILE"]),
        (["904.png", "--dataset", "wds/other"], "vs2", ["no SAE checkpoint", "vs2-train-sae --model"]),
        (["904.png"], "proto", ["needs the true class"]),
    ],
)
def test_mistakes_end_with_one_line(folder, digit, capsys, words, model, fragments):
    digit(904)
    (folder / "one.txt").write_text("word\nword\n")
    assert run(*words, model=model) == 2
    [error] = [line for line in capsys.readouterr().err.splitlines() if line]
    assert error.startswith("vs2: error: ") and all(fragment in error for fragment in fragments)


def test_help_shows_examples_and_the_formulas(capsys):
    with pytest.raises(SystemExit):
        main(["inspect", "--help"])
    text = capsys.readouterr().out
    assert "examples:" in text and "integrated gradients" in text and "cos(e(mu + t w) - e(mu), text - mean" in text
