import json

import pytest
from PIL import Image

from vs2_plugin.data.naming import DataSet
from vs2_plugin.data.own import build_folder, build_listed
from vs2_plugin.errors import DataError


@pytest.fixture
def folder(tmp_path):
    """A folder of images of three classes."""
    for name in ("a_b", "c", "d"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / name / "0.png")
    return DataSet.of(tmp_path / "photos")


def test_a_folder_is_built_as_its_own_files_say_or_those_of_the_command_line(folder, tmp_path):
    found = build_folder(folder, "test", lambda image: image.size, wds_cache_dir=None)
    assert found.classes == ["a b", "c", "d"] and found.templates == ["a photo of a {c}."] and found[2] == ((8, 8), 2)
    names, prompts = tmp_path / "names.json", tmp_path / "prompts.json"
    for key in ("folder/photos", "photos"):
        names.write_text(json.dumps({key: ["x", "y", "z"]}))
        prompts.write_text(json.dumps({"imagenet1k": ["no {c}"], key: ["the {c}"]}))
        found = build_folder(folder, "test", None, str(names), str(prompts))
        assert found.classes == ["x", "y", "z"] and found.templates == ["the {c}"]
    prompts.write_text(json.dumps({"imagenet1k": ["no {c}"]}))  # which clip_benchmark takes for any data set
    assert build_folder(folder, "test", custom_template_file=str(prompts)).templates == ["no {c}"]
    with pytest.raises(DataError, match="no prompts for the class 'a b'"):
        build_folder(folder, "test", custom_template_file="cupl_prompts.json")  # which comes with clip_benchmark


@pytest.mark.parametrize(
    ("names", "said"),
    [('{"photos": ["x"]}', "expected a list of 3 names for 'folder/photos'"), ('{"other": []}', "expected a list"),
     ("[", "cannot read '.*names.json' .*; expected JSON"), (None, "cannot read")],
)  # fmt: skip
def test_names_that_do_not_fit_a_folder_are_refused(names, said, folder, tmp_path):
    if names is not None:
        (tmp_path / "names.json").write_text(names)
    with pytest.raises(DataError, match=said):
        build_folder(folder, "test", custom_classname_file=str(tmp_path / "names.json"))


def test_listed_shards_are_read_with_what_lies_beside_them(tmp_path, write_shards, picture):
    write_shards(tmp_path / "s", [{"a.png": picture(5), "a.cls": b"1"}, {"b.png": picture(6), "b.cls": b"0"}])
    listed = DataSet.of(f"{tmp_path}/s/{{0..1}}.tar")
    with pytest.raises(DataError, match="nothing names the classes"):
        build_listed(listed)
    for folder in (tmp_path, tmp_path / "s"):  # above them or beside them
        (folder / "classnames.txt").write_text("one\ntwo\n")
        found = build_listed(listed, lambda image: image.size)
        assert found.classes == ["one", "two"] and found.templates == ["a photo of a {c}."]
        assert [tuple(row) for row in found] == [((8, 8), 1), ((8, 8), 0)]
        (folder / "classnames.txt").unlink()
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"s": ["x", "y"]}))
    assert build_listed(listed, custom_classname_file=str(names)).classes == ["x", "y"]


def test_listed_shards_are_read_by_url(tmp_path, serve, write_shards, picture):
    write_shards(tmp_path, [{"a.png": picture(5), "a.cls": b"1"}])
    (tmp_path / "classnames.txt").write_text("one\ntwo\n")
    found = build_listed(DataSet.of(f"{serve}/{{0..0}}.tar"), lambda image: image.size)
    assert found.classes == ["one", "two"] and [tuple(row) for row in found] == [((8, 8), 1)]
