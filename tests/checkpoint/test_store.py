import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vs2_plugin.checkpoint.checkpoint import save_checkpoint
from vs2_plugin.checkpoint.manifest import MANIFEST
from vs2_plugin.checkpoint.records import SiteSAE, TrainingData
from vs2_plugin.checkpoint.store import Store, checkpoint_name, folder_size
from vs2_plugin.clip.tower import Tower
from vs2_plugin.errors import CheckpointError, CheckpointNotFound, DataError
from vs2_plugin.files import atomic_folder


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture
def put(make_sae):
    """A function that saves a checkpoint in a folder."""

    def write(folder, data=None, pretrained=""):
        facts = SiteSAE("visual", "plain", "none", 4, [0.0] * 4, 0.5, {}, {}, {})
        return save_checkpoint(
            folder,
            backbone="RN50",
            pretrained=pretrained,
            tower=Tower("x", [], {}),
            data=data or TrainingData(("cifar100",), 7),
            created={},
            saes=[(facts, make_sae(4, 8, 2))],
        )

    return write


# ---- of a folder


def test_a_folder_finds_its_own_checkpoint_and_not_that_of_another_of_its_name(store, put, tmp_path):
    def written(folders):
        data = TrainingData(("folder/photos",), 7, folders=folders)
        return put(store.checkpoints / "RN50_x_folder-photos", data)

    for folder in (tmp_path / "photos", tmp_path / "photos/train"):
        written((str(folder),))
        assert store.find_for("RN50", "x", "folder/photos", str(tmp_path / "photos")).data.folders == (str(folder),)
        with pytest.raises(
            CheckpointError, match=f"was trained on {folder}, not on /other/photos, which has the same name"
        ):
            store.find_for("RN50", "x", "folder/photos", "/other/photos")
    assert store.find_for("RN50", "x", "folder/photos").data.folders
    written(())  # before checkpoints told it
    assert store.find_for("RN50", "x", "folder/photos", "/other/photos")


# ---- where


def test_the_store_is_the_flag_then_the_environment_then_the_platforms_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("VS2_STORE", str(tmp_path / "env"))
    assert Store.default(tmp_path / "flag").root == tmp_path / "flag"
    assert Store.default(str(tmp_path / "flag")).root == tmp_path / "flag"
    assert Store.default().root == tmp_path / "env"
    assert Store.default("").root == tmp_path / "env"
    for unset in (lambda: monkeypatch.setenv("VS2_STORE", ""), lambda: monkeypatch.delenv("VS2_STORE")):
        unset()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert tmp_path in Store.default().root.parents
        assert "vs2-plugin" in Store.default().root.parts


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert Store.default("~/store").root == tmp_path / "store"
    monkeypatch.setenv("VS2_STORE", "~/other")
    assert Store.default().root == tmp_path / "other"


def test_an_untouched_store_is_empty_and_not_made(store):
    assert store.names() == []
    assert list(store.cached()) == []
    assert store.remove_cache() == 0
    assert not store.root.exists()


# ---- names


NAMES = [
    (("ViT-B-32", "openai", "cifar100"), "ViT-B-32_openai_cifar100"),
    (("ViT-B-32", "laion2b_s34b_b79k", "wds/vtab/cifar100"), "ViT-B-32_laion2b-s34b-b79k_wds-vtab-cifar100"),
    (("ViT-B/32", "openai", "sugar_crepe/add_att"), "ViT-B-32_openai_sugar-crepe-add-att"),
    (("ViT-B-32", "", "cifar100"), "ViT-B-32_random_cifar100"),
    (("hf-hub:laion/CLIP-ViT", "openai", "cifar100"), "hf-hub-laion-CLIP-ViT_cifar100"),
    (("local-dir:models/tiny", "openai", "wds/digits"), "local-dir-tiny_wds-digits"),
    (("local-dir:/a/b/tiny/", "", "wds/digits"), "local-dir-tiny_wds-digits"),
    (("local-dir:/a/b:c@d e", "", "wds/digits"), "local-dir-b-c-d-e_wds-digits"),
    (("coca_ViT-B-32", "x", "y"), "coca-ViT-B-32_x_y"),
]


@pytest.mark.parametrize(("parts", "name"), NAMES)
def test_the_name_of_a_checkpoint(parts, name, store):
    assert checkpoint_name(*parts) == name
    assert store.folder(name) == store.checkpoints / name


WORD = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9-]{0,9}", fullmatch=True)


@given(first=st.tuples(WORD, WORD, WORD), second=st.tuples(WORD, WORD, WORD))
def test_different_parts_give_different_names(first, second):
    assert (checkpoint_name(*first) == checkpoint_name(*second)) == (first == second)


@given(backbone=WORD, pretrained=st.text(max_size=20), dataset=st.text(min_size=1, max_size=20))
def test_every_name_is_a_plain_folder_name(backbone, pretrained, dataset):
    store = Store(Path("store"))
    assert store.folder(checkpoint_name(backbone, pretrained, dataset)).parent == store.checkpoints


def test_a_weights_file_has_one_name_from_wherever_it_is_named(tmp_path, monkeypatch):
    (tmp_path / "epoch_5.pt").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    for file in ("epoch_5.pt", "./epoch_5.pt", str(tmp_path / "epoch_5.pt")):
        assert checkpoint_name("RN50", file, "x") == "RN50_epoch-5_x"


def test_files_of_weights_of_one_name_have_checkpoints_of_their_own(tmp_path, monkeypatch):
    store, files = Store(tmp_path / "store"), [tmp_path / name / "epoch_5.pt" for name in ("a", "b", "moved")]
    for file, content in zip(files, (b"one", b"two", b"one")):
        file.parent.mkdir()
        file.write_bytes(content)
    names = [store.name_for("RN50", str(file), "x") for file in files]
    assert names == ["RN50_epoch-5-7692c3_x", "RN50_epoch-5-3fc4cc_x", names[0]]
    monkeypatch.chdir(tmp_path / "a")
    assert store.name_for("RN50", "epoch_5.pt", "x") == names[0]
    assert store.name_for("RN50", "openai", "x") == "RN50_openai_x"
    assert store.name_for("local-dir:a", str(files[0]), "x") == "local-dir-a_x"
    files[0].write_bytes(b"three")
    assert store.name_for("RN50", str(files[0]), "x") not in names


def test_the_checkpoint_of_a_file_from_before_is_found_by_that_file(store, put, tmp_path):
    files = [tmp_path / name / "epoch_5.pt" for name in ("a", "b")]
    for file in files:
        file.parent.mkdir()
        file.write_bytes(file.parent.name.encode())
    before = put(store.checkpoints / "RN50_epoch-5_x", pretrained=str(files[0])).folder
    assert store.find_for("RN50", str(files[0]), "x").folder == before
    with pytest.raises(CheckpointNotFound, match=r"no SAE checkpoint 'RN50_epoch-5-\w{6}_x'"):
        store.find_for("RN50", str(files[1]), "x")
    files[0].unlink()  # whose it was can no longer be told; the tower is compared when it is loaded
    assert store.find_for("RN50", str(files[1]), "x").folder == before


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "a\\b", ".hidden", "-x", "a b", "a\n", "a:b", "ä", "/etc"]
)
def test_a_name_that_is_no_plain_name_is_refused(name, store):
    for use in (store.folder, store.remove):
        with pytest.raises(DataError, match="expected letters, digits and any of"):
            use(name)


# ---- finding


def test_a_checkpoint_is_found_by_name(store, put):
    saved = put(store.checkpoints / "mine")
    assert store.find("mine") == saved == store.find(Path("mine"))


def test_what_names_no_checkpoint_is_refused(store):
    for wrong in (5, None):
        with pytest.raises(CheckpointError, match=f"checkpoint {wrong}: expected its name, its folder, or hf:"):
            store.find(wrong)


def test_a_checkpoint_is_found_by_path(store, put, tmp_path, monkeypatch):
    saved = put(tmp_path / "elsewhere" / "other")
    assert store.find(str(saved.folder)) == saved
    monkeypatch.chdir(tmp_path)
    assert store.find("elsewhere/other").digest == saved.digest
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert store.find("~/elsewhere/other").digest == saved.digest


def test_a_checkpoint_whose_writer_died_is_found_by_path_too(store, put, tmp_path, monkeypatch):
    saved = put(tmp_path / "elsewhere" / "other")
    saved.folder.rename(saved.folder.with_name(".other.old"))
    monkeypatch.chdir(tmp_path)
    assert store.find("elsewhere/other").digest == saved.digest


def test_the_store_comes_before_a_folder_of_the_same_name(store, put, tmp_path, monkeypatch):
    put(tmp_path / "mine")
    saved = put(store.checkpoints / "mine")
    monkeypatch.chdir(tmp_path)
    assert store.find("mine").folder == saved.folder


@pytest.mark.parametrize("name", ["missing", "a/b", "", "..", "x\0y"])
def test_the_error_says_what_is_there(name, store, put):
    with pytest.raises(CheckpointNotFound) as error:
        store.find(name)
    expected = f"no SAE checkpoint {name!r} in the store {store.root} (available: none)"
    assert f"{expected}, and no folder of that name holds one" in str(error.value)
    for saved in ("b", "a"):
        put(store.checkpoints / saved)
    with pytest.raises(CheckpointNotFound, match=r"\(available: a, b\)"):
        store.find(name)


UNFINDABLE = [
    pytest.param("~nobody-of-that-name/x", id="no such user"),
    pytest.param("a" * 300, id="longer than a file name may be"),
]


@pytest.mark.parametrize("name", UNFINDABLE)
def test_a_name_that_no_file_can_have_is_not_found(name, store):
    with pytest.raises(CheckpointNotFound):
        store.find(name)


def test_a_damaged_checkpoint_is_listed_and_told_from_a_missing_one(store, put):
    folder = put(store.checkpoints / "mine").folder
    (folder / MANIFEST).write_text("{")
    assert store.names() == ["mine"]
    with pytest.raises(CheckpointError, match="is damaged") as error:
        store.find("mine")
    assert not isinstance(error.value, CheckpointNotFound)


def test_every_name_that_is_listed_can_be_removed(store, put):
    put(store.checkpoints / "my copy")
    for name in store.names():
        store.remove(name)
    assert store.names() == []


def test_unfinished_folders_have_no_names(store, put):
    put(store.checkpoints / "mine")
    put(store.checkpoints / ".mine.abc")
    (store.checkpoints / "empty").mkdir()
    (store.checkpoints / "file").write_text("")
    assert store.names() == ["mine"]


def test_commands_are_told_a_store_that_they_do_not_find_by_themselves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VS2_STORE", str(tmp_path / "mine"))
    for found in ("mine", tmp_path / "mine", "there/../mine", None):
        store = Store.default(found)
        assert (store.words, store.assignment) == ([], "")
    other = Store.default("a store")
    assert other.words == ["--store", "a store"] and other.assignment == "VS2_STORE='a store' "
    monkeypatch.delenv("VS2_STORE")
    assert Store.default().words == [] and Store.default("mine").assignment == "VS2_STORE=mine "


# ---- removing


def test_removing_deletes_the_checkpoint_alone_and_says_how_much(store, put):
    put(store.checkpoints / "other")
    folder = put(store.checkpoints / "mine").folder
    size = folder_size(folder)
    assert size == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) > 0
    assert store.remove("mine") == size
    assert store.names() == ["other"]
    with pytest.raises(CheckpointNotFound, match=r"'mine' in the store .* \(available: other\)"):
        store.remove("mine")


def test_what_others_share_is_not_freed(store, put, tmp_path):
    folder = put(store.checkpoints / "mine").folder
    shared = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    (tmp_path / "another").hardlink_to(shared)
    (folder / "twice").hardlink_to(next(path for path in folder.rglob("*.json")))
    size = folder_size(folder)
    assert size == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != "twice")
    assert folder_size(folder, tmp_path) == folder_size(tmp_path)
    freed = size - shared.stat().st_size
    assert store.remove("mine") == freed > 0


def test_a_damaged_checkpoint_can_be_removed(store, put):
    folder = put(store.checkpoints / "mine").folder
    (folder / MANIFEST).unlink()
    store.remove("mine")
    assert not folder.exists()


def test_cached_activations_and_leftovers_are_listed_and_removed(store, put):
    put(store.checkpoints / "mine")
    left = [store.activations / ".a.part", store.checkpoints / ".c.part", store.training / "d"]
    for folder in (store.activations / ("b" * 32), *left):
        folder.mkdir(parents=True)
        (folder / "x.npy").write_bytes(b"12345")
    assert [path.name for path in store.cached()] == ["b" * 32]
    assert set(store.unfinished()) == set(left)
    assert store.remove_unfinished(days=1) == 0
    os.utime(left[0], (0, 0))
    assert store.remove_unfinished(days=1) == 0  # what is in it is young
    os.utime(left[0] / "x.npy", (0, 0))
    assert store.remove_unfinished(days=1) == 5 and set(store.unfinished()) == set(left[1:])
    assert store.remove_cache() == 15
    assert list(store.cached()) == [] == list(store.unfinished())
    assert store.names() == ["mine"]


def test_what_a_running_process_writes_is_not_removed(store, elsewhere):
    with atomic_folder(store.activations / "a") as scratch:
        assert list(store.unfinished()) == [scratch]
        # Another process asks; this one may nest.
        code = "from vs2_plugin.checkpoint.store import Store"
        code += f"; print(Store.default({str(store.root)!r}).remove_cache())"
        assert elsewhere(code) == "0" and scratch.exists()
    assert list(store.unfinished()) == []


@pytest.mark.parametrize("state", ["new", "old"])
def test_a_checkpoint_whose_writer_died_between_renames_is_found(state, store, put):
    folder = put(store.checkpoints / "mine").folder
    folder.rename(folder.with_name(f".mine.{state}"))
    assert store.find("mine").folder == folder
    folder.rename(folder.with_name(f".mine.{state}"))
    assert store.names() == ["mine"]
    assert list(store.unfinished()) == []


def test_a_store_that_cannot_be_written_is_told_in_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"the store .*file is a file; expected a folder: name another .* --store"):
        Store(tmp_path / "file").require_writable()
    with pytest.raises(DataError, match=r"the store .* cannot be written \(Not a directory\)"):
        Store(tmp_path / "file" / "store").require_writable()
    Store(tmp_path / "new").require_writable()


def test_a_name_that_leaves_no_room_for_a_scratch_folder_is_refused(store):
    assert store.folder("a" * 200).name == "a" * 200
    with pytest.raises(DataError, match=r"checkpoint name a{40}\.\.\.: 201 letters, expected at most 200.*--name"):
        store.folder("a" * 201)
