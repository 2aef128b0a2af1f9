"""The table of splits against the source of clip_benchmark's builder, so that a new version that differs is noticed."""

import ast
import inspect
import textwrap

import pytest

from vs2_plugin.data.naming import DataSet
from vs2_plugin.data.splits import TRAIN_NAMES, Split, split_at_hand, training_split, without_training_split
from vs2_plugin.errors import DataError


def names_of(test):
    """The data sets that an ``if`` of the builder asks for; a prefix stands for one of its data sets."""
    if isinstance(test, ast.Compare) and ast.unparse(test.left) == "dataset_name":
        return [node.value for node in ast.walk(test.comparators[0]) if isinstance(node, ast.Constant)]
    if isinstance(test, ast.Call) and ast.unparse(test.func) == "dataset_name.startswith":
        return [test.args[0].value.rstrip("/") + "/name"]
    return []


def splits_of(body):
    """What a branch of the builder does with ``split``: ``ignored``, ``used``, or the splits that it allows."""
    statements = ast.Module(body, [])
    for node in ast.walk(statements):
        if (
            isinstance(node, ast.Assert)
            and isinstance(node.test, ast.Compare)
            and ast.unparse(node.test.left) == "split"
        ):
            allowed = ast.literal_eval(node.test.comparators[0])
            return {allowed} if isinstance(allowed, str) else set(allowed)
    read = {node.id for node in ast.walk(statements) if isinstance(node, ast.Name)}
    return "used" if read & {"split", "train"} else "ignored"


def read_builder():
    from clip_benchmark.datasets.builder import build_dataset

    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(build_dataset))))
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.If):
            for name in names_of(node.test):
                found.setdefault(name, splits_of(node.body))
    return found


BUILDER = read_builder()


def test_the_builder_is_understood():
    assert len(BUILDER) > 40
    assert BUILDER["cifar100"] == {"train", "test"}
    assert BUILDER["sun397"] == "ignored"
    assert BUILDER["imagenetv2"] == {"test"}
    assert BUILDER["wds/name"] == "used"


@pytest.mark.parametrize("dataset", BUILDER)
def test_every_data_set_of_clip_benchmark_is_known(dataset):
    splits = BUILDER[dataset]
    if splits == "ignored":
        assert "ignores the split" in without_training_split(dataset)
    elif splits == {"test"}:
        assert "test split only" in without_training_split(dataset)
    else:
        assert without_training_split(dataset) is None
        assert splits == "used" or training_split(dataset, None, False).name in splits


def test_no_data_set_is_listed_that_clip_benchmark_lacks():
    from vs2_plugin.data import splits

    assert {*splits._WITHOUT, *TRAIN_NAMES} <= BUILDER.keys()


CHOSEN = [
    # data set, requested, transductive allowed, expected
    ("cifar100", None, False, Split("train", False)),
    ("cifar100", None, True, Split("train", False)),
    ("pets", None, False, Split("trainval", False)),
    ("pets", "trainval", False, Split("trainval", False)),
    ("dtd", "val", False, Split("val", False)),
    ("wds/mine", None, False, Split("train", False)),
    ("wds/mine", "extra", False, Split("extra", False)),
    ("wds/sun397", None, False, Split("train", False)),
    ("unheard-of", None, False, Split("train", False)),
    ("cifar100", "test", True, Split("test", True)),
    ("sun397", None, True, Split("test", True)),
    ("sun397", "train", True, Split("train", True)),
    ("imagenet-a", None, True, Split("test", True)),
    ("sugar_crepe/add_att", None, True, Split("test", True)),
]


@pytest.mark.parametrize(("dataset", "requested", "transductive", "expected"), CHOSEN)
def test_the_split_to_train_on(dataset, requested, transductive, expected):
    assert training_split(dataset, requested, transductive) == expected


REFUSED = [
    ("sun397", None, "ignores the split"),
    ("sun397", "train", "ignores the split"),
    ("imagenetv2", None, "test split only"),
    ("sugar_crepe/swap_obj", None, "test split only"),
    ("dummy", None, "ignores the split"),
    ("cifar100", "test", "'test' is the one that is evaluated"),
    ("wds/mine", "test", "'test' is the one that is evaluated"),
]


@pytest.mark.parametrize(("dataset", "requested", "reason"), REFUSED)
def test_test_images_are_refused_unless_allowed(dataset, requested, reason):
    with pytest.raises(DataError) as error:
        training_split(dataset, requested, transductive=False)
    for part in (f"{dataset} has no training split to use", reason, "add --transductive"):
        assert part in str(error.value)


def test_shards_with_test_images_only_have_no_training_split(tmp_path):
    root = str(tmp_path)
    assert without_training_split("wds/x", root) is None  # nothing is there, which is another error
    for split in ("test", "train"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "nshards.txt").write_text("1")
        only_test = split == "test"
        assert (without_training_split("wds/x", root) is not None) is only_test
        assert training_split("wds/x", None, True, root) == Split("test" if only_test else "train", only_test)


@pytest.mark.parametrize(
    ("name", "folders", "split"),
    [
        ("folder/x", ["Train"], "train"),
        ("wds/x", ["train"], "train"),
        ("folder/x", ["train", "valid"], "test"),
        ("wds/x", ["test"], "test"),
        ("folder/x", ["cat", "dog"], "test"),  # the whole folder is the split, of any name
        ("cifar100", ["train"], "test"),
    ],
)
def test_names_of_classes_are_read_from_a_split_that_is_there(name, folders, split, tmp_path):
    for folder in folders:
        (tmp_path / folder).mkdir()
    assert split_at_hand(DataSet(name, str(tmp_path))) == split
    assert split_at_hand(DataSet("wds/x", "https://example.org/x")) == "test"
