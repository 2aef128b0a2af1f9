"""Folders of images, as a person types them: trained on, evaluated by the stock command, swept and inspected."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

import vs2_plugin
from vs2_plugin.checkpoint.store import Store
from vs2_plugin.cli import main, train_sae
from vs2_plugin.data.images import image_digest
from vs2_plugin.demo.digits import write_digits
from vs2_plugin.errors import CheckpointError
from vs2_plugin.results.images import Images

from ..reproduce.conftest import harness_here
from .conftest import TINY, at

EVALUATE = ("--pretrained", "", "--num_workers", "0", "--quiet", "--no_amp")
TRAIN = ("--model", TINY, "--no_amp", "--samples", "400", "--k", "8", "--num_workers", "0", "--quiet")
NAME = "local-dir-tiny-clip_folder-photos"


def draw(folder):
    """48 digits of three classes in two splits, one of them damaged in the training images."""
    digits = load_digits()
    for number, label in [pair for pair in enumerate(digits.target) if pair[1] < 3][:48]:
        split = "train" if number % 2 else "test"
        file = folder / split / ("zero", "one", "two")[label] / f"{number:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[number] * 15.9).astype(np.uint8)).resize((32, 32)).save(file)
    broken = sorted((folder / "train" / "one").iterdir())[1]
    broken.write_bytes(broken.read_bytes()[:50])
    (folder / "train" / "notes.txt").touch()


@pytest.fixture(scope="module")
def trained(once, prepare):
    """A folder with photos, another of the same name, and the SAE of the first."""

    def fill(folder):
        prepare(folder)
        draw(folder / "photos")
        shutil.copytree(folder / "photos", folder / "other" / "photos")
        with pytest.MonkeyPatch.context() as patch:
            at(folder, patch)
            assert train_sae.main([*TRAIN, "--dataset", "photos/"]) == 0

    return once("folders", fill)


@pytest.fixture
def here(trained, tmp_path, monkeypatch):
    """Work where the photos are. The checkpoint tells where they were trained on: it is told that they are here."""
    shutil.copytree(trained, tmp_path / "here")
    at(tmp_path / "here", monkeypatch)
    manifest = Path("store/checkpoints", NAME, "vs2.json")
    values = json.loads(manifest.read_text())
    values["data"]["folders"] = [str(tmp_path / "here/photos/train")]
    del values["digest"]
    manifest.write_text(json.dumps(values))
    return tmp_path / "here"


def test_three_ways_to_name_a_folder_give_the_same_results(here, clip_benchmark, monkeypatch):
    monkeypatch.setenv("VS2_PER_IMAGE", "1")
    found = []
    named = (["photos/"], ["folder", "--dataset_root", "photos"], ["folder/photos", "--dataset_root", "./photos"])
    for words in named:
        code, error = clip_benchmark("eval", "--model", TINY, f"vs2:{TINY}", *EVALUATE, "--dataset", *words)
        assert code == 0, error
        assert "images of 3 classes in " in error
        found.append([json.loads(path.read_text()) for path in sorted(here.glob("*.json"))])
        assert {path.name.partition("__")[0] for path in here.glob("*.json")} == {"folder_photos"}
    plain, steered = found[0]
    assert plain["dataset"] == steered["dataset"] == "folder/photos" and plain["metrics"]["acc1"] > 0
    assert steered["metrics"]["vs2_transductive"] is False and steered["metrics"]["vs2_checkpoint"] == NAME
    for others in found[1:]:
        assert [other["metrics"]["acc1"] for other in others] == [one["metrics"]["acc1"] for one in (plain, steered)]
    (path, *_) = here.glob("*.images.npz")
    images = Images.read(path)
    assert list(images.paths) == sorted(str(file.relative_to("photos")) for file in Path("photos/test").rglob("*.png"))
    _, transform, _ = vs2_plugin.load(f"vs2:{TINY}", dataset="photos/")
    for row in range(0, len(images.paths), 5):
        with Image.open(Path("photos", images.paths[row])) as picture:
            assert image_digest(transform(picture.convert("RGB"))) == images.digest[row]
            assert images.paths[row].split("/")[1] == images.classes[images.target[row]]


def test_the_images_that_were_trained_on_are_marked_where_they_are_evaluated(here, clip_benchmark):
    for split, marked in (("test", False), ("train", True)):
        if marked:  # which an evaluation refuses where one cannot be read
            Path("photos/train/one", sorted(path.name for path in Path("photos/train/one").iterdir())[1]).unlink()
        words = ("--dataset", "photos/", "--split", split, "--output", "x.json")
        code, error = clip_benchmark("eval", "--model", f"vs2:{TINY}", *EVALUATE, *words)
        assert code == 0, error
        assert json.loads(Path("x.json").read_text())["metrics"]["vs2_transductive"] is marked
        words = (*words[:-1], f"{split}/{{model}}.json")
        assert main.main(["sweep", "--model", f"vs2:{TINY}", *EVALUATE, *words]) == 0
        assert json.loads(Path(split, f"vs2:{TINY}.json").read_text())["metrics"]["vs2_transductive"] is marked


def test_an_image_that_cannot_be_read_is_left_out_of_training_and_ends_an_evaluation(here, clip_benchmark):
    checkpoint = Store.default().find(NAME)
    (broken,) = checkpoint.gallery.parts[0].left_out
    assert checkpoint.data.images == len(list(Path("photos/train").rglob("*.png"))) - 1
    assert broken.startswith("train/one/")
    code, error = clip_benchmark("eval", "--model", TINY, *EVALUATE, "--dataset", "photos/", "--split", "train")
    assert code == 2 and error.splitlines()[-1].startswith(f"vs2: error: 'photos/{broken}' is not a readable image")
    assert error.endswith("; replace it, or remove it from the folder: no image is skipped here\n")


def test_an_image_that_was_left_out_is_named_again_where_activations_are_cached(here, capsys):
    (broken,) = Store.default().find(NAME).gallery.parts[0].left_out
    words = [word for word in TRAIN if word != "--quiet"]
    for name in ("first", "again"):
        assert train_sae.main([*words, "--dataset", "photos/", "--name", name]) == 0
        said = capsys.readouterr().out
        cached = name == "again"
        assert ("cached, in" in said) is (f"left out, not a readable image: {broken}\n" in said) is cached


def test_the_sae_of_another_folder_of_the_same_name_is_refused_with_both_ways_out(here, clip_benchmark, capsys):
    words = ("--dataset", "other/photos/", "--output", "x.json")
    code, error = clip_benchmark("eval", "--model", f"vs2:{TINY}", *EVALUATE, *words)
    same = f"was trained on {here}/photos/train, not on {here}/other/photos, which has the same name"
    assert code == 2 and same in error
    assert f"vs2:{TINY}@{NAME}, or train one on this folder with --name {NAME}-2" in error
    code, error = clip_benchmark("eval", "--model", f"vs2:{TINY}@{NAME}", *EVALUATE, *words)
    assert code == 0, error
    with pytest.raises(CheckpointError, match="which has the same name"):
        vs2_plugin.load(f"vs2:{TINY}", dataset=here / "other/photos")
    assert train_sae.main([*TRAIN, "--dataset", "other/photos/"]) == 2
    assert f"on {here}/photos/train and not on {here}/other/photos; keep both with: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [(["phtos/"], "'phtos/' is not a folder"), (["photos"], "the folder of that name is --dataset photos/"),
     (["photos/test/one/"], "images without folders of classes"),
     (["photos/", "--split", "extra"], "no folder for the split 'extra', only test/, train/"),
     (["photos/", "--task", "zeroshot_retrieval"], "nothing for the task zeroshot_retrieval"),
     (["photos/test/", "--task", "linear_probe"], "a linear probe would be trained on the images"),
     (["photos/", "photos/test/", "--output", "x.json"], f"{TINY} on folder/photos and of {TINY} on folder/test into"),
     (["photos/test/zero/000.png"], "is an image; expected the folder")],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_mistakes_are_named_before_anything_is_loaded(words, said, here, clip_benchmark):
    stock = words == ["photos"] or "linear_probe" in words  # of a steered model, something else is wrong too
    models = [TINY] if stock else [TINY, f"vs2:{TINY}@nope"]  # what is missing is named after that
    code, error = clip_benchmark("eval", "--model", *models, *EVALUATE, "--dataset", *words)
    assert code == 2 and said in error and "Traceback" not in error
    assert not list(here.glob("*.json"))


def test_what_is_missing_is_told_with_the_command_that_makes_it_of_the_folder(here, clip_benchmark):
    code, error = clip_benchmark("eval", "--model", f"vs2:{TINY}", *EVALUATE, "--dataset", "./photos/test")
    assert code == 2 and f"on folder/test in the store store; train it with: vs2-train-sae --model {TINY} --dataset "
    assert "--dataset ./photos/test/ --no_amp" in error


def test_two_folders_of_one_name_do_not_share_a_results_file(here, clip_benchmark):
    code, error = clip_benchmark("eval", "--model", TINY, *EVALUATE, "--dataset", "photos/", "other/photos/")
    assert code == 2 and "one file, 'folder_photos_" in error


def test_a_sweep_and_an_inspection_read_the_folder_and_name_its_files(here, capsys):
    assert main.main(["sweep", "--model", f"vs2:{TINY}@alpha=0:1:1", *EVALUATE, "--dataset", "photos/"]) == 0
    assert json.loads(next(Path("sweep").glob("vs2*alpha=0*.json")).read_text())["dataset"] == "folder/photos"
    image = min(Path("photos/train/two").iterdir())  # which activates its own latents, if none else does
    words = ("--model", f"vs2:{TINY}", "--pretrained", "", "--dataset", "photos/", "--quiet")
    assert main.main(["inspect", str(image), *words, "--out", "page"]) == 0, capsys.readouterr().err
    page = "".join(path.read_text() for path in Path("page").rglob("*.html"))
    assert f'title="train/two/{image.name}' in page and "are not shown" not in page
    assert main.main(["latents", *words, "--out", "latents"]) == 0
    page = "".join(path.read_text() for path in Path("latents").rglob("*.html"))
    named = set(re.findall(r'title="(train/\w+/[^"]+)"', page))
    assert named and all(Path("photos", name).is_file() for name in named) and "are not shown" not in page


def test_an_image_that_is_damaged_after_the_training_is_not_shown(here, capsys):
    for file in sorted(Path("photos/train").glob("*/*.png"))[-3:]:
        file.write_bytes(file.read_bytes()[:50])
    words = ["--model", f"vs2:{TINY}", "--pretrained", "", "--dataset", "photos/", "--limit", "8", "--out", "page"]
    assert main.main(["latents", *words]) == 0
    said = capsys.readouterr().err
    assert "Some training images of folder/photos are not shown: what --dataset_root holds now is not" in said
    assert "data:image/" in Path("page/index.html").read_text()


TABLE = """\
title: Mine
dataset: EVALUATED
train_on: [TRAINED]
backbone: "local-dir:tiny-clip,"
prompts: "a photo of a {c}"
seeds: [0]
sae: {samples: 400, k: 8}
columns: {accuracy: {}}
rows:
  VS2: {model: "vs2:{backbone}"}
"""


@pytest.mark.parametrize("dataset", ["photos/", "shards/{}-{{0..1}}.tar"])
def test_a_table_of_ones_own_is_of_images_of_ones_own(dataset, here, capsys):
    if dataset != "photos/":
        write_digits(Path("whole"))
        for split in ("train", "test"):
            for number in (0, 1):
                Path("shards").mkdir(exist_ok=True)
                shutil.copy(f"whole/{split}/{number}.tar", f"shards/{split}-{number}.tar")
        for name in ("classnames.txt", "zeroshot_classification_templates.txt"):
            shutil.copy(f"whole/{name}", "shards")
    text = TABLE.replace("TRAINED", json.dumps(dataset.format("train")))
    Path("mine.yaml").write_text(text.replace("EVALUATED", json.dumps(dataset.format("test"))))
    with harness_here():
        assert main.main(["reproduce", "mine.yaml", "--out", "out", "--quiet"]) == 0, capsys.readouterr()
    [cell] = json.loads(Path("out/mine.json").read_text())["cells"]
    assert 20 < cell["measured"] <= 100
    capsys.readouterr()
    with harness_here():
        assert main.main(["reproduce", "mine.yaml", "--out", "out", "--dry_run"]) == 0
    assert "clip_benchmark" not in capsys.readouterr().out  # nothing is left to be run
