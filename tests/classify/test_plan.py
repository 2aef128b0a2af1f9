"""What a classification names is read and checked before anything is loaded."""

from pathlib import Path

import pytest

from vs2_plugin.classify.plan import make_plan
from vs2_plugin.classify.request import ClassifyRequest
from vs2_plugin.errors import CheckpointNotFound, DataError, ModelStringError, SettingError, TowerError

from .conftest import CLASSES, COUNT, TINY, write_photos


@pytest.fixture
def plan(here, tmp_path):
    def plan(*photos, **settings):
        given = {"model": f"vs2:{TINY}", "out": str(tmp_path / "new" / "x.csv"), **settings}
        return make_plan(ClassifyRequest(photos=photos or ("photos",), **given))

    return plan


def test_folders_name_the_classes_and_the_checkpoint(plan, tmp_path):
    found = plan()
    assert found.classes == tuple(CLASSES) and found.prompts == ("a photo of a {c}.",)
    assert len(found.images) == COUNT and found.images.paths[0].startswith("photos/eight/")
    assert found.training is None and found.checkpoint.name == "local-dir-tiny-clip_folder-photos"
    assert (tmp_path / "new").is_dir() and plan(model=f"vs2:{TINY}@{found.checkpoint.name}").checkpoint is not None


def test_classes_and_prompts_are_named(plan, tmp_path):
    file, prompts = tmp_path / "classes.txt", tmp_path / "prompts.txt"
    file.write_text("\ufeffcat\n\n dog \n", encoding="utf-8")
    prompts.write_text("a {} sketch\n{c}\n")
    found = plan(classes=str(file), prompts=str(prompts))
    assert found.classes == ("cat", "dog") and found.prompts == ("a {c} sketch", "{c}")
    assert plan(classes=" cat, dog house,").classes == ("cat", "dog house")
    file.write_text("001.cat\ta cat\ndog_house\t kennel \n")  # as in a folder's classnames.txt
    assert plan(classes=str(file)).classes == ("a cat", "kennel")
    assert plan("photos/nine", classes="photos").classes == tuple(CLASSES)
    write_photos(tmp_path / "own", 6)
    (tmp_path / "own/zeroshot_classification_templates.txt").write_text("the number {c}")
    assert plan(str(tmp_path / "own"), model=f"knn:{TINY}@local-dir-tiny-clip_folder-photos").prompts == (
        "the number {c}",
    )


def test_where_there_is_no_sae_one_is_to_be_trained(plan, tmp_path):
    write_photos(tmp_path / "more", 6)
    write_photos(tmp_path / "photos", 24)  # another folder of the same name
    found = plan(train_images=(str(tmp_path / "more"), "photos"), model=f"vs2s:{TINY}@blocks=2+3", seed=3)
    assert found.checkpoint is None
    request = found.training
    assert request.name == "local-dir-tiny-clip_folder-more-folder-photos".replace("more-", "more+")
    assert request.blocks == ("2", "3") and request.seed == (3,) and request.model == TINY
    assert request.dataset == (f"{tmp_path}/more/", "photos/")
    other = plan(str(tmp_path / "photos"))
    assert other.training.name.startswith("local-dir-tiny-clip_folder-photos-")


def test_of_many_folders_the_checkpoint_has_a_shorter_name(plan, tmp_path):
    folders = [str(tmp_path / f"the pictures of day {number}") for number in range(12)]
    for folder in folders:
        write_photos(tmp_path / folder, 4)
    name, other = (plan(*some, classes="a,b").training.name for some in (folders, folders[::-1]))
    assert len(name) == len(other) == 200 and name[-8:] != other[-8:]


@pytest.mark.parametrize(
    ("photos", "settings", "error", "problem"),
    [
        (["nope"], {"classes": "a,b"}, DataError, "nope: No such file"),
        (["nope"], {}, SettingError, "nope holds no folders of classes, so the classes have to be named"),
        (["empty"], {"classes": "a,b"}, DataError, "no images"),
        (["photos/nine"], {}, SettingError, "--classes cat,dog or --classes FILE"),
        (["one"], {}, SettingError, "one holds one folder of images, 'nine'"),
        ([], {"classes": "nope.txt"}, SettingError, "--classes 'nope.txt': there is no such file"),
        ([], {"classes": "cat,"}, SettingError, "--classes: 'cat' alone; expected at least two"),
        ([], {"classes": "cat,dog,cat"}, SettingError, "--classes: 'cat' is given twice"),
        ([], {"prompts": "nope.txt"}, SettingError, "--prompts 'nope.txt' cannot be read"),
        ([], {"prompts": "words.txt"}, SettingError, "prompt 'no place': expected one {c}"),
        ([], {"classes": "mixed.txt"}, SettingError, "--classes 'mixed.txt': 'b' has no tab; expected FOLDER<tab>NAME"),
        ([], {"classes": "photos/nine"}, SettingError, "--classes: none; expected at least two"),
        ([], {"classes": "binary.txt"}, SettingError, "--classes 'binary.txt' is not UTF-8 text"),
        ([], {"out": "photos.csv"}, SettingError, "is a folder"),
        ([], {"out": "words.csv"}, SettingError, "already exists; name another file, or replace it with --overwrite"),
        ([], {"out": "words.txt/x.csv"}, SettingError, "its folder cannot be made"),
        ([], {"page": "words.txt/x.html"}, DataError, "cannot write into words.txt: words.txt is no folder"),
        ([], {"page": "words.html"}, DataError, "words.html already exists, .*; name another file with --page"),
        ([], {"model": "ViT-B-32"}, ModelStringError, "no steering method"),
        ([], {"model": "vs2:nope"}, TowerError, "has no model 'nope'"),
        ([], {"model": f"vs2:{TINY}@nope"}, CheckpointNotFound, "'nope'"),
        ([], {"model": f"proto:{TINY}"}, SettingError, "proto needs the true class of every image"),
        (["photos/nine"], {"model": f"pass:{TINY}", "classes": "a,b"}, SettingError, "pass reads training labels"),
        (["photos/nine"], {"model": f"vs2pp:{TINY}@labels=oracle", "classes": "a,b"}, SettingError, "reads training"),
        (["one/nine/0.png"], {"classes": "a,b"}, SettingError, "an SAE is trained on folders, but 'one/nine/0.png' is"),
        (["one"], {"classes": "a,b"}, SettingError, "1 image in one: too few to train an SAE on, which takes 20"),
        ([], {"train_images": ("words.txt",)}, SettingError, "--train_images 'words.txt' is not a folder"),
    ],
)
def test_what_cannot_be_is_told(photos, settings, error, problem, plan, photographed):
    for folder in ("empty", "one/nine", "photos.csv"):
        Path(folder).mkdir(parents=True, exist_ok=True)
    Path("one/nine/0.png").write_bytes(next(Path("photos/nine").iterdir()).read_bytes())
    Path("words.txt").write_text("no place\n")
    Path("words.csv").write_text("")
    Path("words.html").write_text("")
    Path("mixed.txt").write_text("a\tA\nb\n")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(error, match=problem):
        plan(*photos, **settings)
