from argparse import Namespace
from types import SimpleNamespace

import pytest
from PIL import Image

from vs2_plugin.data.naming import DataSet
from vs2_plugin.errors import DataError, HarnessError
from vs2_plugin.host import Evaluation, build, default_task, not_built, require_texts, unknown_data_set, with_texts

# ---- an evaluation


def test_an_evaluation_takes_the_settings_that_there_are():
    args = Namespace(model="m", pretrained="p", dataset="d", split="test", amp=False, seed=3)
    found = Evaluation.of(args, output="x.json")
    assert found == Evaluation("m", "p", "d", amp=False, seed=3, output="x.json")


def test_it_has_the_defaults_of_clip_benchmark(monkeypatch):
    from clip_benchmark.cli import get_parser_args

    monkeypatch.setattr("sys.argv", ["clip_benchmark", "eval"])
    _, args = get_parser_args()
    named = {"model": "m", "pretrained": "p", "dataset": "d"}
    assert Evaluation.of(args, **named) == Evaluation(**named)


NAMES = [
    ({}, "vtab_x_openai_m_en_zeroshot_classification.json"),
    ({"output": "{model}.json"}, "m.json"),
    ({"output": "{task}", "dataset": "wds/mscoco_captions"}, "zeroshot_retrieval"),
    ({"output": "{task}", "task": "linear_probe"}, "linear_probe"),
    ({"output": "{pretrained}-{pretrained_full_path}", "pretrained": "FILE"}, "w.pt-FILE_PATH"),
    ({"output": "{pretrained}-{pretrained_full_path}"}, "openai-openai"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "name"), NAMES)
def test_the_output_is_named_as_clip_benchmark_does(changed, name, tmp_path):
    file = tmp_path / "w.pt"
    file.touch()
    if changed.get("pretrained") == "FILE":
        changed = {**changed, "pretrained": str(file)}
    settings = {"model": "m", "pretrained": "openai", "dataset": "wds/vtab/x", **changed}
    assert Evaluation(**settings).output_file == name.replace("FILE_PATH", str(file).replace("/", "_"))


@pytest.mark.parametrize("output", ["{nope}.json", "{", "{0}", "{model.x}", "{model[x]}"])
def test_an_output_that_cannot_be_filled_in_is_refused(output):
    with pytest.raises(HarnessError, match=r"cannot be filled in .*; known fields: \{model\}, "):
        Evaluation("m", "p", "d", output=output).output_file  # noqa: B018


# ---- data sets


def test_tasks_are_those_of_clip_benchmark():
    assert default_task("wds/flickr8k") == "zeroshot_retrieval"
    assert default_task("cifar10") == "zeroshot_classification"


def test_what_cannot_be_built_is_told_with_its_remedy(tmp_path):
    with pytest.raises(DataError, match=r"'nope' of 'pets' in '.*': .*Error: .*; put it there") as error:
        build(DataSet("pets", str(tmp_path)), "nope", remedy="put it there")
    assert error.value.__cause__ is not None
    with pytest.raises(DataError) as error:
        build(DataSet("wds/nope", str(tmp_path)), "train")
    assert not str(error.value).endswith("; ")


@pytest.mark.parametrize(
    ("error", "said"),
    [(OSError("gone"), "OSError: gone; put it there"), (SystemExit(1), "it ended with the line above; put it there"),
     (ImportError("no h5py"), "ImportError: no h5py"), (ValueError("broken URL"), "ValueError: broken URL")],
    ids=repr,
)  # fmt: skip
def test_a_remedy_is_told_where_it_can_help(error, said):
    assert str(not_built("d", "root", "test", error, "put it there")).endswith(f" in 'root': {said}")


@pytest.mark.parametrize(
    ("name", "close"),
    [("cifar10O", "'cifar10' or 'cifar100'"), ("Food101", "'food101'"), ("imagenet-1k", "'imagenet1k'"), ("xyzzy", "")],
)
def test_a_data_set_that_is_not_known_is_named_with_those_like_it(name, close, tmp_path):
    with pytest.raises(DataError) as error:
        build(DataSet(name, str(tmp_path)), "train", remedy="without a network, put it there")
    hint = f"did you mean {close}" if close else ""
    assert str(error.value).startswith(f"clip_benchmark knows no data set '{name}'; {hint}")
    assert "without a network" not in str(error.value)
    assert str(error.value).endswith("webdataset shards are called wds/NAME")


def test_a_folder_of_the_name_is_pointed_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    assert "the folder of that name is --dataset photos/; " in unknown_data_set("photos")


def test_a_folder_is_built_as_one_or_told_with_its_remedy(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a/0.png")
    with pytest.raises(DataError, match="one folder of images, 'a', .*; or name them"):
        build(DataSet.of(tmp_path), "test", remedy="or name them")
    (tmp_path / "b").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "b/0.png")
    assert build(DataSet.of(tmp_path), "test", transform=None).classes == ["a", "b"]


def test_names_that_clip_benchmark_may_know_are_left_to_it():
    for name in ("cifar10", "food101", "imagenet1k", "crossmodal3600", "wds/mine", "vtab/pets", "sugar_crepe/add_att"):
        assert unknown_data_set(name) is None


def test_a_split_is_built_by_clip_benchmark(tmp_path, write_shards, picture):
    write_shards(tmp_path / "test", [{"a.png": picture(5), "a.cls": b"1"}])
    (tmp_path / "classnames.txt").write_text("one\ntwo\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a {c}\n")
    found = build(DataSet("wds/mine", str(tmp_path)), "test", transform=lambda image: image.size)
    assert found.classes == ["one", "two"] and [tuple(row) for row in found] == [((8, 8), 1)]


WRONG_PROMPTS = ["ab", [], [1, 2], [["a"]], ["a photo"], ["a {c}", "a {d}"], {"cat": "a cat"}, {"cat": []}, True]


@pytest.mark.parametrize("prompts", WRONG_PROMPTS, ids=str)
def test_prompts_of_a_file_that_are_no_texts_with_a_place_for_the_class_are_refused(prompts):
    dataset = SimpleNamespace(classes=["cat"], templates=prompts)
    with pytest.raises(DataError, match=r"--custom_template_file 'p\.json' gives the prompts .*; expected a list"):
        with_texts(dataset, custom_template_file="p.json")
    assert with_texts(dataset) is dataset


@pytest.mark.parametrize("prompts", [["a {c}"], ["a {c}", "a photo"], {"cat": ["a small tiger"]}], ids=str)
def test_prompts_of_a_file_that_fit_are_taken(prompts):
    dataset = SimpleNamespace(classes=["cat"], templates=prompts)
    assert with_texts(dataset, "c.json", "p.json") is dataset
    assert with_texts(retrieval := SimpleNamespace(), "c.json", "p.json") is retrieval


@pytest.mark.parametrize("names", [True, [], [1, 2], "ab", {"a": 1}], ids=str)
def test_class_names_of_a_file_that_are_no_texts_are_refused(names):
    with pytest.raises(DataError, match=r"--custom_classname_file 'c\.json' gives the class names .*; expected a"):
        with_texts(SimpleNamespace(classes=names), custom_classname_file="c.json")


@pytest.mark.parametrize("text", ['["a {c}"]', "3", "null", "{", "[" * 100_000], ids=len)
def test_a_file_of_texts_that_is_no_json_object_is_refused(text, tmp_path):
    file = tmp_path / "p.json"
    file.write_text(text)
    for flag in ("custom_template_file", "custom_classname_file"):
        with pytest.raises(DataError, match=r"p\.json'.*; expected (a JSON object|JSON), {data set: list}"):
            require_texts(**{flag: str(file)})
    with pytest.raises(DataError, match="cannot read 'none.json'"):
        require_texts(custom_template_file="none.json")
    require_texts(custom_template_file="en_zeroshot_classification_templates.json")  # clip_benchmark's own
