import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vs2_plugin.data.folders import LeftOut, open_files, open_folder
from vs2_plugin.data.images import open_images
from vs2_plugin.data.naming import DataSet
from vs2_plugin.errors import DataError
from vs2_plugin.paths import PICTURES, listed_once


@pytest.fixture
def draw(tmp_path):
    """A function that draws grey pictures, by their paths within ``tmp_path``."""

    def draw(*paths, grey=7):
        for path in paths:
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (grey,) * 3).save(file)
        return tmp_path

    return draw


def read(folder, split="test"):
    """Path -> class, in the order of the items."""
    images = open_folder(folder, split)
    return {path: label < 0 or images.classes[label] for path, (_, label) in zip(images.paths, images)}


# ---- what belongs to what


def test_a_class_is_a_folder_and_what_lies_deeper_belongs_to_it(draw):
    root = draw("b_c/2.png", "b_c/10.png", "a/deep/er/1.jpg", "a/0.webp")
    assert read(root) == read(root, "train") == {
        "a/0.webp": "a", "a/deep/er/1.jpg": "a", "b_c/10.png": "b c", "b_c/2.png": "b c",
    }  # fmt: skip
    assert open_folder(root).templates == ["a photo of a {c}."]


def test_classes_are_those_of_all_splits_together(draw):
    root = draw("train/b/0.png", "train/c/0.png", "test/a/1.png", "test/b/1.png")
    (root / "train/d").mkdir()
    assert read(root, "train") == {"train/b/0.png": "b", "train/c/0.png": "c"}
    assert read(root, "test") == {"test/a/1.png": "a", "test/b/1.png": "b"}
    assert open_folder(root, "train").classes == open_folder(root).classes == ["a", "b", "c"]


def test_a_folder_called_train_among_others_is_a_class(draw):
    root = draw("train/0.png", "plane/0.png")
    assert set(read(root).values()) == {"train", "plane"}


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Test"])
def test_the_test_split_may_be_called_otherwise(draw, name):
    root = draw(f"{name}/a/0.png", "train/a/1.png")
    assert [*read(root)] == [f"{name}/a/0.png"]


def test_a_split_that_is_not_there_is_named_with_those_that_are(draw):
    root = draw("train/a/0.png")
    with pytest.raises(DataError, match=r"no folder for the split 'test', only train/; expected test/ or val/"):
        open_folder(root)


def test_a_flat_folder_has_no_classes(draw):
    images = open_folder(draw("1.png", "0.png"), "train")
    assert images.classes == [] and images.labels.tolist() == [-1, -1] and list(images.paths) == ["0.png", "1.png"]


@pytest.mark.parametrize(
    ("paths", "said"),
    [(["0.png"], "no labels to evaluate with; .*vs2 classify"), (["a/0.png"], "one folder of images, 'a'"),
     (["a/0.png", "b/0.png", "c.png"], "1 image .* beside the folders of classes, such as c.png")],
    ids=["flat", "one", "beside"],
)  # fmt: skip
def test_what_cannot_be_evaluated_says_why(draw, paths, said):
    with pytest.raises(DataError, match=said):
        open_folder(draw(*paths)).require_labels()


# ---- names


@pytest.mark.parametrize(
    ("text", "names"),
    [("x\ny y\n", ["x", "y y"]), ("b\tanother\n", ["a", "another"]), ("\ufeffa\tone\nb\ttwo", ["one", "two"])],
)
def test_a_file_names_the_classes(draw, text, names):
    root = draw("a/0.png", "b/0.png")
    (root / "classnames.txt").write_text(text, encoding="utf-8")
    images = open_folder(root)
    assert images.classes == names and images.passed == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [("x\ny\nz\n", "names 3 classes, but there are 2 folders"), ("c\tx", "'c\\\\tx'; expected FOLDER<tab>NAME"),
     ("a\tx\nb", "'b'; expected FOLDER"), ("x\nx\n", "a, b are both called 'x'")],
)  # fmt: skip
def test_names_that_do_not_fit_are_refused(draw, text, said):
    root = draw("a/0.png", "b/0.png")
    (root / "classnames.txt").write_text(text)
    with pytest.raises(DataError, match=said):
        open_folder(root)


def test_prompts_are_those_of_the_folder(draw):
    root = draw("a/0.png", "b/0.png")
    file = root / "zeroshot_classification_templates.txt"
    file.write_text("a {c}\n\nthe {c}.\n")
    assert open_folder(root).templates == ["a {c}", "the {c}."]
    for text in ("a photo", "{c", "{x}", "{}"):
        file.write_text(text)
        with pytest.raises(DataError, match=r"the prompt .* has no \{c\}"):
            open_folder(root)


# ---- listing


def test_hidden_files_and_leavings_are_passed_over_and_others_are_counted(draw):
    root = draw("a/0.png", ".a/0.png", "a/._0.png", "__MACOSX/0.png", "a/@eaDir/0.png", "b/0.png")
    for name in ("a/Thumbs.db", "a/x.txt", "README", "a/y.TXT"):
        (root / name).touch()
    images = open_folder(root)
    assert list(images.paths) == ["a/0.png", "b/0.png"] and images.passed == {".db": 1, ".txt": 2, "": 1}


NAMES = ["with space", "{0} %s", "\u00fcml\u00e4ut \u6f22", "new\nline", b"\xff".decode(errors="surrogateescape")]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_may_be_anything(draw, name, tmp_path):
    root = draw(f"{name}/{name}.png", "other/0.png")
    images = open_folder(root)
    assert f"{name}/{name}.png" in images.paths and len(list(images)) == 2
    (tmp_path / name / f"{name}.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="is not a readable image") as error:
        list(images)
    assert "\n" not in str(error.value) and str(error.value).encode()


def test_links_are_followed_but_for_those_that_lead_back(draw, tmp_path, caplog):
    root = draw("a/0.png", "b/0.png")
    (root / "a/back").symlink_to(root)
    (root / "a/other").symlink_to(root / "b")
    (root / "b/one").symlink_to(root / "a")
    assert [*read(root)] == ["a/0.png", "a/other/0.png", "b/0.png", "b/one/0.png"]
    assert len(caplog.messages) == len(set(caplog.messages)) and "link to a folder above it" in caplog.text
    for leads_to in ("gone.jpg", "none.jpg"):  # the second leads to itself
        (root / "a/none.jpg").symlink_to(root / "a" / leads_to)
        with pytest.raises(DataError, match=r"none.jpg: a link that leads nowhere; mend it, or remove it"):
            open_folder(root)
        (root / "a/none.jpg").unlink()


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_must_not_be_read_is_named(draw):
    root = draw("a/0.png", "b/0.png")
    (root / "b").chmod(0)
    with pytest.raises(DataError, match="b: Permission denied"):
        open_folder(root)
    (root / "b").chmod(0o700)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no such pipes here")
def test_a_pipe_is_named_and_not_waited_for(draw, tmp_path):
    root = draw("a/1.png")
    os.mkfifo(os.path.join(root, "a", "2.png"))
    for read in (lambda: open_folder(root), lambda: open_files([root])):
        with pytest.raises(DataError, match=r"2\.png: it is a pipe or a device; expected files"):
            read()


def test_shards_in_a_folder_are_told_how_they_are_named(tmp_path):
    (tmp_path / "0.tar").touch()
    with pytest.raises(DataError, match=r"\(1 .tar\); shards are named --dataset wds/NAME --dataset_root FOLDER"):
        open_folder(tmp_path)


def test_a_folder_without_images_says_what_is_there(tmp_path):
    with pytest.raises(DataError, match=r"no images \(bmp, gif, .* in .*"):
        open_folder(tmp_path)
    (tmp_path / "x.heic").touch()
    with pytest.raises(DataError, match=r"1 other file skipped \(1 .heic\)"):
        open_folder(tmp_path)
    with pytest.raises(DataError, match="No such file"):
        open_folder(tmp_path / "gone")


def test_the_fingerprint_tells_every_change(draw):
    root = draw("a/0.png", "b/0.png")
    seen = {open_folder(root).fingerprint()}
    assert {open_folder(root).fingerprint()} == seen
    os.utime(root / "a/0.png", ns=(1, 1))
    seen.add(open_folder(root).fingerprint())
    (root / "a/0.png").rename(root / "a/1.png")
    seen.add(open_folder(root).fingerprint())
    draw("a/2.png")
    seen.add(open_folder(root).fingerprint())
    assert len(seen) == 4


def test_within_a_block_a_folder_is_listed_once(draw):
    root = draw("a/0.png", "b/0.png")
    with listed_once():
        first = open_folder(root)
        draw("a/1.png")
        with listed_once():
            assert open_folder(root).paths is first.paths
    assert len(open_folder(root)) == 3


def test_files_and_folders_can_be_named_together(draw, monkeypatch):
    monkeypatch.chdir(draw("a/0.png", "a/b/1.png", "c.png"))
    images = open_files(["c.png", Path("a")])
    assert list(images.paths) == ["c.png", "a/0.png", "a/b/1.png"] and images.classes == []
    assert images[2][0].size == (8, 8)
    with pytest.raises(DataError, match="cannot read gone.png: No such file"):
        open_files(["gone.png"])


def test_what_is_named_twice_is_listed_once(draw, monkeypatch):
    folder = draw("a/0.png", "a/b/1.png", "c.png")
    monkeypatch.chdir(folder)
    shutil.copy("c.png", "a/odd.picture")  # a folder's other files are listed if they are named
    Path("a/.hidden").mkdir()
    shutil.copy("c.png", "a/.hidden/2.png")
    images = open_files(["a/b", "a/0.png", "a", "c.png", "./c.png", "a/odd.picture", "a/.hidden", folder / "a"])
    assert list(images.paths) == ["a/b/1.png", "a/0.png", "c.png", "a/odd.picture", "a/.hidden/2.png"]
    with pytest.raises(DataError, match="cannot read a/gone.png: No such file"):
        open_files(["a", "a/gone.png"])


# ---- decoding


def test_an_image_that_the_disk_fails_to_give_is_never_left_out(draw, monkeypatch):
    """Else a disk that comes and goes would decide which images are trained on."""
    images = open_folder(draw("a/0.png"))
    images.lenient = True

    def fails(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Image, "open", fails)
    with pytest.raises(DataError, match=r"0\.png.*Input/output error$"):
        images[0]
    monkeypatch.setattr(Image, "open", lambda path: 1 / 0)
    assert isinstance(images[0][0], LeftOut)


@pytest.mark.parametrize("suffix", sorted(PICTURES))
@pytest.mark.parametrize("capital", [str, str.upper])
def test_every_kind_of_picture_is_read(draw, suffix, capital):
    root = draw(capital(f"a/0{suffix}"), grey=100)
    ((picture, _),) = open_folder(root)
    assert picture.mode == "RGB" and abs(picture.getpixel((3, 3))[0] - 100) <= 2


def test_pictures_are_those_of_the_same_files_in_shards(tmp_path, write_shards):
    """CMYK, transparency and the turn that a camera notes are treated as clip_benchmark and webdataset do."""
    rng = np.random.default_rng(0)
    turned = Image.Exif()
    turned[0x0112] = 6
    drawn = {
        "a/0.jpg": Image.fromarray(rng.integers(0, 255, (8, 6, 3), np.uint8)),
        "a/1.jpg": Image.fromarray(rng.integers(0, 255, (8, 6, 4), np.uint8), "CMYK"),
        "b/2.png": Image.fromarray(rng.integers(0, 255, (8, 6, 4), np.uint8), "RGBA"),
        "b/3.png": Image.fromarray(rng.integers(0, 255, (8, 6), np.uint8), "L").convert("P"),
    }
    samples = []
    for path, picture in drawn.items():
        file = tmp_path / "photos" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.save(file, **({"exif": turned} if path == "a/0.jpg" else {}))
        samples.append({path.replace("/", "-"): file.read_bytes()})
    write_shards(tmp_path / "shards/train", samples)
    folder = open_images(DataSet.of(tmp_path / "photos"), "train", np.asarray)
    shards = open_images(DataSet.of("wds/x", str(tmp_path / "shards")), "train", np.asarray)
    for (ours, _), theirs in zip(folder.source, shards.source, strict=True):
        assert ours.shape == (8, 6, 3) and np.array_equal(ours, theirs)
