"""The report as a whole: what is in it, hostile names, missing pieces."""

import itertools
import json
import re
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from PIL import Image

from vs2_plugin.errors import DataError
from vs2_plugin.report.drawing import Picture
from vs2_plugin.report.page import write
from vs2_plugin.results.runs import read, sign

VOID = {"meta", "br", "img", "link", "use", "path", "line", "input", "hr"}


class Page(HTMLParser):
    """The elements and the text of a page; fails where an element is not closed."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.words, self._open = [], [], []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split()).replace("\N{NO-BREAK SPACE}", " ")


def report(where, out):
    files = write(read([where])[0], out)
    files.remove(out / "report.json")  # has a test of its own
    return (
        Page((out / "index.html").read_text(encoding="utf-8")),
        (out / "report.md").read_text(encoding="utf-8"),
        files,
    )


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are named and placed, but not drawn, which takes most of the time: for tests that look elsewhere."""
    monkeypatch.setattr(
        "vs2_plugin.report.figures.picture",
        lambda name, title, caption, *plot: Picture(name, title, caption, "<svg></svg>", b"vs2 report"),
    )


@pytest.fixture(scope="module")
def whole(all_results, tmp_path_factory):
    """The report of all results, in a folder that is not written to: page, Markdown, files."""
    return report(all_results, tmp_path_factory.mktemp("report"))


def test_every_part_is_there(whole):
    page, markdown, files = whole
    figures = ["accuracy", "gate", "against-alpha", "against-n", "gamma-lambda-vs2"]
    figures += [f"{kind}-{method}" for kind in ("fvu", "calibration") for method in ("vs2", "pass", "other")]
    assert {path.name for path in files} == {
        "index.html",
        "report.md",
        *(f"wds-animals-{name}.png" for name in figures),
    }
    for words in (
        "600 test images, 6 classes", "interval of the change", "mended", "ECE, points", "peak memory, GB",
        "coverage %", "Training labels used", "Oracles: true labels used", "Coverage and accuracy against q",
        "gamma and lambda: vs2",
        "Accuracy by FVU: vs2", "Calibration: pass", "mostly confused with",
    ):  # fmt: skip
        assert words in page.text, words
    assert "| `pass` alpha 1.05 | **train** |" in markdown and "| `zero-shot` | none |" in markdown
    for name in re.findall(r"!\[.*?\]\((.*?)\)", markdown):
        assert (files[0].parent / name).is_file()
    for path in files[2:]:
        with Image.open(path) as image:
            assert image.format == "PNG" and image.width > 600
            assert np.asarray(image.convert("L")).std() > 5, path.name  # something is drawn
            assert path.stat().st_size < 200_000 and image.info["Software"] == "vs2 report"


def test_numbers_in_the_tables_are_those_of_the_results(whole, all_results):
    _, markdown, _ = whole
    titles, *lines = [line.split(" | ") for line in markdown.splitlines() if line.startswith("| ")]
    row = dict(zip(titles, next(line for line in lines if line[0].startswith("| `vs2` ")), strict=True))
    runs = {run.model: run for run in read([all_results])[0]}
    gained = runs["vs2:B"].number("acc1") - runs["B"].number("acc1")
    assert row["| model"] == "| `vs2` alpha 1.05" and row["change, points"] == f"{100 * gained:+.2f}"
    assert row["top-1 %"] == f"{100 * runs['vs2:B'].number('acc1'):.2f}"
    assert int(row["mended"]) - int(row["broken"]) == round(600 * gained)
    assert row["seconds"] == "1.5" and row["peak memory, GB |"] == "2.00 |"


def test_the_page_needs_nothing_from_outside(whole):
    page, _, files = whole
    assert {tag for tag, _ in page.elements} & {"script", "link", "img", "iframe", "object", "base"} == set()
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            inside = ("#", "data:image/png;base64,")  # the scale of colours is a picture
            assert name not in ("src", "href", "xlink:href") or value.startswith(inside), (tag, value)
            assert "url(" not in (value or "") or "url(#" in value
    assert any("default-src 'none'" in (attributes.get("content") or "") for _, attributes in page.elements)
    text = files[0].read_text(encoding="utf-8")
    references = set(re.findall(r"url\(#(.*?)\)", text)) | set(re.findall(r'href="#(.*?)"', text))
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert references <= set(names)


def test_the_same_results_give_the_same_files_and_matplotlib_is_left_as_it_was(
    write_run, make_images, steered, tmp_path
):
    write_run("B", images=make_images(0.5))
    for gate in (0.9, 0.99):
        path = write_run(f"vs2:B@gate={gate}", images=make_images(gate, 1, sae=True), metrics=steered(gate=gate))
    once = [path.read_bytes() for path in report(path.parent, tmp_path / "one")[2]]
    assert len(once) == 6
    matplotlib.rcParams["lines.linewidth"] = 7.5
    try:
        before = dict(matplotlib.rcParams)
        again = [path.read_bytes() for path in report(path.parent, tmp_path / "two")[2]]
        assert dict(matplotlib.rcParams) == before
    finally:
        matplotlib.rcParams["lines.linewidth"] = 1.5
    assert once == again


HOSTILE = [
    "<script>alert(1)</script>",
    "</td><img src=x onerror=alert(2)>",
    "a|b`c*_[d](e)\n# f",
    "$\\frac{$",
    "\ud800\x00\u202e",
    "&lt;",
]


def test_hostile_names_are_only_text(write_run, make_images, steered, tmp_path):
    bad = HOSTILE[0] + HOSTILE[1] + HOSTILE[2] + HOSTILE[3]
    common = {"dataset": bad, "pretrained": f"'\"{bad}"}
    classes = [name.replace("\0", "") for name in HOSTILE[:4]] + ["\u732b", "&lt;"]
    write_run("B" + bad, images=make_images(0.5, classes=classes), name="1", **common)
    for number, gate in enumerate((0.9, 0.99)):
        facts = steered(f"vs2{HOSTILE[1]}", HOSTILE[1] + HOSTILE[4], gate=gate, checkpoint=bad, alpha=[1])
        images = make_images(0.5 + gate / 10, 1, sae=True, classes=classes)
        path = write_run(f"vs2:B{bad}@sae@gate={gate}", name=f"s{number}", images=images, metrics=facts, **common)
    write_run(f"vs2:B{bad}@alpha=1", name="odd", metrics=steered(HOSTILE[4], alpha={}, gamma=float("nan")), **common)
    write_run("B" + HOSTILE[4], dataset=HOSTILE[4], task=HOSTILE[1], name="4", metrics={HOSTILE[1]: 0.5})
    page, markdown, files = report(path.parent, tmp_path / "out")
    assert {tag for tag, _ in page.elements} & {"script", "img"} == set()
    assert HOSTILE[0] in page.text and HOSTILE[1] in page.text
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+\.png", path.name) for path in files[2:])
    outside_code = re.sub(r"`[^`\n]*`", "", markdown.partition("\n")[2])  # without the comment that marks the file
    assert "<" not in outside_code and "\n# f" not in markdown
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables if "`zero-shot`" in line or "gate=" in line} == {
        len(re.findall(r"(?<!\\)\|", next(line for line in tables if line.startswith("| model"))))
    }


def test_what_is_missing_is_named_with_the_command_that_makes_it(write_run, steered, tmp_path, undrawn):
    path = write_run("vs2:ViT-B-32", metrics=steered(), dataset="my set")
    page, markdown, files = report(path.parent, tmp_path / "out")
    assert "clip_benchmark eval --model ViT-B-32 --pretrained laion --dataset 'my set'" in page.text
    assert "VS2_PER_IMAGE=1 clip_benchmark eval --model vs2:ViT-B-32 --pretrained laion" in page.text
    assert "@gate=0.9 " in page.text
    assert "vs2 sweep --model vs2:ViT-B-32@gamma=1:3:0.25@lam=0:10:1 --pretrained laion --dataset 'my set'" in page.text
    assert [path.name for path in files] == ["index.html", "report.md", "my-set-accuracy.png"]
    assert "| change, points" not in markdown and "| interval of the change" not in markdown
    assert "What steering changed is not known: there is no zero-shot result of ViT-B-32." in page.text


def test_runs_of_other_images_are_said_to_be(write_run, make_images, steered, tmp_path, undrawn):
    write_run("B", images=make_images(0.5))
    path = write_run("vs2:B", images=make_images(0.6, count=500), metrics=steered())
    assert "zero-shot was evaluated on other images" in report(path.parent, tmp_path / "out")[0].text


def test_a_steered_run_alone_gives_the_numbers_and_figures_of_both(write_run, make_images, steered, tmp_path):
    zero = write_run("B", images=make_images(0.5, 1))
    path = write_run("vs2:B", images=make_images(0.6, 2, sae=True, before=0.5), metrics=steered())
    both = report(path.parent, tmp_path / "both")
    zero.unlink()
    alone = report(path.parent, tmp_path / "alone")
    assert [path.name for path in alone[2]] == [path.name for path in both[2]]
    for one, other in zip(alone[2][2:], both[2][2:], strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name  # the reliability diagram among them
    steered_lines = [[line for line in markdown.splitlines() if "`vs2`" in line] for _, markdown, _ in (alone, both)]
    assert steered_lines[0] == steered_lines[1] and "| `zero-shot` | none |" in alone[1]
    assert "what is shown of it was recorded in a steered run" in alone[0].text
    assert "recorded in a steered run" not in both[0].text
    rows = [json.loads((tmp_path / name / "report.json").read_text())["rows"] for name in ("both", "alone")]
    assert rows[0][1] == rows[1][1] and rows[1][0]["model"] == "B" and rows[1][1]["ece_before"] == rows[1][0]["ece"]


def test_other_tasks_and_metrics_come_as_they_are(write_run, steered, tmp_path, undrawn):
    metrics = {"image_retrieval_recall@5": 0.25, "text_retrieval_recall@5": 0.5}
    path = write_run("B", dataset="flickr8k", task="zeroshot_retrieval", metrics=metrics, name="1")
    probe = {"lp_acc1": 0.75, "fewshot_k": 16, **steered(labels="train")}
    write_run("vs2:B", dataset="flickr8k", task="linear_probe", metrics=probe, name="2")
    write_run("B", dataset="voc", metrics={"mean_average_precision": 0.5, "acc1": None}, name="3")
    page, markdown, files = report(path.parent, tmp_path / "out")
    assert [path.name for path in files] == ["index.html", "report.md"]
    assert "image_retrieval_recall@5" in page.text and "0.2500" in page.text and "0.7500" in page.text
    assert "mean_average_precision" in page.text and "vs2_coverage" not in page.text and "training labels" in page.text
    assert "image\\_retrieval\\_recall@5" in markdown


def test_class_that_gains_shows_the_confusion_that_was_mended(write_run, make_images, steered, tmp_path, undrawn):
    before, after = make_images(0.5), make_images(0.5)
    foxes = np.flatnonzero(before["target"] == 2)
    before["prediction"][foxes] = 1
    after["prediction"][foxes] = np.where(np.arange(len(foxes)) % 2, 2, 1)
    write_run("B", images=before)
    path = write_run("vs2:B", images=after, metrics=steered())
    page, markdown, _ = report(path.parent, tmp_path / "out")
    half = len(foxes) // 2
    points = f"{100 * half / len(foxes):.1f}"
    assert f"| fox | +{points} | was dog ({half} of {half}) | 0.0 | {points} | {len(foxes)} |" in markdown
    assert f"fox +{points} was dog ({half} of {half}) 0.0 {points} {len(foxes)}" in page.text


def test_images_that_steering_changed_are_named_by_their_files(write_run, make_images, steered, tmp_path, undrawn):
    arrays = make_images(0.6, sae=True, before=0.5)
    names = [f"a<b>/{number}.png" for number in range(600)]
    arrays |= {
        "paths": np.frombuffer("".join(names).encode(), np.uint8), "path_ends": np.cumsum([len(name) for name in names])
    }
    path = write_run("vs2:B", images=arrays, metrics=steered())
    page, _, _ = report(path.parent, tmp_path / "out")
    assert re.search(r"Images that steering mended, most confident first.* a<b>/\d+.png : \w+ became \w+ ", page.text)


def test_classes_without_names_have_numbers(write_run, make_images, steered, tmp_path, undrawn):
    unknown = {"classes": np.array([], np.str_), "peak_memory": np.int64(0)}
    write_run("B", images=make_images(0.5) | unknown)
    path = write_run("vs2:B", images=make_images(0.7, 1) | unknown, metrics=steered())
    page, _, _ = report(path.parent, tmp_path / "out")
    assert "600 test images." in page.text and "was class " in page.text and "peak memory" not in page.text


def test_a_folder_with_other_files_is_written_to_but_nothing_of_others_overwritten(write_run, tmp_path, undrawn):
    path, out = write_run("B"), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    report(path.parent, out)
    report(path.parent, out)  # its own files are replaced
    (out / "wds-animals-accuracy.png").write_bytes(b"mine")
    (out / "index.html").unlink()
    with pytest.raises(DataError, match=r"accuracy.png already exists, and vs2 report did not write it; .* --out"):
        report(path.parent, out)
    assert not (out / "index.html").exists()
    assert (out / "notes.txt").read_text() == "mine" and (out / "wds-animals-accuracy.png").read_bytes() == b"mine"
    with pytest.raises(DataError, match="cannot write into"):
        write(read([path])[0], path)


def test_two_data_sets_whose_names_differ_in_signs_only(write_run, tmp_path, undrawn):
    write_run("B", name="1", dataset="a/b")
    path = write_run("B", name="2", dataset="a:b")
    page, _, files = report(path.parent, tmp_path / "out")
    assert [path.name for path in files[2:]] == ["a-b-accuracy.png", "a-b-accuracy-1.png"]
    assert ("a", {"href": "#data-2"}) in page.elements


def test_the_numbers_come_as_json_too(whole):
    rows = json.loads(whole[2][0].with_name("report.json").read_text())["rows"]
    plain, steered = rows[0], next(row for row in rows if row["model"].startswith("vs2:"))
    assert "change" not in plain and plain["interval"][0] < plain["acc1"] < plain["interval"][1]
    assert steered["change"] == pytest.approx(steered["acc1"] - plain["acc1"])
    assert (steered["mended"] - steered["broken"]) / 600 == pytest.approx(steered["change"])
    assert 0 <= steered["ece"] <= 1 and steered["seconds"] > 0


def test_large_results_stay_small_on_the_page(write_run, make_images, steered, tmp_path):
    classes = [f"class {number}" for number in range(200)]
    write_run("B", images=make_images(0.5, count=5000, classes=classes))
    for number in range(4):
        images = make_images(0.5 + number / 50, number, count=5000, classes=classes, sae=True)
        path = write_run(f"vs2:B@alpha={number}", images=images, metrics=steered(alpha=float(number)))
    page, _, _ = report(path.parent, tmp_path / "out")
    assert len((tmp_path / "out" / "index.html").read_bytes()) < 2_000_000
    assert page.text.count("mostly confused with") == 3 and "No class changed its accuracy." in page.text


def test_results_that_were_changed_are_named(results, tmp_path, undrawn):
    for path in results.iterdir():
        sign(path) if "@gamma=" in path.name else path.unlink()
    page, markdown, _ = report(results, tmp_path / "as-written")
    assert "Changed" not in page.text and "Changed" not in markdown
    path = results / "vs2:B@gamma=2@lam=2.json"
    path.write_text(path.read_text().replace('"acc1": 0.58', '"acc1": 0.88'))
    page, markdown, _ = report(results, tmp_path / "changed")
    told = f"Changed after they were written, according to the digest in them: {path}."
    assert told in page.text and markdown.count("Changed after they were written") == 1
    found = json.loads((tmp_path / "changed/report.json").read_text())
    assert found["notes"] == [told]
    assert [row["model"] for row in found["rows"] if row.get("changed")] == ["vs2:B@gamma=2@lam=2"]


def test_an_sae_of_no_use_is_told(write_run, steered, tmp_path, undrawn):
    write_run("vs2:B", metrics=steered(sae_warning="block 3: its FVU is 1.2"))
    page, markdown, _ = report(tmp_path / "results", tmp_path / "out")
    assert "The SAE of vs2:B is useless: block 3: its FVU is 1.2." in page.text
    assert "useless: block 3" in markdown


ABSURD = {
    "too large": [10**400, -(10**400), 1e308, -1e308],
    "no numbers": [float("nan"), float("inf"), True, None],
    "of other types": ["text", [], {"a": 1}, 1e-308],
}


@pytest.mark.parametrize("values", ABSURD.values(), ids=ABSURD)
def test_absurd_values_of_metrics_do_not_end_the_report(values, write_run, steered, make_images, tmp_path):
    names = ["acc5", "mean_per_class_recall", "vs2_coverage", "vs2_gamma", "vs2_lam", "vs2_alpha", "vs2_gate"]
    names += ["vs2_ece", "vs2_seconds", "vs2_peak_memory", "vs2_mended", "vs2_broken", "vs2_ece_bins", "vs2_labels"]
    names += ["vs2_n", "vs2_results_digest", "vs2_sae_warning", "vs2_site", "vs2_latents", "vs2_checkpoint"]
    names += ["vs2_k", "vs2_expansion", "vs2_seed", "vs2_pass_weight"]
    write_run("B", metrics={"acc5": values[0]}, images=make_images(0.5))
    for number, (name, value) in enumerate(itertools.product(names, values)):
        metrics = {**steered(gamma=number, lam=1, alpha=number), name: value}
        write_run(f"vs2:B@gamma={number}", metrics=metrics, images=make_images(0.6) if number % 2 else None)
    report(tmp_path / "results", tmp_path / "out")
    json.loads((tmp_path / "out/report.json").read_text())
