import os
import stat

import pytest

from vs2_plugin.files import atomic_file, atomic_folder


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "default-store")


class Interrupted(BaseException):
    """Any exception, Ctrl-C's too."""


# ---- a file


def test_a_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "x.json"
    with atomic_file(path) as scratch:
        scratch.write_text("new")
        assert scratch.parent == tmp_path and not path.exists()
    assert path.read_text() == "new" and names(tmp_path) == ["x.json"]


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("old and longer")
    with atomic_file(path) as scratch:
        scratch.write_text("new")
        assert path.read_text() == "old and longer"
    assert path.read_text() == "new" and names(tmp_path) == ["x.json"]


@pytest.mark.skipif(os.name == "nt", reason="Windows knows no such modes")
def test_colleagues_may_read(tmp_path):
    with atomic_file(tmp_path / "file") as scratch:
        scratch.write_text("new")
    with atomic_folder(tmp_path / "folder"):
        pass
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o755


@pytest.mark.parametrize("old", [None, "old"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Interrupted])
def test_a_file_that_fails_leaves_what_was_there(error, old, tmp_path):
    path = tmp_path / "x.json"
    if old:
        path.write_text(old)
    with pytest.raises(error), atomic_file(path) as scratch:
        scratch.write_text("half")
        raise error
    assert names(tmp_path) == (["x.json"] if old else [])
    assert not old or path.read_text() == old


def test_a_file_that_cannot_be_moved_in_leaves_no_scratch(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(OSError), atomic_file(tmp_path / "x") as scratch:
        scratch.write_text("new")
    assert names(tmp_path) == ["x"]


def test_a_file_in_no_folder_is_an_os_error(tmp_path):
    with pytest.raises(OSError), atomic_file(tmp_path / "nope" / "x"):
        pytest.fail("the block ran")


# ---- a folder


def test_a_folder_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "around" / "mine"
    with atomic_folder(path) as scratch:
        (scratch / "a").write_text("new")
        assert names(path.parent) == [scratch.name]
    assert (path / "a").read_text() == "new" and names(path.parent) == ["mine"]


def test_a_folder_is_replaced_whole(tmp_path):
    path = tmp_path / "mine"
    path.mkdir()
    (path / "old").write_text("old")
    with atomic_folder(path) as scratch:
        (scratch / "new").write_text("new")
        assert names(path) == ["old"]
    assert names(path) == ["new"] and names(tmp_path) == ["mine"]


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Interrupted])
def test_a_folder_that_fails_leaves_what_was_there(error, old, tmp_path):
    path = tmp_path / "mine"
    if old:
        path.mkdir()
        (path / "old").write_text("old")
    with pytest.raises(error), atomic_folder(path) as scratch:
        (scratch / "half").write_text("half")
        raise error
    assert names(tmp_path) == (["mine"] if old else [])
    assert not old or names(path) == ["old"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_folder_that_cannot_be_moved_in_leaves_the_old_one(failing, tmp_path, monkeypatch):
    path, replace, calls = tmp_path / "mine", os.replace, []
    path.mkdir()
    (path / "old").write_text("old")

    def fails_once(source, target):
        calls.append(target)
        if len(calls) == failing:
            raise OSError("no space left")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails_once)
    with pytest.raises(OSError, match="no space left"), atomic_folder(path) as scratch:
        (scratch / "new").write_text("new")
    assert names(tmp_path) == ["mine"] and names(path) == ["old"]
