"""``vs2 inspect`` and ``vs2 latents``, on a real checkpoint."""

import base64
import csv
import io
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import vs2_plugin
from vs2_plugin.checkpoint.store import Store
from vs2_plugin.cli.main import main

from ..report.test_page import Page
from .conftest import BLOCK, DATA

TINY = "local-dir:tiny-clip"
NAME = "local-dir-tiny-clip_wds-digits"


def run(command, *words, model=f"vs2:{TINY}"):
    return main([command, "--model", model, "--pretrained", "", *DATA, *map(str, words)])


def page_of(out):
    return Page((out / "index.html").read_text(encoding="utf-8"))


def pictures(page):
    return [dict(attributes) for tag, attributes in page.elements if tag == "img"]


def decoded(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def contributions(text):
    """Of each block printed: line -> contribution to the lead."""
    blocks, current = [], None
    for line in text.splitlines():
        if line.strip().startswith("contributions to the lead"):
            current = {}
            blocks.append(current)
        found = re.match(r"    (\S.*?)  +(?:-?[\d.]+ +)?([+-][\d.]+)(?:  .*)?$", line)
        if found and current is not None:
            current[found[1]] = float(found[2])
    return blocks


def test_inspect_says_what_steering_did(folder, digit, capsys):
    assert run("inspect", digit(904), "--top", 3) == 0
    text = capsys.readouterr().out
    model, transform, tokenizer = vs2_plugin.load(f"vs2:{TINY}", "", dataset="wds/digits")
    from clip_benchmark.metrics.zeroshot_classification import zero_shot_classifier

    from vs2_plugin.demo.digits import CLASSES, TEMPLATES

    classifier = zero_shot_classifier(model, tokenizer, CLASSES, TEMPLATES, "cpu", amp=False)
    image = transform(Image.open("904.png"))[None]
    with torch.no_grad():
        after = 100 * torch.nn.functional.normalize(model.encode_image(image), dim=-1) @ classifier
        with model.unsteered():
            before = 100 * torch.nn.functional.normalize(model.model.encode_image(image), dim=-1) @ classifier
    assert re.search(r"^  class +before +after +change of the logit$", text, flags=re.MULTILINE)
    shown = re.findall(r"^  (\w+) +([\d.]+) % +([\d.]+) % +([+-][\d.]+)$", text, flags=re.MULTILINE)
    best = {CLASSES[index] for logits in (before, after) for index in logits[0].topk(3).indices}
    assert {name for name, *_ in shown} == best
    for name, *numbers in shown:
        index = CLASSES.index(name)
        expected = (100 * before[0].softmax(0)[index], 100 * after[0].softmax(0)[index], (after - before)[0, index])
        assert [float(number) for number in numbers] == pytest.approx([float(one) for one in expected], abs=0.06)
    gate = model.places[0].gate
    gate.reset()
    with torch.no_grad():
        model.encode_image(image)
    assert f"FVU {gate.facts['mean_fvu']:.3f}" in text and "no gate" in text
    [found] = contributions(text)
    change = found.pop("change")
    assert sum(found.values()) == pytest.approx(change, abs=0.02) and abs(found["remainder"]) < 0.01
    first, second = re.search(r"the lead of (\w+) over (\w+)", text).groups()
    difference = (after - before)[0]
    assert change == pytest.approx(
        float(difference[CLASSES.index(first)] - difference[CLASSES.index(second)]), abs=0.01
    )


@pytest.mark.parametrize(
    ("model", "rest"),
    [
        (f"pass:{TINY}", "back to the norm of x"),
        (f"amp:{TINY}@gamma=1.5", "what the SAE does not explain, left out"),
        (f"rec:{TINY}@blocks=all", "what the SAE does not explain, left out"),
        (f"vs2:{TINY}@blocks=2+3", "back to the norm of x"),
        (f"vs2pp:{TINY}", "back to the norm of x"),
    ],
)
def test_sums_close_for_every_method_with_a_sparse_code(folder, digit, capsys, model, rest):
    assert run("inspect", digit(910), "--latents", 3, "--top", 10, model=model) == 0
    text = capsys.readouterr().out
    blocks = contributions(text)
    assert len(blocks) == (2 if "blocks" in model else 1)
    for found in blocks:
        change = found.pop("change")
        assert rest in found and sum(found.values()) == pytest.approx(change, abs=0.02)
        assert len([name for name in found if name.startswith("latent ")]) == 3
    if model.startswith("rec"):
        assert all(value == 0 for found in blocks for name, value in found.items() if "latent" in name)
        assert "none is amplified" in text
    if len(blocks) == 2:
        first, second = re.search(r"the lead of (\w+) over (\w+)", text).groups()
        logit = dict(re.findall(r"^  (\w+) .*? ([+-][\d.]+)$", text, flags=re.MULTILINE))
        total = sum(found["change"] for found in contributions(text))
        assert total == pytest.approx(float(logit[first]) - float(logit[second]), abs=0.02)


def test_a_closed_gate_is_said_and_nothing_is_attributed(folder, digit, capsys):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)).save("noise.webp")
    assert (
        run(
            "inspect",
            "noise.webp",
            digit(904),
            model=f"vs2:{TINY}@gate=0.9",
        )
        == 0
    )
    noise, digit_text = capsys.readouterr().out.split("904.png")
    assert "is above the gate's threshold" in noise and "(q = 0.9): left alone" in noise
    assert "left alone here, bit for bit" in noise and contributions(noise) == []
    assert "is within the gate's threshold" in digit_text and contributions(digit_text)


def test_methods_with_neighbours_show_them(folder, digit, capsys, tmp_path):
    assert run("inspect", digit(904), "--out", tmp_path / "out", model=f"vs2pp:{TINY}@n=7@labels=oracle") == 0
    text = capsys.readouterr().out
    assert "The 7 nearest training images" in text and "with its training label" in text and "oracle labels" in text
    page = page_of(tmp_path / "out")
    labelled = [one for one in pictures(page) if one["alt"].startswith("training image, ")]
    assert len(labelled) == 7
    assert len(re.findall("S\N{SUPERSCRIPT PLUS SIGN} \\w+|S\N{SUPERSCRIPT MINUS} \\w+", page.text)) == 7
    for model in (f"rag:{TINY}", f"knn:{TINY}", f"clipsteer:{TINY}"):
        assert run("inspect", "904.png", model=model) == 0
        text = capsys.readouterr().out
        assert "steers by no sparse code of its own" in text and "with its zero-shot class" in text


def test_the_page_of_inspect(folder, digit, tmp_path):
    out = tmp_path / "out"
    assert run("inspect", digit(904), digit(905), "--out", out, "--quiet") == 0
    page = page_of(out)
    shown = pictures(page)
    assert all(one["src"].startswith("data:image/") and one["alt"] for one in shown)
    assert len(shown) > 2 + 2 * 8 * 5
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe"}
    assert "904.png" in page.text and "905.png" in page.text and "integrated gradients" in page.text
    assert run("inspect", "904.png", "--out", out, "--quiet") == 0  # over its own page
    (out / "index.html").write_text("mine")
    assert run("inspect", "904.png", "--out", out, "--quiet") == 2
    assert (out / "index.html").read_text() == "mine"


def test_hostile_words_are_only_text(folder, digit, tmp_path, capsys):
    bad = "<img src=x onerror=alert(1)>"
    (tmp_path / "classes.txt").write_text(f"{bad}\n\n  two &amp;  \n\u732b\n", encoding="utf-8")
    shutil.copy(folder / digit(904), tmp_path / "<b>.png")
    files = ["--classes", tmp_path / "classes.txt", "--concepts", tmp_path / "classes.txt"]
    assert run("inspect", tmp_path / "<b>.png", *files, "--out", tmp_path / "one") == 0
    assert run("latents", *files, "--out", tmp_path / "two", "--limit", 4, "--quiet") == 0
    for name in ("one", "two"):
        page = page_of(tmp_path / name)
        assert bad in page.text and "two &amp;" in page.text and "\u732b" in page.text
        assert all("onerror" not in one for one in pictures(page)) and "b" not in {tag for tag, _ in page.elements}


def test_words_that_the_terminal_cannot_write(folder, digit, tmp_path, monkeypatch):
    (tmp_path / "classes.txt").write_text("\u732b\n\u72ac\n", encoding="utf-8")
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    assert run("inspect", digit(904), "--classes", tmp_path / "classes.txt") == 0
    assert b"? over ?" in written.getvalue()


def test_top_images_are_the_training_images_of_those_rows(folder, digit, tmp_path):
    """The pictures on the page are the very pixels of the rows with the largest activations."""
    from sklearn.datasets import load_digits

    checkpoint = Store.default().find(NAME)
    facts = checkpoint.select()[0]
    sae, _ = checkpoint.load(facts)
    activations = checkpoint.open_gallery().activations[BLOCK]
    assert run("latents", "--out", tmp_path, "--limit", 4, "--quiet") == 0
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    card = re.search(r"<article.*?Latent (\d+).*?</article>", text, flags=re.DOTALL)
    code = sae.encode(torch.from_numpy(np.array(activations)).float())
    strength = ((code.indices == int(card[1])) * code.values).amax(1)
    rows = strength.argsort(descending=True, stable=True)[: min(10, int((strength > 0).sum()))].tolist()
    # The order of write_digits: every fourth image to a shard.
    order = [number for shard in range(4) for number in range(900)[shard::4]]
    pixels = (load_digits().images * 255 / 16).round().astype("uint8")
    uris = re.findall(r'src="(data:[^"]*)"', card[0])
    assert len(uris) == len(rows)
    for uri, row in zip(uris, rows, strict=True):
        assert np.array_equal(np.asarray(decoded(uri).convert("L")), pixels[order[row]])


def test_the_table_of_latents(folder, tmp_path, capsys):
    assert run("latents", "--out", tmp_path / "out", "--limit", 12) == 0
    text = capsys.readouterr().out
    with open(tmp_path / "out" / "latents.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    checkpoint = Store.default().find(NAME)
    sae, _ = checkpoint.load(checkpoint.select()[0])
    activations = torch.from_numpy(np.array(checkpoint.open_gallery().activations[BLOCK])).float()
    code = sae.encode(activations)
    counts = np.bincount(code.indices[code.values > 0].numpy(), minlength=len(rows))
    assert [int(row["latent"]) for row in rows] == list(range(sae.config.num_latents))
    assert [int(row["images"]) for row in rows] == counts.tolist()
    dead = [row for row in rows if row["kind"] == "dead"]
    assert f"dead: {len(dead)} " in text and all(row["purity"] == "" for row in dead)
    for row in rows:
        if row["kind"] != "dead":
            assert float(row["frequency"]) == pytest.approx(int(row["images"]) / 900, rel=1e-4)
            assert int(row["top_images"]) == min(10, int(row["images"]))
            assert 0 < float(row["p_purity"]) <= 1 and row["class"] in (
                "zero one two three four five six seven eight nine"
            )
            assert len(row["words"].split("; ")) == 3
    page = page_of(tmp_path / "out")
    for words in ("drawn evenly from the", "Most frequent (densest)", "The purest of many are pure by selection"):
        assert words in page.text
    assert len([tag for tag, _ in page.elements if tag == "article"]) == 12
    assert run("latents", "--out", tmp_path / "out", "--limit", 4, "--quiet") == 0  # over its own files
    (tmp_path / "out" / "latents.csv").write_text("mine")
    assert run("latents", "--out", tmp_path / "out", "--limit", 4) == 2
    assert "vs2 latents did not write it" in capsys.readouterr().err


def test_another_site_has_no_words(folder, tmp_path, capsys):
    assert run("latents", "--out", tmp_path, "--limit", 4, model=f"vs2:{TINY}@blocks=2") == 0
    captured = capsys.readouterr()
    assert "site: block 2" in captured.out and "Nearest words are shown at the tower's end only" in captured.err


def test_where_the_training_images_cannot_be_read_it_is_said(folder, digit, tmp_path, capsys):
    digit(904)
    changed = tmp_path / "digits"
    shutil.copytree("digits", changed)
    model = ["--model", f"vs2:{TINY}", "--pretrained", "", "--dataset", "wds/digits", "--dataset_root", str(changed)]
    shutil.copy(changed / "train/0.tar", changed / "train/1.tar")  # as many images, but not the same
    assert main(["latents", *model, "--limit", "8", "--out", str(tmp_path / "out")]) == 0
    assert "not what the checkpoint's gallery was made from" in capsys.readouterr().err
    assert "not what the checkpoint" in page_of(tmp_path / "out").text
    shutil.rmtree(changed / "train")
    assert main(["inspect", *model, "904.png", "--out", str(tmp_path / "one")]) == 0
    captured = capsys.readouterr()
    assert "Training images of wds/digits are not shown: no readable file" in captured.err
    assert len(pictures(page_of(tmp_path / "one"))) == 1 and "active in" in page_of(tmp_path / "one").text


def test_without_a_gallery(folder, digit, tmp_path, capsys):
    assert run("inspect", digit(904), model=f"vs2:{TINY}@bare") == 0
    captured = capsys.readouterr()
    assert "no gallery" in captured.err and contributions(captured.out)
    assert run("latents", "--out", tmp_path / "out", model=f"vs2:{TINY}@bare") == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "has no gallery of training images; train the checkpoint again" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "words", "model", "fragments"),
    [
        ("inspect", ["nope.png"], "vs2", ["no file 'nope.png'"]),
        ("inspect", ["digits"], "vs2", ["'digits' is no readable image"]),
        ("inspect", ["tiny-clip/open_clip_config.json"], "vs2", ["no readable image (png, jpg, webp)"]),
        ("inspect", ["904.png", "--classes", "nope.txt"], "vs2", ["cannot read --classes 'nope.txt'"]),
        ("inspect", ["904.png", "--concepts", "904.png"], "vs2", ["is no text in UTF-8"]),
        ("inspect", ["904.png", "--dataset_root", "nowhere"], "vs2", ["class names", "--classes FILE"]),
        ("inspect", ["904.png", "--dataset", "wds/other"], "vs2", ["no SAE checkpoint", "vs2-train-sae --model"]),
        ("inspect", ["904.png"], "proto", ["needs the true class"]),
        ("latents", [], "rag", ["steers along no SAE"]),
        ("latents", ["@blocks=all"], "vs2", ["steers at 2 sites", "@blocks=3"]),
    ],
)
def test_mistakes_end_with_one_line(folder, digit, capsys, command, words, model, fragments):
    digit(904)
    options = "".join(word for word in words if word.startswith("@"))
    words = [word for word in words if not word.startswith("@")]
    assert run(command, *words, model=f"{model}:{TINY}{options}") == 2
    [error] = [line for line in capsys.readouterr().err.splitlines() if line]
    assert error.startswith("vs2: error: ") and all(fragment in error for fragment in fragments)


def test_quiet_without_a_page_is_refused(folder, digit, capsys):
    assert run("inspect", digit(904), "--quiet") == 2
    assert "give --out FOLDER, or leave --quiet away" in capsys.readouterr().err


def test_one_image_is_no_images():
    from vs2_plugin.inspection.findings import describe
    from vs2_plugin.inspection.latents import LatentStatistics

    fields = dict(
        images=50, counts=np.array([1]), means=np.array([2.0]), rows=np.array([[7, -1]]),
        values=np.array([[2.0, 0.0]]), classes=np.array([[0, -1]]), class_counts=np.array([50]),
    )  # fmt: skip
    text = describe(LatentStatistics(**fields), 0, ["zero"])
    assert text == "active in 1 of 50 training images (2.0%), mean 2.00; of the top 1, 1 is 'zero' by zero-shot"


def test_a_cut_image_is_one_line(folder, digit, tmp_path, capsys):
    (tmp_path / "cut.png").write_bytes((folder / digit(904)).read_bytes()[:60])
    assert run("inspect", tmp_path / "cut.png") == 2
    assert "is no readable image" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["inspect", "latents"])
def test_help_shows_examples_and_the_formulas(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert "examples:" in text and "cos(e(mu + t w) - e(mu), text - mean text)" in text
