import pytest

from vs2_plugin.checkpoint.records import TrainingData


def test_training_images_found_by_name_are_known_by_name_and_split(tmp_path):
    data = TrainingData(("cifar10", "p"), 7, ("train", "train"), folders=("", str(tmp_path / "p")))
    for of in (data, TrainingData(("cifar10",), 7, ("train",))):
        assert of.holds_split("cifar10", "train")
        assert of.holds_split("cifar10", "trainval")
        assert not TrainingData(("pets",), 7, ("val",)).holds_split("pets", "train")
        assert TrainingData(("pets",), 7, ("trainval",)).holds_split("pets", "val")
        for dataset, split in (("cifar10", "test"), ("cifar10", None), ("cifar100", "train"), ("p", "train")):
            assert not of.holds_split(dataset, split)


@pytest.mark.parametrize(
    ("trained", "evaluated", "shared"),
    [("/p", "/p", True), ("/p/train", "/p/test", False), ("/p/train", "/p", True), ("/p", "/p/test", True),
     ("/p", "/pp", False), ("https://x/{0..9}.tar", "https://x/{0..9}.tar", True), ("/p", "", False),
     ("https://x/{0..9}.tar", "https://x/{10..11}.tar", False), ("/p/{0..9}.tar", "/p/9.tar", True)],
)  # fmt: skip
def test_images_are_shared_where_one_folder_lies_in_the_other(trained, evaluated, shared):
    assert TrainingData(("folder/p",), 7, folders=(trained,)).holds(evaluated) is shared
    assert not TrainingData(("cifar10",), 7).holds(evaluated)


def test_a_link_to_a_folder_is_that_folder(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "link").symlink_to("photos")
    data = TrainingData(("folder/photos",), 7, folders=(str(tmp_path / "photos"),))
    assert data.is_of(str(tmp_path / "link")) and data.holds(str(tmp_path / "link"))
    assert not data.is_of(str(tmp_path / "x"))


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(
    ("link", "shared"),
    [("train/dog", True), ("train/dog/1.png", True), ("pool/1.png", True), ("pool/2.png", False), ("pool", True),
     ("train/.", True), ("train/dog/2.png", True)],
)  # fmt: skip
def test_links_are_followed_to_where_they_lead(tmp_path, link, shared, swap):
    """``train`` has an image of its own and one that is a link into a pool; ``test``, a link."""
    for name in ("train/dog/1.png", "pool/1.png", "pool/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "pool/link.png").symlink_to("1.png")
    (tmp_path / "train/dog/2.png").symlink_to("../../pool/link.png")
    (tmp_path / "test/cat").mkdir(parents=True)
    (tmp_path / "test/cat/x.png").symlink_to(tmp_path / link)
    folders = [str(tmp_path / "train"), str(tmp_path / "test")]
    trained, evaluated = reversed(folders) if swap else folders
    assert TrainingData(("folder/train",), 7, folders=(trained,)).holds(evaluated) is shared


def test_links_to_what_holds_no_image_share_none(tmp_path):
    for name in ("train/.cache", "test/.cache", "pool"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "pool/notes.txt").touch()
    (tmp_path / "pool/1.png").touch()
    for split in ("train", "test"):
        (tmp_path / split / "classnames.txt").symlink_to("../pool/notes.txt")
        (tmp_path / split / ".cache/1.png").symlink_to("../../pool/1.png")
    assert not TrainingData(("folder/p",), 7, folders=(str(tmp_path / "train"),)).holds(str(tmp_path / "test"))


def test_a_folder_that_is_linked_may_hold_links_and_lead_back(tmp_path):
    for name in ("train/cat", "test/cat", "links", "pool"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "pool/1.png").touch()
    (tmp_path / "links/1.png").symlink_to("../pool/1.png")
    (tmp_path / "links/back").symlink_to("..")
    (tmp_path / "train/cat/sub").symlink_to("../../links")
    (tmp_path / "test/cat/1.png").symlink_to("../../pool/1.png")
    (tmp_path / "links/back").unlink()
    data = TrainingData(("folder/p",), 7, folders=(str(tmp_path / "train"),))
    assert data.holds(str(tmp_path / "test")) and data.holds(str(tmp_path / "pool"))
    (tmp_path / "links/1.png").unlink()
    assert not data.holds(str(tmp_path / "test"))
    (tmp_path / "links/back").symlink_to("../links")
    assert not data.holds(str(tmp_path / "test"))


@pytest.mark.parametrize(
    ("trained", "folder", "its"),
    [("/p", "/p", True), ("/p/Train", "/p", True), ("/p/val", "/p", True), ("/p/own", "/p", True),
     ("/p/dogs", "/p", False), ("/p", "/p/train", False), ("/p/train-{0..9}.tar", "/p", True),
     ("https://x/p/{0..9}.tar", "https://x/p", True), ("/p/x/{0..9}.tar", "/p", False)],
)  # fmt: skip
def test_what_lies_within_is_of_a_folder_where_it_is_a_split_or_a_list_of_shards(trained, folder, its):
    assert TrainingData(("folder/p",), 7, ("own",), folders=(trained,)).is_of(folder) is its


def test_what_is_of_no_folder_is_written_as_before():
    assert "folders" not in TrainingData(("cifar10",), 7).to_json()
    assert TrainingData(("folder/p",), 7, folders=("/p",)).to_json()["folders"] == ("/p",)
