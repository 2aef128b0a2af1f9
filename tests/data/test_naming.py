import os
from pathlib import Path

import pytest

from vs2_plugin.data.naming import DataSet
from vs2_plugin.errors import DataError, SettingError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder with folders of images."""
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "deep/{a} b", "vtab/pets"):
        Path(name).mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("dataset", "root"),
    [("photos/", "root"), ("./photos", "root"), ("photos//", "root"), ("folder", "photos"),
     ("folder/photos", "photos/"), ("folder/photos", "{dataset}"), (Path("photos"), "root")],
)  # fmt: skip
def test_a_folder_has_one_name_whatever_way_it_is_typed(dataset, root, here):
    found = DataSet.of(dataset, root)
    assert found.name == "folder/photos" and found.is_folder and not found.is_shards
    assert os.path.abspath(found.root) == str(here / "photos")
    assert DataSet.of(str(here / "photos")).name == "folder/photos"


def test_a_named_folder_may_lie_in_the_root(here):
    (here / "deep" / "photos").mkdir(parents=True)
    assert DataSet.of("folder/photos", "deep") == DataSet("folder/photos", os.path.join("deep", "photos"))
    assert DataSet.of("folder/photos/", "deep") == DataSet.of("folder/photos", "deep")
    assert DataSet.of("folder/photos", ".") == DataSet("folder/photos", os.path.join(".", "photos"))


def test_a_folder_of_another_name_is_refused(here):
    for root in ("photos", "deep"):
        (here / root).mkdir(exist_ok=True)
        with pytest.raises(DataError, match=f"folder/cats --dataset_root '{root}': that folder is not called cats"):
            DataSet.of("folder/cats", root)


def test_the_folder_at_hand_is_called_as_it_is(monkeypatch):
    monkeypatch.chdir("photos")
    assert DataSet.of(".").name == "folder/photos"
    assert DataSet.of("..").root == ".."


def test_what_is_neither_a_name_nor_a_path_is_refused():
    with pytest.raises(DataError, match="the data set is 5; expected its name, or the path of a folder"):
        DataSet.of(5)


@pytest.mark.parametrize("name", ["cifar100", "wds/mine", "vtab/pets", "tfds/x/y", "sugar_crepe/add_att", "photos"])
def test_a_name_is_a_name_even_where_there_is_such_a_folder(name):
    found = DataSet.of(name, "root/{dataset_cleaned}")
    short = name.removeprefix("wds/")
    assert found == DataSet(name, f"root/{short.replace('/', '-')}")
    assert not found.is_folder and found.is_shards == name.startswith("wds/")


@pytest.mark.parametrize(
    ("text", "name"),
    [("shards/train-{0000..0009}.tar", "wds/shards"), ("https://host/deep/x-{000..100}.tar", "wds/deep"),
     ("https://host/x.tar", "wds/host")],
)  # fmt: skip
def test_listed_shards_are_called_like_the_folder_that_they_lie_in(text, name):
    found = DataSet.of(text)
    assert found == DataSet(name, text) and found.is_listed and not found.is_folder


def test_what_stands_in_a_command_names_the_same_again():
    for dataset, root in [("photos/", "root"), ("deep/{a} b/", "root"), ("wds/x", "a{{b}}"), ("cifar10", "root"),
                          ("s/{0..9}.tar", "root"), (os.sep, "root")]:  # fmt: skip
        found = DataSet.of(dataset, root)
        assert DataSet.of(found.name, found.template) == DataSet.of(found.words[1], found.template) == found
    assert DataSet.of("./photos").words == ["--dataset", "./photos/"]


@pytest.mark.parametrize("root", ["{nope}", "{", "{0}", "{dataset.x}", "{dataset[x]}"])
def test_a_root_that_cannot_be_filled_in_is_refused(root):
    with pytest.raises(SettingError, match=r"only \{dataset\} and \{dataset_cleaned\} can be filled in"):
        DataSet.of("cifar10", root)


def test_a_path_that_leads_to_no_folder_is_refused():
    with pytest.raises(DataError, match="--dataset 'phtos/' is not a folder; expected a folder of images"):
        DataSet.of("phtos/")
    Path("photos/x.jpg").touch()
    with pytest.raises(DataError, match="'photos/x.jpg' is a file"):
        DataSet.of("photos/x.jpg")
