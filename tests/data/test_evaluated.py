"""What is refused before an evaluation is what clip_benchmark and webdataset would fail at, and nothing else."""

import re
import warnings

import pytest
import torch

from vs2_plugin.data.evaluated import fewer_workers, look, name_samples
from vs2_plugin.data.loading import read
from vs2_plugin.data.naming import DataSet
from vs2_plugin.errors import DataError
from vs2_plugin.host import build

NAMES = "classnames.txt"
PROMPTS = "zeroshot_classification_templates.txt"


@pytest.fixture
def folder(tmp_path, write_shards, picture):
    """A function that writes a data set of two shards, the second of them as given."""

    def write(members=None, names="cat\ndog\n", prompts="a photo of a {c}.\n"):
        good = {"a.png": picture(1), "a.cls": b"0", "b.png": picture(2), "b.cls": b"1"}
        write_shards(tmp_path / "test", [good, good if members is None else members])
        for name, text in ((NAMES, names), (PROMPTS, prompts)):
            (tmp_path / name).unlink(missing_ok=True)
            if text is not None:
                (tmp_path / name).write_text(text)
        return tmp_path

    return write


def test_listed_shards_are_looked_at_as_those_of_a_split(folder, picture):
    root = folder({"a.png": picture(1), "a.cls": b"1"})
    listed = f"{root}/test/{{0..1}}.tar"
    assert look(listed, "any", templates=False) == [2, 1]
    folder({"a.png": picture(1), "a.cls": b"2"})
    with pytest.raises(DataError, match="the label is 2"):
        look(listed, "any", templates=False)
    with pytest.raises(DataError, match="2.tar: no such file; 1 of the 3"):
        look(f"{root}/test/{{0..2}}.tar", "any")
    assert look("https://nowhere.invalid/{0..4}.tar", "any") == [1] * 5


def transform(image):
    return torch.ones(1)


def evaluate(root, named=True, task="zeroshot_classification"):
    """Read the split as clip_benchmark does: labels in their order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = build(DataSet("wds/x", str(root)), "test", transform=transform, task=task)
        return [label for _, label in (name_samples(dataset) if named else dataset)]


READ = {
    "label first": lambda png: {"a.cls": b"1", "a.png": png},
    "spaces in a label": lambda png: {"a.png": png, "a.cls": b" 1\n"},
    "capitals": lambda png: {"a.PNG": png, "a.CLS": b"1"},
    "folders": lambda png: {"x/a.png": png, "x/a.cls": b"1", "y/a.png": png, "y/a.cls": b"0"},
    "dots in folders": lambda png: {"./v1.0/a.png": png, "./v1.0/a.cls": b"1"},
    "more than needed": lambda png: {"a.png": png, "a.cls": b"1", "a.json": b"{}", "a.txt": b"a cat"},
    "several images": lambda png: {"a.gif": b"", "a.jpg": png, "a.png": png, "a.cls": b"1"},
    "metadata": lambda png: {"__info__": b"", "a.png": png, "a.cls": b"1"},
    "a file without extension": lambda png: {"README": b"", "a.png": png, "a.cls": b"1"},
}


@pytest.mark.parametrize("case", READ)
def test_what_clip_benchmark_reads_is_counted(case, folder, picture):
    root = folder(READ[case](picture(3)))
    counts = look(str(root), "test")
    assert sum(counts) == len(evaluate(root)) == len(evaluate(root, named=False)) and counts[0] == 2


REFUSED = {
    "no label": (lambda png: {"a.png": png}, "the image 'a' has no label; expected a.cls right beside it"),
    "label elsewhere": (lambda png: {"a.png": png, "b.png": png, "b.cls": b"0", "a.cls": b""}, "'a' has no label"),
    "no image": (lambda png: {"a.cls": b"1"}, "beside a.cls there is no image (webp, png, jpg, jpeg)"),
    "a page": (lambda png: {"readme.txt": b"", "a.png": png, "a.cls": b"1"}, "beside readme.txt there is no image"),
    "a Mac's own": (lambda png: {"x/._a.png": b"", "x/a.png": png, "x/a.cls": b"1"}, "beside x/._a.png there is no"),
    "another image": (lambda png: {"a.gif": png, "a.cls": b"1"}, "beside a.gif there is no image"),
    "twice": (lambda png: {"a.png": png, "a.PNG": png, "a.cls": b"1"}, "holds a.png twice"),
    "label of words": (lambda png: {"a.png": png, "a.cls": b"cat"}, "a.cls holds b'cat'; expected the number"),
    "no shard": (None, "cannot read shard"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_end_an_evaluation_is_named_before_it(case, folder, picture):
    members, expected = REFUSED[case]
    root = folder(members and members(picture(3)))
    if members is None:
        (root / "test/1.tar").write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(Exception):  # noqa: B017  # whatever webdataset and tarfile raise
        evaluate(root, named=False)
    with pytest.raises(DataError) as error:
        look(str(root), "test")
    assert str(root / "test/1.tar") in str(error.value) and expected in str(error.value)
    with pytest.raises(DataError, match=re.escape(f"{root}/test/1.tar: ")) as error:  # when its turn comes
        evaluate(root)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("label", [b"2", b"-1", b"99", b"9999999999"])
def test_labels_beyond_the_classes_are_wrong_in_silence_no_longer(label, folder, picture):
    root = folder({"a.png": picture(1), "a.cls": label})
    assert evaluate(root, named=False)[-1] == int(label)
    with pytest.raises(DataError, match=rf"test/1\.tar: a\.cls: the label is {int(label)}; expected .* 0 to 1 \("):
        look(str(root), "test")
    with pytest.raises(DataError, match=rf"test/1\.tar: a\.cls: the label is {int(label)}; expected .* 0 to 1 \("):
        evaluate(root)
    with pytest.raises(DataError) if int(label) < 0 or int(label) > 10**6 else warnings.catch_warnings():
        look(str(root), "test", names=False)  # classes that a file of the user's names


@pytest.mark.parametrize("data", [b"", b"not an image", b"\x89PNG\r\n\x1a\n"])
def test_an_image_that_cannot_be_read_is_named_when_its_turn_comes(data, folder):
    root = folder({"x/a.png": data, "x/a.cls": b"1"})
    assert look(str(root), "test") == [2, 1]
    with pytest.raises(DataError, match=rf"^{root}/test/1\.tar: x/a\.png is not a readable image$"):
        evaluate(root)


def test_a_broken_file_beside_an_image_is_named_when_its_turn_comes(folder, picture):
    root = folder({"a.png": picture(1), "a.cls": b"1", "a.json": b"{"})
    with pytest.raises(DataError, match=r"test/1\.tar: cannot continue reading at the sample 'a': JSONDecodeError: "):
        evaluate(root)


FILES = [
    ({"names": None}, rf"no file .*{NAMES}; expected the names of the classes, one per line, in the order"),
    ({"names": ""}, rf"{NAMES} names no class"),
    ({"prompts": None}, rf"no readable file .*{PROMPTS} .*; write it: echo 'a photo of a {{c}}\.' > .*{PROMPTS}"),
    ({"prompts": "a photo\n"}, rf"{PROMPTS} holds no prompt with {{c}}"),
    ({"prompts": ""}, rf"{PROMPTS} holds no prompt with {{c}}"),
    ({"prompts": "a {c}\na {class}\n"}, r"the prompt 'a {class}' cannot be filled in; expected {c} for the class"),
    ({"prompts": "a {c\n"}, r"the prompt 'a {c' cannot be filled in"),
]


@pytest.mark.parametrize(("files", "expected"), FILES, ids=[str(row[0]) for row in FILES])
def test_names_and_prompts_are_looked_at_where_they_count(files, expected, folder):
    root = str(folder(**files))
    with pytest.raises(DataError, match=expected):
        look(root, "test")
    assert look(root, "test", names=False, templates=False) == [2, 2]
    with pytest.raises(DataError, match="dataset_type.txt does not say .* echo retrieval > .*/dataset_type.txt"):
        look(root, "test", "zeroshot_retrieval")


def test_captions_are_looked_for_where_there_are_no_labels(folder, picture):
    root = folder({"a.png": picture(1), "a.txt": b"a cat"})
    (root / "dataset_type.txt").write_text("Retrieval\n")
    with pytest.raises(DataError, match=r"0\.tar: the image 'a' has no label; expected a\.txt"):
        look(str(root), "test", "zeroshot_retrieval")
    with pytest.raises(DataError, match="says 'retrieval', .*--task zeroshot_retrieval"):
        look(str(root), "test")
    (root / "dataset_type.txt").write_text("multilabel")
    with pytest.raises(DataError, match=r"0\.tar: the image 'a' has no label; expected a\.npy"):
        look(str(root), "test")


def test_compressed_shards_are_left_to_webdataset(folder, write_shards, picture):
    root = folder()
    write_shards(root / "test", [{"a.png": picture(1), "a.cls": b"0"}], mode="w:gz")
    assert look(str(root), "test") == [1]
    assert evaluate(root) == [0]


def test_a_split_without_images_is_refused(folder, write_shards):
    root = folder()
    write_shards(root / "test", [{}, {}])
    with pytest.raises(DataError, match=r"no images \(webp, png, jpg, jpeg\) in the 2 shards"):
        look(str(root), "test")


# ---- workers


COUNTS = [[2], [2, 2], [2, 0], [0, 2, 0, 2], [1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("asked", [0, 1, 2, 4])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_as_many_workers_as_the_shards_serve_and_no_fewer(counts, asked, folder, write_shards, picture):
    root = folder()
    one = {"a.png": picture(1), "a.cls": b"0"}
    two = {**one, "b.png": picture(1), "b.cls": b"0"}
    write_shards(root / "test", [[{}, one, two][count] for count in counts])
    assert look(str(root), "test") == counts

    def served(number):
        """Whether webdataset gives every worker something: the shards that it splits among them."""
        return all(any(counts[worker::number]) for worker in range(number))

    found = fewer_workers(counts, asked)
    assert found == max((number for number in range(1, asked + 1) if served(number)), default=0)
    if asked == 4:
        assert read_with(root, found) == sum(counts)
        assert found == asked or "No samples found" in read_with(root, found + 1)


def read_with(root, workers):
    """How many labels a loader with so many workers reads, or what it says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = name_samples(build(DataSet("wds/x", str(root)), "test", transform=transform))
        loader = torch.utils.data.DataLoader(dataset.batched(2), batch_size=None, num_workers=workers)
        try:
            return sum(len(labels) for _, labels in read(loader))
        except DataError as error:
            return str(error)


# ---- behind a URL


def test_behind_a_url_the_small_files_are_looked_at(serve, folder):
    folder()
    assert look(serve, "test") == [1, 1]
    assert evaluate(serve) == [0, 1, 0, 1]
    with pytest.raises(DataError, match=r"404 .*/valid/nshards\.txt; expected nshards\.txt with the number of shards"):
        look(serve, "valid")
    for files, missing in (({"names": None}, NAMES), ({"prompts": None}, PROMPTS)):
        folder(**files)
        with pytest.raises(DataError, match=f"404 .*/{missing}"):
            look(serve, "test")
        assert look(serve, "test", "zeroshot_retrieval") == [1, 1]


@pytest.mark.parametrize("root", ["s3://bucket/x", "http://127.0.0.1:9/x"])
def test_what_cannot_be_asked_for_is_left_to_clip_benchmark(root):
    assert look(root, "test") is None
