"""README and the chapters: parsers accept their commands, their code runs, their links lead somewhere."""

import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import vs2_plugin
from vs2_plugin.cli import train_sae
from vs2_plugin.cli.main import parser
from vs2_plugin.data.evaluated import look
from vs2_plugin.data.images import open_images
from vs2_plugin.data.naming import DataSet
from vs2_plugin.demo.run import EVALUATED, SYSTEMS
from vs2_plugin.errors import CheckpointNotFound
from vs2_plugin.modelstring import is_steered, parse
from vs2_plugin.plugins import registry
from vs2_plugin.sweep.grid import read_grids

REPOSITORY = Path(__file__).parents[1]
CHAPTERS = sorted((REPOSITORY / "vs2_plugin/docs").glob("*.md"))
PAGES = [
    REPOSITORY / "README.md",
    *CHAPTERS,
    *sorted((REPOSITORY / "benchmark_configs").rglob("README.md")),
    REPOSITORY / "CONTRIBUTING.md",
]
README = PAGES[0].read_text(encoding="utf-8")
#: What stands in a page's place of the example plugin's method.
EXAMPLE = "away:ViT-B-32@strength=0.5"


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of that language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The words of each command in the page's shell blocks, and in its indented code."""
    text = page.read_text(encoding="utf-8")
    shell = "".join(blocks(page, "sh")) + "\n".join(
        line[4:] for line in re.sub(r"^```.*?^```", "", text, flags=re.M | re.S).splitlines() if line.startswith("    ")
    )
    lines = [shlex.split(line, comments=True) for line in shell.replace("\\\n", " ").splitlines()]
    # Settings of the environment stand before a command.
    return [line[next((i for i, word in enumerate(line) if "=" not in word), 0) :] for line in lines if line]


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    """Know the methods of the chapter on plugins, whose commands use them."""
    for code in blocks(REPOSITORY / "vs2_plugin/docs/plugins.md", "python"):
        if "def vs2_methods" in code:
            names = {"__name__": "example"}
            exec(compile(code, "plugins.md", "exec"), names)
            for method in names["vs2_methods"]():
                monkeypatch.setitem(registry().methods, method.name, method)


COMMANDS = [(page, words) for page in PAGES for words in commands(page)]
OURS = [(page, words) for page, words in COMMANDS if words[0] in ("vs2", "vs2-train-sae", "clip_benchmark", "torchrun")]


def ids(value):
    return value.stem if isinstance(value, Path) else " ".join(value)[:60]


def accept(words: list[str], monkeypatch) -> list[str]:
    """Give a command to its parser; return its model strings."""
    if words[0] == "torchrun":
        words = words[words.index("vs2-train-sae") :]
    if words[0] == "vs2-train-sae":
        train_sae.parser().parse_args(words[1:])
        return []
    if words[0] == "vs2":
        args = parser().parse_args(words[1:])
        return getattr(args, "model", None) or []
    from clip_benchmark.cli import get_parser_args

    monkeypatch.setattr(sys, "argv", words)
    _, args = get_parser_args()
    pairs = [pair.partition(",")[0] for pair in getattr(args, "pretrained_model", None) or []]
    models = pairs or getattr(args, "model", [])
    return [f"{args.model_type}:{model}" for model in models] if getattr(args, "model_type", "") == "vs2" else models


@pytest.mark.parametrize(("page", "words"), OURS, ids=ids)
def test_commands_are_accepted(page, words, monkeypatch, capsys):
    try:
        models = accept(words, monkeypatch)
    except SystemExit as stop:
        assert stop.code == 0, f"{page.name}: {shlex.join(words)}: {capsys.readouterr().err}"
        return  # --help
    models = [models] if isinstance(models, str) else models
    steered = [model for model in models if is_steered(model)]
    if words[:2] == ["vs2", "sweep"]:
        assert read_grids(steered)
    else:
        for model in steered:
            assert parse(model)


def test_the_pages_hold_commands_of_all_kinds():
    kinds = {tuple(words[:2]) if words[0] == "vs2" else (words[0],) for _, words in OURS}
    assert kinds >= {("vs2-train-sae",), ("clip_benchmark",), ("torchrun",)}
    assert kinds >= {("vs2", name) for name in ("demo", "sweep", "report", "reproduce", "inspect", "latents", "store")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_model_strings_are_read(page):
    """Those that stand in the text, in code."""
    code = re.findall(r"`([a-z0-9+]+:[^`\s]+)`", page.read_text(encoding="utf-8"))
    for text in code:
        if is_steered(text) and not re.search(r"[…{]", text):
            assert parse(text).method.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_local_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in [*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r'src="([^"]+)"', text)]:
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings], target


def test_every_chapter_is_linked_from_the_readme():
    assert len(README.splitlines()) <= 150
    assert {path.name for path in CHAPTERS} == set(re.findall(r"vs2_plugin/docs/(\w+\.md)\): ", README))


def test_what_holds_a_fault_is_there():
    rows = re.findall(r"^\| .*\|$", (REPOSITORY / "vs2_plugin/docs/trust.md").read_text(encoding="utf-8"), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([a-z_/]+)`", row.rpartition(" | ")[2])}
    assert len(named) > 20
    assert {name for name in named if not (Path(__file__).parent / f"{name}.py").is_file()} == set()


def test_the_two_commands_are_there():
    """.ci/run finds them so."""
    assert len(re.findall(r"^python3 -m venv \.venv && ", README, re.MULTILINE)) == 2


def test_the_tables_of_the_demo_are_of_its_rows():
    """The chapter has all of them, in their order, and the README some with the same figures."""
    chapter = (REPOSITORY / "vs2_plugin/docs/demo.md").read_text(encoding="utf-8")
    rows = {cells[1].strip(): cells for line in chapter.splitlines() if len(cells := line.split("|")) == 8}
    assert [name for name in rows if name in SYSTEMS] == list(SYSTEMS)
    told = [cells for line in README.splitlines() if len(cells := line.split("|")) == 5 and cells[1].strip() in SYSTEMS]
    assert len(told) >= 5
    for _, name, top1, change, _ in told:
        assert (top1, change) == (rows[name.strip()][2], rows[name.strip()][5])
    assert set(EVALUATED) < set(SYSTEMS)


# ---- code


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_python_blocks_are_python(page):
    for code in blocks(page, "python"):
        compile(code, page.name, "exec")


def test_the_python_of_the_readme_runs(workplace, tmp_path, monkeypatch):
    """As it stands there, but for the model: the tiny CLIP with a checkpoint of a few digits."""
    (code,) = blocks(PAGES[0], "python")
    shutil.copytree(workplace, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    data = ("--dataset", "wds/digits", "--dataset_root", "digits", "--num_workers", "0", "--no_amp", "--quiet")
    few = ("--samples", "500", "--max_images", "48")
    assert train_sae.main(["--model", "local-dir:tiny-clip", *data, *few]) == 0
    for old, new in (("ViT-B-32", "local-dir:tiny-clip"), ("laion2b_s34b_b79k", ""), ("cifar100", "wds/digits")):
        assert old in code
        code = code.replace(old, new)
    names = {"image": Image.new("RGB", (8, 8))}
    with torch.no_grad():
        exec(compile(code, "README.md", "exec"), names)
    assert names["features"].shape == (1, 64) and names["model"].vs2_facts()["vs2_method"] == "vs2"
    with pytest.raises(CheckpointNotFound):
        vs2_plugin.load("vs2:local-dir:tiny-clip", dataset="wds/other")[0]


def test_the_python_of_the_chapter_on_images_writes_shards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        for name, grey in (("cat", 10), ("dog", 200)):
            (tmp_path / "pictures" / split / name).mkdir(parents=True)
            for number in range(3):
                Image.new("L", (8, 8), grey).save(tmp_path / "pictures" / split / name / f"{number}.PNG")
            (tmp_path / "pictures" / split / name / "notes.txt").touch()
    (code,) = blocks(REPOSITORY / "vs2_plugin/docs/images.md", "python")
    exec(compile(code, "images.md", "exec"), {})
    assert look("mine", "test") == look("mine", "train") == [2, 2, 1, 1]
    grey = lambda image: torch.tensor(image.getpixel((0, 0))[0])  # noqa: E731
    (batch,) = open_images(DataSet.of("wds/mine", "mine"), "train", grey, labels=True).batches(6, 0)
    assert dict(zip(batch.images.tolist(), batch.labels.tolist())) == {10: 0, 200: 1}


def test_the_plugin_of_its_chapter_runs(make_sae):
    """tests/harness/test_autoload.py installs it as a package and evaluates with it."""
    page = REPOSITORY / "vs2_plugin/docs/plugins.md"
    (code, checking, along, reading), (toml,) = blocks(page, "python"), blocks(page, "toml")
    names = {}
    exec(compile(code, "plugins.md", "exec"), names)
    assert toml == '[project.entry-points.vs2_plugin]\naway = "vs2_away"\n'
    assert code.startswith("# vs2_away.py\n")
    (method,) = names["vs2_methods"]()
    steer = method.build(SimpleNamespace(mean=torch.ones(3)), 0.5)
    assert torch.equal(steer(torch.full((2, 3), 3.0)), torch.full((2, 3), 4.0))
    exec(compile(checking, "plugins.md", "exec"), names)
    names["test_away"]()
    exec(compile(along, "plugins.md", "exec"), names)
    sae, x = make_sae(), torch.randn(2, 32)
    steer = names["build_along"](SimpleNamespace(sae=sae), 0.5)
    torch.testing.assert_close(steer(x, vs2_plugin.Batch()).apply(x), x + 0.5 * sae.combine(sae.encode(x)))
    exec(compile(reading, "plugins.md", "exec"), names)
    classes = torch.nn.functional.normalize(torch.randn(8, 5), dim=0)
    for of_logits, protocol in zip(names["methods"], ("unlabeled", "stream", "image"), strict=True):
        assert of_logits.site == "logits" and of_logits.protocol == protocol
        x = torch.nn.functional.normalize(torch.randn(1, *([6] * of_logits.views), 8), dim=-1)
        context = SimpleNamespace(classifier=classes, unlabeled=torch.randn(20, 8))
        assert of_logits.build(context, **{one.name: one.default for one in of_logits.options})(x).shape == (1, 5)
    assert EXAMPLE in page.read_text(encoding="utf-8") and parse(EXAMPLE).options["strength"] == 0.5
