"""Archives of CUB-200 and Tiny-ImageNet, drawn in miniature, become shards that clip_benchmark reads."""

import io
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from vs2_plugin.data.archives import OFFICIAL, convert, official_of
from vs2_plugin.data.naming import DataSet
from vs2_plugin.errors import DataError
from vs2_plugin.host import build

BIRDS = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Crow"]
IDS = ["n01443537", "n01629819", "n02124075"]


def picture(number: int) -> bytes:
    """A picture of one grey, which tells it from others."""
    data = io.BytesIO()
    Image.new("RGB" if number % 2 else "L", (8, 8), (number * 5,) * 3 if number % 2 else number * 5).save(data, "jpeg")
    return data.getvalue()


def cub() -> dict[str, bytes]:
    """The files of CUB_200_2011.tgz: two pictures of each class to train on, and one to evaluate."""
    images = [f"{bird}/{bird[4:]}_{number:04d}_{number}.jpg" for number, bird in enumerate(BIRDS * 3, 1)]
    files = {"attributes.txt": b"1 has_bill_shape\n", "CUB_200_2011/README": b"Caltech-UCSD Birds"}
    files |= {f"CUB_200_2011/images/{path}": picture(number) for number, path in enumerate(images, 1)}
    lists = {
        "images": [f"{number} {path}" for number, path in enumerate(images, 1)],
        "classes": [f"{number} {bird}" for number, bird in enumerate(BIRDS, 1)],
        "image_class_labels": [f"{number} {(number - 1) % 3 + 1}" for number in range(1, 10)],
        "train_test_split": [f"{number} {int(number <= 6)}" for number in range(1, 10)],
    }
    texts = {f"CUB_200_2011/{name}.txt": "".join(f"{line}\n" for line in rows) for name, rows in lists.items()}
    return files | {name: text.encode() for name, text in texts.items()}


def tiny() -> dict[str, bytes]:
    """The files of tiny-imagenet-200.zip: two pictures of each class to train on, and one to evaluate."""
    root, files = "tiny-imagenet-200", {}
    for number, word in enumerate(IDS):
        for turn in range(2):
            files[f"{root}/train/{word}/images/{word}_{turn}.JPEG"] = picture(2 * number + turn)
        files[f"{root}/train/{word}/{word}_boxes.txt"] = b"x_0.JPEG\t0\t0\t1\t1\n"
        files[f"{root}/val/images/val_{number}.JPEG"] = picture(10 + number)
        files[f"{root}/test/images/test_{number}.JPEG"] = picture(20 + number)
    rows = [f"val_{number}.JPEG\t{word}\t0\t32\t44\t62\n" for number, word in enumerate(IDS)]
    files[f"{root}/val/val_annotations.txt"] = "".join(rows).encode()
    files[f"{root}/wnids.txt"] = "\n".join(IDS).encode()
    words = ["goldfish, Carassius auratus", "crane, bird", "crane, machine"]
    other = ["n00001740\tentity"]
    files[f"{root}/words.txt"] = "\n".join([*other, *map("\t".join, zip(IDS, words))]).encode()
    return files


def packed(files: dict[str, bytes], path: Path) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        with tarfile.open(path, "w:gz") as archive:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


def unpacked(files: dict[str, bytes], folder: Path) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def read(root: Path, split: str) -> list[tuple[int, int]]:
    """The grey of each picture, and its label, as clip_benchmark reads them."""
    data = build(DataSet("wds/x", str(root)), split, transform=lambda image: round(image.getpixel((0, 0))[0] / 5))
    return sorted((int(image), int(label)) for image, label in data)


DRAWN = {"cub": (cub, "CUB_200_2011.tgz"), "tiny-imagenet": (tiny, "tiny-imagenet-200.zip")}


@pytest.mark.parametrize("kind", ["packed", "unpacked", "inside"])
@pytest.mark.parametrize("word", DRAWN)
def test_clip_benchmark_reads_the_shards(tmp_path, word, kind):
    draw, name = DRAWN[word]
    if kind == "packed":
        source = packed(draw(), tmp_path / name)
    else:
        source = unpacked(draw(), tmp_path / "unpacked")
        source = next(path for path in source.iterdir() if path.is_dir()) if kind == "inside" else source
    target = tmp_path / "root" / "x"
    assert convert(OFFICIAL[word], source, target) == (6, 3, 3)
    if word == "cub":
        assert read(target, "train") == [(number, (number - 1) % 3) for number in range(1, 7)]
        assert read(target, "test") == [(7, 0), (8, 1), (9, 2)]
        names = ["Black footed Albatross", "Laysan Albatross", "Crow"]
    else:
        assert read(target, "train") == [(number, number // 2) for number in range(6)]
        assert read(target, "test") == [(10, 0), (11, 1), (12, 2)]
        names = ["goldfish", "crane, bird", "crane, machine"]
    found = build(DataSet("wds/x", str(target)), "test")
    assert found.classes == names and len(found.templates) == 80 and "a photo of a {c}." in found.templates
    assert {path.name for path in (target / "train").iterdir()} == {"nshards.txt", *(f"{n}.tar" for n in range(8))}


def without(word: str, name: str, text: bytes | None = None) -> dict[str, bytes]:
    files = {path: data for path, data in DRAWN[word][0]().items() if not path.endswith(name)}
    return files if text is None else {**files, next(p for p in DRAWN[word][0]() if p.endswith(name)): text}


@pytest.mark.parametrize(
    ("word", "files", "reason"),
    [
        ("cub", tiny(), "holds no CUB-200-2011: there are no images.txt, classes.txt"),
        ("tiny-imagenet", cub(), "holds no Tiny-ImageNet: there are no wnids.txt"),
        ("cub", without("cub", "_9.jpg"), r"lacks 1 picture that its lists name, such as images/003.Crow/Crow_0009_9"),
        ("cub", without("cub", "labels.txt", b"1 77\n"), r"its lists do not match each other \(KeyError"),
        ("cub", without("cub", "images.txt", b"1\n"), r"its lists do not match each other \(ValueError"),
        ("cub", without("cub", "images.txt", b""), "they name nothing"),
        ("tiny-imagenet", without("tiny-imagenet", "val_1.JPEG"), "lacks 1 picture .* val/images/val_1.JPEG"),
        ("tiny-imagenet", without("tiny-imagenet", "n02124075_1.JPEG"), "there are 1 of one class, and 2 of another"),
        ("tiny-imagenet", without("tiny-imagenet", "words.txt", b"n1\tx"), r"do not match each other \(KeyError"),
    ],
)
def test_what_is_not_the_archive_is_told_and_leaves_nothing(tmp_path, word, files, reason):
    source = packed(files, tmp_path / DRAWN[word][1])
    with pytest.raises(DataError, match=f"(?s){reason}.*expected {DRAWN[word][1]}, or the folder .*https?://"):
        convert(OFFICIAL[word], source, tmp_path / "root" / "x")
    assert not (tmp_path / "root" / "x").exists()


@pytest.mark.parametrize("word", DRAWN)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 0.97])
def test_an_archive_that_was_cut_is_told(tmp_path, word, share):
    source = packed(DRAWN[word][0](), tmp_path / DRAWN[word][1])
    source.write_bytes(source.read_bytes()[: int(share * source.stat().st_size)])
    with pytest.raises(DataError, match="is not a complete archive"):
        convert(OFFICIAL[word], source, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_changed_byte_is_told(tmp_path):
    source = packed(tiny(), tmp_path / "tiny-imagenet-200.zip")
    data = bytearray(source.read_bytes())
    data[data.index(picture(3)) + 20] ^= 1
    source.write_bytes(data)
    with pytest.raises(
        DataError, match="is not a complete archive .*Bad CRC-32 for file 'tiny-imagenet-200/train/n01629819"
    ):
        convert(OFFICIAL["tiny-imagenet"], source, tmp_path / "x")


def test_what_is_there_stays(tmp_path):
    source, target = packed(cub(), tmp_path / "CUB_200_2011.tgz"), tmp_path / "x"
    target.mkdir()
    convert(OFFICIAL["cub"], source, target)  # an empty folder is none
    (target / "classnames.txt").write_text("mine")
    with pytest.raises(DataError, match="already exists; remove it, or name another folder"):
        convert(OFFICIAL["cub"], source, target)
    assert (target / "classnames.txt").read_text() == "mine"
    with pytest.raises(DataError, match="no file or folder 'nowhere'"):
        convert(OFFICIAL["cub"], Path("nowhere"), tmp_path / "y")


def test_an_interruption_leaves_nothing_and_the_next_call_goes_well(tmp_path, monkeypatch):
    source, target = packed(cub(), tmp_path / "CUB_200_2011.tgz"), tmp_path / "root" / "x"
    add, added = tarfile.TarFile.addfile, []

    def interrupted(self, member, file):
        added.append(member.name)
        if len(added) == 9:
            raise KeyboardInterrupt
        add(self, member, file)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tarfile.TarFile, "addfile", interrupted)
        convert(OFFICIAL["cub"], source, target)
    assert [path.name for path in target.parent.iterdir()] == [".locks"]
    unpacked({"train/0.tar": b"half", "old.txt": b"left"}, target.parent / ".x.part")  # by a process that was killed
    convert(OFFICIAL["cub"], source, target)
    assert read(target, "test") == [(7, 0), (8, 1), (9, 2)] and not (target / "old.txt").exists()


def test_the_tables_names_are_known():
    assert official_of("wds/cub200")[0] == "cub" and official_of("wds/tiny_imagenet")[0] == "tiny-imagenet"
    assert official_of("wds/mine") is None
